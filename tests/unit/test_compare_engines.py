"""The engines of `maxwhisper compare`, each in its process, and those of a GPU as far as they show without one."""

import importlib
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import whisper

from maxwhisper.audio import SAMPLE_RATE, load_audio
from maxwhisper.batched import transcribe_batched
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.children import python_path
from maxwhisper.compare import convert
from maxwhisper.compare.engines import REFERENCE, SUBJECT, Engine, Spec, Task, openai_like, rows
from maxwhisper.compare.engines import maxwhisper as maxwhisper_engine
from maxwhisper.compare.engines.on_pytorch import OnPyTorch
from maxwhisper.compare.material import recordings
from maxwhisper.compare.process import EngineError, Worker, awake
from maxwhisper.compare.tokens import task_for
from maxwhisper.compare.worker import Requests, answer
from reference.fixtures import NANO

from .engines import CLIP, LONG, named, require

# ---- the engines, each in its process ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Path:
    return convert.store(load_checkpoint(NANO))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Writes files with the samples of the clip and its spectrogram."""
    audio = load_audio(CLIP)
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(audio)).numpy()
    scratch = tmp_path_factory.mktemp("compare")
    np.save(scratch / "audio.npy", audio)
    np.save(scratch / "mel.npy", mel)
    return str(scratch / "audio.npy"), str(scratch / "mel.npy")


@pytest.fixture(scope="module")
def spoken() -> list[int]:
    """Returns the text tokens that PyTorch Whisper finds in the clip."""
    result = whisper.load_model(str(NANO), "cpu").transcribe(
        load_audio(CLIP), language="en", temperature=0.0, fp16=False
    )
    return [token for segment in result["segments"] for token in segment["tokens"] if token < 50257]


class Here:
    """An engine in this process, in the place of a worker."""

    def __init__(self, spec: Spec, folder: Path, task: Task):
        self.requests = Requests(spec.name, folder, task)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        return answer(getattr(self.requests, do), arguments)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("spec", rows(None, "cpu"), ids=lambda spec: spec.name)
def test_an_engine_finds_what_pytorch_whisper_finds(
    spec: Spec, folder: Path, material: tuple[str, str], spoken: list[int]
) -> None:
    require(spec)
    audio, mel = material
    # One row of ours in a process shows it for all, and of PyTorch, which is here.
    start = Here if spec.engine == REFERENCE or (spec.engine == SUBJECT and spec.variant) else Worker
    worker = start(spec, folder, task_for(load_checkpoint(NANO).dims, None, 2))
    try:
        worker.ask("prepare")
        assert worker.ask("load")["seconds"] > 0
        answer = worker.ask("transcribe", audio=audio, language="en")
        times = [piece["seconds"] for piece in answer["pieces"]]
        assert times == sorted(times) and 0 < times[-1] <= answer["seconds"]
        tokens = [token for piece in answer["pieces"] for token in piece["tokens"]]
        assert [token for token in tokens if token < 50257] == spoken
        assert worker.ask("encode", mel=mel)["seconds"] > 0
        one, more = (worker.ask("generate", n_tokens=count)["tokens"] for count in (1, 20))
        assert len(more) == 20 and 50257 not in more
        # Without timestamps and without an end: the text first, which is shorter than this.
        assert one == more[:1] == spoken[:1]
        assert more[: len(spoken)] == spoken
        assert worker.ask("memory")["bytes"] > 5e7
    finally:
        worker.close()


def transcribed(engine: Engine, audio: np.ndarray) -> list[int]:
    tokens: list[int] = []
    engine.transcribe(audio, "en", tokens.extend)
    return tokens


def adapter(spec: Spec, folder: Path, batch_size: int) -> Engine:
    """Returns the engine of a row, in this process."""
    require(spec)
    task = replace(task_for(load_checkpoint(NANO).dims, None, 2), batch_size=batch_size)
    engine = Requests(spec.name, Path(), task).make()
    engine.load(convert.convert(spec.conversion, folder))
    return engine


@pytest.mark.parametrize("spec", [spec for spec in rows(None, "cpu") if spec.batched], ids=lambda spec: spec.name)
def test_a_window_has_the_same_tokens_in_a_batch(spec: Spec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = adapter(spec, folder, 2)
    mels = recordings([str(LONG)], None)[0].windows(80)
    alone = [engine.generate(engine.encode(mel), 12) for mel in mels]
    decoded: Any = engine.decoded  # type: ignore[attr-defined]
    batches = []
    monkeypatch.setattr(engine, "decoded", lambda *given: batches.append(decoded(*given)) or batches[-1])
    assert engine.windows(mels, 12) == alone
    assert [len(batch) for batch in batches] == [2, 1]


def test_maxwhisper_batched_is_transcribe_batched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = adapter(named("maxwhisper batched"), folder, 4)
    audio = load_audio(LONG)[: 33 * SAMPLE_RATE]
    segments = transcribe_batched(engine.model, audio, language="en", temperature=0.0)["segments"]
    watched = Mock(wraps=transcribe_batched)
    monkeypatch.setattr(maxwhisper_engine, "transcribe_batched", watched)
    assert transcribed(engine, audio) == [token for segment in segments for token in segment["tokens"]]
    assert watched.call_args.args[2] == 4


def test_faster_whisper_batched_cuts_long_audio_elsewhere(folder: Path) -> None:
    sequential, batched = (adapter(named(f"faster-whisper {mode}"), folder, 4) for mode in ("float32", "batched"))
    audio, pipeline = load_audio(LONG), cast(Any, batched).pipeline
    pipeline.transcribe = Mock(wraps=pipeline.transcribe)
    whole, pieces = (transcribed(engine, audio) for engine in (sequential, batched))
    assert pieces != whole and pipeline.transcribe.call_args.kwargs["batch_size"] == 4
    # With timestamps, as all engines: the text of the first sentence is between two.
    first = next(i for i, token in enumerate(pieces[1:], 1) if token >= 50364)
    assert pieces[0] >= 50364 and pieces[1:first] == whole[1:first]


def test_a_process_that_fails_or_ends_is_an_error_of_one_line(tmp_path: Path) -> None:
    worker = Worker(named("openai-whisper"), tmp_path, task_for(load_checkpoint(NANO).dims, None, 1))
    try:
        with pytest.raises(EngineError, match=r"^FileNotFoundError: .*no-audio.npy'$"):
            worker.ask("transcribe", audio="no-audio.npy", language="en")
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(EngineError, match="its process ended with status -9"):
            worker.ask("load")
    finally:
        worker.close()


def test_no_file_of_the_folder_stands_in_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As whisper.py of the user's own would: modules are found as in this process."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "{\\"path\\": \\"$PYTHONPATH\\", \\"option\\": \\"$1\\"}"')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with closing(Worker(named("openai-whisper"), tmp_path, task_for(load_checkpoint(NANO).dims, None, 1))) as worker:
        assert worker.answer() == {"path": python_path(), "option": "-P"}


def state_of(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_is_stopped_when_its_turn_is_over(folder: Path) -> None:
    worker = Worker(named("openai-whisper"), folder, task_for(load_checkpoint(NANO).dims, None, 1))
    try:
        for _ in range(2):
            with awake(worker.process):
                assert worker.ask("memory")["bytes"] > 0
            deadline = time.monotonic() + 10  # a signal takes its time
            while state_of(worker.process.pid) != "T":
                assert time.monotonic() < deadline
    finally:
        worker.close()


# ---- the engines of a GPU, as far as they show without one ----------------------------------------------------------


def on_gpu(name: str) -> Any:
    """Returns the engine of a row, not loaded."""
    spec = named(name)
    require(spec)
    task = task_for(load_checkpoint(NANO).dims, None, 2, "gpu")
    return Requests(spec.name, Path(), task).make()


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's engines stay on the CPU."""
    assert on_gpu("openai-whisper").device == torch.device("cuda")
    monkeypatch.setattr(OnPyTorch, "device", torch.device("cpu"))


def test_rows_of_each_device() -> None:
    ours = ["maxwhisper", "maxwhisper bfloat16"]
    assert [spec.name for spec in rows(None, "cpu")] == [
        *(*ours, "maxwhisper batched", "openai-whisper"),
        *("faster-whisper float32", "faster-whisper int8", "faster-whisper batched", "transformers", "whisper.cpp"),
        *("openvino float32", "openvino bfloat16", "onnxruntime"),
    ]
    ours += ["maxwhisper float16", "maxwhisper float16 batched"]
    assert [spec.name for spec in rows(None, "gpu")] == [
        *(*ours, "openai-whisper", "openai-whisper float16"),
        *("faster-whisper float16", "faster-whisper float16 batched", "transformers float16"),
    ]
    assert [spec.name for spec in rows(["transformers"], "gpu")] == [*ours, "transformers float16"]


@pytest.mark.parametrize("variant", ["", "float16"])
def test_openai_whisper_on_a_gpu(variant: str, folder: Path, no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    engine = on_gpu(f"openai-whisper {variant}".strip())
    engine.load(folder / "openai")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert next(engine.model.parameters()).dtype == torch.float32
    features = engine.encode(np.zeros((80, 3000), np.float32))
    assert features.dtype == (torch.float16 if variant else torch.float32)
    assert len(engine.generate(features, 3)) == 3  # which refuses features of another dtype than its options'
    given: dict[str, Any] = {}
    monkeypatch.setattr(openai_like, "transcribe", lambda model, audio, **options: given.update(options))
    transcribed(engine, np.zeros(16000, np.float32))
    assert given["fp16"] == bool(variant)


@pytest.mark.parametrize("name", ["faster-whisper float16", "faster-whisper float16 batched"])
def test_faster_whisper_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_gpu(name)
    module = importlib.import_module("maxwhisper.compare.engines.faster_whisper")
    model, load = Mock(), Mock()
    sets = [Mock(major=major, usable=usable) for major, usable in ((13, True), (12, False), (12, True))]
    for attribute, value in {"WhisperModel": model, "load": load, "find": lambda _: sets}.items():
        monkeypatch.setattr(module, attribute, value)
    engine.load(Path("there"))
    assert model.call_args.args == ("there",)
    assert {"device": "cuda", "compute_type": "float16"}.items() <= model.call_args.kwargs.items()
    load.assert_called_once_with(sets[2])
    assert engine.event() is None


def test_transformers_on_a_gpu(folder: Path, no_cuda: None, spoken: list[int]) -> None:
    engine = on_gpu("transformers float16")
    engine.load(convert.convert("hugging-face", folder))
    assert engine.model.dtype == torch.float16
    engine.model._prepare_static_cache = made = Mock(wraps=engine.model._prepare_static_cache)
    tokens = transcribed(engine, load_audio(CLIP))
    assert [token for token in tokens if token < 50257] == spoken
    assert made.call_count == 1
    assert len(engine.generate(engine.encode(np.zeros((80, 3000), np.float32)), 3)) == 3
    assert made.call_count == 2


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float16 batched", "float16")],
)
def test_maxwhisper_on_a_gpu(variant: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model = Mock()
    monkeypatch.setattr(maxwhisper_engine, "load_model", load_model)
    on_gpu(f"maxwhisper {variant}".strip()).load(Path("there"))
    load_model.assert_called_once_with(Path("there/model.pt"), "gpu", artifacts=None, dtype=dtype)


def test_events_are_on_the_queue_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    device, of_max, of_torch, synchronize = Mock(), Mock(), Mock(), Mock()
    monkeypatch.setattr(maxwhisper_engine, "find_device", {"gpu": device}.get)
    monkeypatch.setattr(maxwhisper_engine, "DeviceEvent", of_max)
    monkeypatch.setattr(torch.cuda, "Event", of_torch)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    ours, theirs = on_gpu("maxwhisper"), on_gpu("openai-whisper")
    assert ours.event() == of_max.return_value and theirs.event() == of_torch.return_value
    of_max.assert_called_once_with(device, enable_timing=True)
    device.default_queue.record_event.assert_called_once_with(of_max.return_value)
    of_torch.assert_called_once_with(enable_timing=True)
    of_torch.return_value.record.assert_called_once_with()
    ours.synchronize()
    device.synchronize.assert_called_once_with()
    theirs.synchronize()
    assert synchronize.call_count == 2, "maxwhisper computes in PyTorch too"


def test_a_time_ends_when_the_device_is_done(folder: Path) -> None:
    steps: list[str] = []
    event = Mock(elapsed_time=Mock(return_value=250.0))
    requests = Requests("openai-whisper", folder, task_for(load_checkpoint(NANO).dims, None, 2))
    requests.engine = Mock(
        event=lambda: steps.append("event") or event,
        generate=lambda features, n_tokens: steps.append("generate") or [1] * n_tokens,
        synchronize=lambda: steps.append("synchronize"),
    )
    requests.features = None
    found = requests.generate(2)
    assert steps == ["event", "generate", "event", "synchronize"]
    assert (found["tokens"], found["device_seconds"]) == ([1, 1], 0.25)
    requests.engine.event = lambda: None
    assert requests.generate(2).keys() == {"tokens", "seconds"}
