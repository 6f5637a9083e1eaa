"""What a program does around a model, or has set for all in it: threads, PyTorch's defaults, numba's cache."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numba
import numpy as np
import pytest
import torch
from max.driver import CPU
from numba.core.caching import FunctionCache, NullCache
from whisper import DecodingOptions, timing
from whisper.audio import pad_or_trim
from whisper.model import MultiHeadAttention
from whisper.tokenizer import get_tokenizer

from maxwhisper.alignment import find_alignment, keep_alignment_compiled
from maxwhisper.audio import load_audio, log_mel_spectrogram
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.decoding.cache import KeyValueCache
from maxwhisper.decoding.gpu import GPUStepper
from maxwhisper.whisper import Whisper, load_model
from reference.fixtures import FIXTURES, NANO

SHORT: dict[str, Any] = {"language": "en", "temperature": 0.0, "sample_len": 8}
PATIENCE = 60.0
"""Seconds after which what would wait for ever is taken to."""


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return load_audio(FIXTURES / "clips" / "english-4.ogg")[:36000]


@pytest.fixture(scope="module")
def mel(audio: np.ndarray) -> torch.Tensor:
    return log_mel_spectrogram(pad_or_trim(audio))


# ---- threads --------------------------------------------------------------------------------------------------------


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Returns what the calls return, each from a thread of its own, begun together."""
    start, found = threading.Barrier(len(calls)), [Future[Any]() for _ in calls]

    def work(call: Callable[[], Any], result: Future[Any]) -> None:
        start.wait()
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    for call, result in zip(calls, found, strict=True):
        threading.Thread(target=work, args=(call, result), daemon=True).start()
    return [result.result(PATIENCE) for result in found]


@pytest.mark.parametrize("options", [{}, {"beam_size": 2, "word_timestamps": True}], ids=["greedy", "beams, words"])
def test_every_thread_that_shares_a_model_has_what_it_has_alone(
    model: Whisper, audio: np.ndarray, options: dict[str, Any]
) -> None:
    options = {**SHORT, **options}
    clips = [audio, audio[:20000]]
    alone = [model.transcribe(clip, **options) for clip in clips]
    each = [partial(model.transcribe, clip, **options) for clip in clips]
    found = at_once(*each, lambda: dict(model.transcribe_many(clips, 2, **options)), *each)
    assert found.pop(2) == dict(enumerate(alone))
    assert found == [*alone, *alone]


def test_another_model_is_used_while_recordings_advance_together(model: Whisper, audio: np.ndarray) -> None:
    """By whoever is told of the progress."""
    other, seen = load_model(NANO), []
    alone = model.transcribe(audio, **SHORT)
    progress = lambda _: seen.append([each.transcribe(audio, **SHORT) for each in (other, model)])  # noqa: E731
    found = dict(model.transcribe_many([audio, audio], 2, progress=progress, **SHORT))
    assert found == {0: alone, 1: alone}
    assert seen and all(each == alone for both in seen for each in both)


def test_every_thread_has_its_own_slot_on_a_device(model: Whisper) -> None:
    stepper = GPUStepper(model.network, model.dims, CPU())

    def cache(value: float) -> KeyValueCache:
        made = KeyValueCache(cross=[torch.full((1, 1, 5, 4), value)])
        made.append([torch.full((1, 1, 3, 4), value)], n_position=8)
        return made

    first, second = cache(1.0), cache(2.0)
    stepper._in_slots(first)
    at_once(lambda: stepper._in_slots(second))
    for each, value in ((first, 1.0), (second, 2.0)):
        assert (each.own[0][:, :, :3] == value).all() and (each.cross[0] == value).all()


def test_words_are_timed_by_one_thread_at_a_time(
    model: Whisper, mel: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else attention would be left as openai-whisper's search needs it."""
    both, met, align = threading.Barrier(2), [], model.decoder.alignment

    def alignment(*given: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.3)
            met.append(threading.get_ident())
        return align(*given)

    monkeypatch.setattr(model.decoder, "alignment", alignment)
    tokenizer = get_tokenizer(True, num_languages=model.num_languages, language="en", task="transcribe")
    timed = partial(find_alignment, model, tokenizer, [2305, 307], mel, 1500)
    at_once(timed, timed)
    assert not met and MultiHeadAttention.use_sdpa


# ---- PyTorch's defaults ---------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


SET: dict[str, Callable[[], Any]] = {
    "float64": partial(default_dtype, torch.float64),
    "bfloat16": partial(default_dtype, torch.bfloat16),
    "torch.device": partial(torch.device, "meta"),
    "set_default_device": partial(default_device, "meta"),
}

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"beam_size": 2},
    "words": {"word_timestamps": True},
    "at random": {"temperature": 0.5, "best_of": 2},
    "language": {"language": None},
}


def options_of(way: str) -> dict[str, Any]:
    return {**SHORT, "logprob_threshold": None, **WAYS[way]}


@pytest.fixture(scope="module")
def usual(model: Whisper, audio: np.ndarray) -> dict[str, dict[str, Any]]:
    """Returns, by way to decode, the transcript with PyTorch's defaults as they are."""
    found = {}
    for way in WAYS:
        torch.manual_seed(0)
        found[way] = model.transcribe(audio, **options_of(way))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SET)
def test_defaults_of_the_program_change_no_transcript(
    model: Whisper, audio: np.ndarray, usual: dict[str, dict[str, Any]], name: str, way: str
) -> None:
    options, expected = options_of(way), usual[way]
    torch.manual_seed(0)
    with SET[name]():
        assert model.transcribe(audio, **options) == expected
        if (name, way) == ("bfloat16", "greedy"):
            assert dict(model.transcribe_many([audio, audio], 2, **options)) == {0: expected, 1: expected}


TOKENS, FOLLOWING = torch.tensor([[50258, 50259, 50359]]), torch.tensor([[50363]])


def used(model: Whisper, audio: np.ndarray, mel: torch.Tensor) -> list[Any]:
    """Returns what is computed by what a model has beside `transcribe`."""
    features = model.embed_audio(mel[None])
    cache, _ = model.install_kv_cache_hooks()
    logits = [model.decoder(given, features, kv_cache=cache) for given in (TOKENS, FOLLOWING)]
    options = DecodingOptions(fp16=False, language="en", sample_len=3)
    hook = model.decoder.ln.register_forward_hook(lambda *_: None)
    in_pytorch = model.logits(TOKENS, features)
    hook.remove()
    return [
        log_mel_spectrogram(audio).tolist(),
        features.tolist(),
        *(each.tolist() for each in (*logits, in_pytorch, model.logits(TOKENS, features))),
        model.decode(mel, options).tokens,
        model.detect_language(mel)[1],
    ]


@pytest.fixture(scope="module")
def computed(model: Whisper, audio: np.ndarray, mel: torch.Tensor) -> list[Any]:
    return used(model, audio, mel)


@pytest.mark.parametrize("name", SET)
def test_defaults_of_the_program_change_nothing_that_a_model_computes(
    model: Whisper, audio: np.ndarray, mel: torch.Tensor, computed: list[Any], name: str
) -> None:
    with SET[name]():
        assert used(model, audio, mel) == computed
        assert used(load_model(NANO), audio, mel) == computed
        read = load_checkpoint(NANO).tensors
    assert all(tensor.equal(read[each]) for each, tensor in load_checkpoint(NANO).tensors.items())


# ---- numba's cache --------------------------------------------------------------------------------------------------


def backtrace(trace: np.ndarray) -> np.ndarray:
    return trace


def dtw_cpu(x: np.ndarray) -> np.ndarray:
    """Has every token said in a frame of its own."""
    return np.stack((np.arange(x.shape[0]), np.arange(x.shape[0])))


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has word timestamps found by functions that numba, for which they are not compiled yet, compiles soon."""
    for function in (backtrace, dtw_cpu):
        monkeypatch.setattr(timing, function.__name__, numba.jit(nopython=True)(function))
    keep_alignment_compiled.cache_clear()
    yield
    keep_alignment_compiled.cache_clear()


def fails(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("method", ["__init__", "load_overload", "save_overload"])
def test_a_cache_that_does_not_work_is_done_without(
    search: None, model: Whisper, audio: np.ndarray, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(FunctionCache, "load_overload", lambda *_: None)
    monkeypatch.setattr(FunctionCache, method, fails)
    assert model.transcribe(audio, **SHORT, word_timestamps=True)["segments"][0]["words"]
    assert all(type(each._cache) is NullCache for each in (timing.dtw_cpu, timing.backtrace))


def test_words_are_timed_where_nothing_is_compiled(
    model: Whisper, audio: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NUMBA_DISABLE_JIT has it so: the functions are Python's then."""
    for name in ("backtrace", "dtw_cpu"):
        monkeypatch.setattr(timing, name, getattr(timing, name).py_func)
    keep_alignment_compiled.cache_clear()
    assert model.transcribe(audio, **SHORT, word_timestamps=True)["segments"][0]["words"]
    keep_alignment_compiled.cache_clear()
