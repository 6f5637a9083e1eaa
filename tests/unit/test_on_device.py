"""What a GPU executes, on a CPU: the same operations, but for the attention of many queries in float16 and bfloat16."""

import gc
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from max.driver import CPU, Buffer
from whisper import DecodingOptions
from whisper.audio import SAMPLE_RATE, pad_or_trim
from whisper.model import Whisper as OpenAIWhisper

import maxwhisper.compiled
from maxwhisper.audio import load_audio, log_mel_spectrogram
from maxwhisper.checkpoint import Checkpoint, load_checkpoint
from maxwhisper.compiled import rounded
from maxwhisper.decoding.cpu import SELECT_TOKENS
from maxwhisper.decoding.gpu import (
    MAX_CANDIDATES,
    SEARCH,
    STEPS_AT_ONCE,
    GPUStepper,
    search_program,
    step_program,
)
from maxwhisper.decoding.openai_loop import DecodingTask, MaxInference, first_tokens
from maxwhisper.decoding.rules import TOKEN_RULES, TokenRules, rules_program
from maxwhisper.decoding.stepper import Advanced, Texts
from maxwhisper.engine.program import Artifact
from maxwhisper.engine.session import Policy
from maxwhisper.errors import DecodingError
from maxwhisper.network.blocks import BLOCKS
from maxwhisper.whisper import Whisper, load_model
from reference.blocks import TWINS
from reference.chain import pytorch_logits
from reference.fixtures import NANO
from reference.judge import Comparison, judge
from reference.models import trained
from reference.perf.step import N_PAST, Case, measure, table
from reference.steps import SCENES, Scene, judge_steps
from reference.suite import Suite
from reference.windows import avg_logprob

from .test_decoding import (
    BEGIN,
    EOT,
    N_VOCAB,
    PROMPT,
    SAMPLE_BEGIN,
)
from .test_scheduling import SOME, recorded

# ---- blocks --------------------------------------------------------------------------------------------------------


PRODUCTS = ("encoder.stem", "encoder.mlp")
ATTENTION = ("encoder.attention", "decoder.attention.causal", "decoder.cross_attention.prefill")
ONE_QUERY = ("decoder.attention.cached", "decoder.cross_attention.step")
NIGHTLY = pytest.mark.nightly


class OfDevices(Policy):
    """The kernels of a GPU, on a CPU."""

    own_kernels = False


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float16, (*PRODUCTS, ONE_QUERY[-1])),
        pytest.param(torch.bfloat16, (*PRODUCTS, *ONE_QUERY), marks=NIGHTLY),
        pytest.param(torch.float32, (*PRODUCTS, *ATTENTION, *ONE_QUERY), marks=NIGHTLY),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "",
)
def test_blocks_pass_the_judge(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """By the graphs of a GPU, which in bfloat16 round a product before its bias is added. Many queries attend by a
    kernel that only GPUs have, but in float32."""
    suite = Suite(trained(), dtype)
    blocks = [BLOCKS[name] for name in names]
    policy = OfDevices(**vars(suite.policy))
    artifact = Artifact("as on a GPU", [block.program(suite.dims, policy) for block in blocks], "cpu")
    for block in blocks:
        for comparison in suite.comparisons(block, ["speech"]):
            layer = comparison.layer
            layers = {"audio_layer": min(layer, suite.dims.n_audio_layer - 1), "text_layer": layer}
            judgement = suite.judge(comparison, artifact.init(suite.subject.tensors, **layers)[block.name])
            assert judgement.passed, f"\n{judgement}"


# ---- whole texts ---------------------------------------------------------------------------------------------------


def on_device(checkpoint: Checkpoint, dtype: str = "float32") -> Whisper:
    """Returns a model on the CPU that decodes as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            maxwhisper.compiled,
            "stepper_programs",
            lambda *of: [rules_program(), step_program(*of), search_program(*of)],
        )
        model = Whisper(rounded(checkpoint, dtype), dtype=dtype)
        assert model.decoder.network[SELECT_TOKENS]  # compiled while patched
    return model.stepping_by(GPUStepper(model.network, model.dims, CPU()))


def stepper_of(model: Whisper) -> GPUStepper:
    assert isinstance(model.stepper, GPUStepper)
    return model.stepper


@pytest.fixture(scope="module")
def model() -> Whisper:
    return on_device(load_checkpoint(NANO))


@pytest.fixture(scope="module")
def usual() -> Whisper:
    return load_model(NANO)


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    """Returns one of several windows, one in German, and one without speech."""
    return [recorded(clip) for clip in SOME if clip.stem in ("english-long", "german-1", "silence")]


@pytest.fixture(scope="module")
def judged(pytestconfig: pytest.Config) -> Suite:
    """Returns what judges steps, with a memory for its verdicts."""
    return Suite(trained(), torch.float32, memory=getattr(pytestconfig, "cache", None))


Alone = Callable[[int | None], list[dict[str, Any]]]
"""From a number of beams to each recording's transcript, one after the other."""


@pytest.fixture(scope="module")
def alone(model: Whisper, recordings: list[np.ndarray]) -> Alone:
    return cache(
        lambda beam_size: [model.transcribe(each, temperature=0.0, beam_size=beam_size) for each in recordings]
    )


def texts(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(s["start"], s["end"], s["tokens"], s["no_speech_prob"]) for s in result["segments"]]


AT_NIGHT = pytest.param(2, marks=pytest.mark.nightly)  # what stands in its place is `test_steps_pass_the_judge`
BEAMS = pytest.mark.parametrize("beam_size", [None, AT_NIGHT])


def test_transcripts_of_threads_that_share_a_model(model: Whisper, heard: torch.Tensor) -> None:
    options = DecodingOptions(language="en", sample_len=6, fp16=False)
    found = lambda features: [(each.tokens, each.avg_logprob) for each in model.decode(features, options)]  # noqa: E731
    windows = [heard[:1], heard[1:2]] * 2
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(found, windows)) == [found(each) for each in windows[:2]] * 2


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_steps_pass_the_judge(model: Whisper, judged: Suite, scene: Scene) -> None:
    judgement = judge_steps(judged, model.stepper, scene, ", on a device")
    assert judgement.passed, str(judgement)


@BEAMS
def test_transcripts(alone: Alone, usual: Whisper, recordings: list[np.ndarray], beam_size: int | None) -> None:
    """Each is of several windows, which follow each other in the same memory."""
    for audio, ours in zip(recordings, alone(beam_size), strict=True):
        assert texts(ours) == texts(usual.transcribe(audio, temperature=0.0, beam_size=beam_size))
    assert [bool(each["text"]) for each in alone(beam_size)] == [True, True, False]
    assert any(len({segment["seek"] for segment in each["segments"]}) > 1 for each in alone(beam_size))


@pytest.mark.nightly
def test_float16(usual: Whisper) -> None:
    """It is rounded to other texts in the end, but not to many."""
    rounded_model = on_device(load_checkpoint(NANO), "float16")
    ours, theirs = (
        [each.transcribe(clip, temperature=0.0)["text"] for clip in SOME] for each in (rounded_model, usual)
    )
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= len(SOME) - 1


@pytest.mark.parametrize(("batch_size", "beam_size"), [(2, None), pytest.param(3, 2, marks=pytest.mark.nightly)])
def test_together_as_alone(
    model: Whisper, alone: Alone, recordings: list[np.ndarray], batch_size: int, beam_size: int | None
) -> None:
    """Texts of different lengths, in memory that others have left."""
    together = dict(model.transcribe_many(recordings, batch_size, temperature=0.0, beam_size=beam_size))
    assert together == dict(enumerate(alone(beam_size)))


def waveforms(n: int) -> list[np.ndarray]:
    audio = load_audio(SOME[1])
    return [pad_or_trim(audio[i * SAMPLE_RATE :]) for i in range(n)]


@pytest.fixture(scope="module")
def heard(usual: Whisper) -> torch.Tensor:
    """Returns the audio features of four windows, which a decode takes as well as the mels."""
    return torch.cat([usual.embed_audio(log_mel_spectrogram(audio, 80)[None]) for audio in waveforms(4)])


def test_windows_of_a_batch_as_alone(model: Whisper, usual: Whisper, heard: torch.Tensor) -> None:
    """Batches differ from those before, and windows for as many texts do too: there is room for each."""
    for n, beam_size, sample_len in ((1, 3, 6), (3, None, 6), (1, 3, 6), (1, None, 6), (2, None, None)):
        options = DecodingOptions(language="en", beam_size=beam_size, sample_len=sample_len, fp16=False)
        ours, theirs = (each.decode(heard[:n], options) for each in (model, usual))
        assert [each.tokens for each in ours] == [each.tokens for each in theirs]
    task, suite = DecodingTask(usual, options), Suite(trained(), torch.float32)
    comparison = Comparison("fixture", torch.float32, "avg_logprob", 0, "2 windows")
    oracle, peer = (
        [torch.cat([average(*of, task, audio, each.tokens) for audio, each in zip(waveforms(n), ours, strict=True)])]
        for of in ((suite.model.oracle, torch.float64), (suite.peer, torch.float32))
    )
    for some in (ours, theirs):
        found = judge(
            *(comparison, oracle, peer, [torch.tensor([each.avg_logprob for each in some])]),
            longest_reduction=N_VOCAB,
            roundings=TWINS["decoder.prefill"].roundings(suite.dims),
        )
        assert found.passed, f"\n{found}"


@torch.no_grad()
def average(
    network: OpenAIWhisper, dtype: torch.dtype, task: DecodingTask, audio: np.ndarray, tokens: list[int]
) -> torch.Tensor:
    """Returns the avg_logprob that PyTorch's network gives to a text of a window, (1,), computed in the dtype."""
    text = torch.tensor([[*task.initial_tokens, *tokens, EOT]])
    logits = pytorch_logits(network, torch.from_numpy(audio), text, dtype)[0]
    return avg_logprob(task, tokens, logits)


@pytest.mark.nightly
def test_a_text_that_fills_the_cache(model: Whisper, usual: Whisper, heard: torch.Tensor) -> None:
    """Behind as long a prompt as there can be."""
    prompt = list(range(1000, 1223))
    options = DecodingOptions(language="en", prompt=prompt, suppress_tokens=[EOT], sample_len=500, fp16=False)
    ours, theirs = (each.decode(heard[:2], options) for each in (model, usual))
    assert [each.tokens for each in ours] == [each.tokens for each in theirs]
    assert {len(each.tokens) for each in ours} == {model.dims.n_text_ctx + 1 - SAMPLE_BEGIN - 1 - len(prompt)}


def test_as_many_tokens_as_asked_for(model: Whisper, heard: torch.Tensor) -> None:
    """Each text has its own number, and none where none are wanted, or where it has ended."""
    inference, start = MaxInference(model, SAMPLE_BEGIN), torch.tensor([PROMPT] * 4)
    logits = inference.start(start, heard, 0)[1]
    known = TokenRules(N_VOCAB, SAMPLE_BEGIN, EOT)
    now = first_tokens(model.network[TOKEN_RULES], known, logits, start, torch.zeros(4), 1).texts
    now.tokens[3, -1] = EOT
    n_token = torch.tensor([0, 1, STEPS_AT_ONCE + 1, 5])
    then = inference.advance(now, known.inputs(now.tokens, 1), n_token).texts
    assert (then.lengths - now.lengths).tolist() == [0, 1, STEPS_AT_ONCE, 0]
    assert then.tokens[[0, 3], now.lengths[0] :].eq(EOT).all()
    assert then.totals[[0, 3]].equal(now.totals[[0, 3]]) and (then.totals < now.totals).tolist()[1:3] == [True, True]


def test_a_text_goes_no_further_than_what_is_not_finite(model: Whisper, heard: torch.Tensor) -> None:
    """Else later tokens would hide it."""
    inference, start = MaxInference(model, SAMPLE_BEGIN), torch.tensor([PROMPT] * 3)
    inference.start(start, heard[:3], 0)
    cache = stepper_of(model)._in_slots(inference.cache)
    rules, one = TokenRules(N_VOCAB, SAMPLE_BEGIN, EOT).inputs(start, 1), torch.ones(3, dtype=torch.int64)
    steps = stepper_of(model)._steps(cache, rules)
    steps.here["latest"].copy_(torch.tensor([float("nan"), -float("inf"), -1.0]))
    found = steps.take(Texts.of(start, torch.zeros(3)), cache, rules, one, n_step=1)
    steps.here["latest"].zero_()
    assert (found["lengths"] - SAMPLE_BEGIN).tolist() == [0, 0, 1]
    assert found["latest"].isfinite().tolist() == [False, False, True]


# ---- capture and replay --------------------------------------------------------------------------------------------


class Captured:
    """A graph as a GPU has it: a replay works on what was captured, whatever it is given, and returns nothing."""

    def __init__(self, model: Any, fails: bool = False):
        self.model, self.fails = model, fails
        self.captured: dict[int, Sequence[Buffer]] = {}
        self.calls: Counter[str] = Counter()

    def execute(self, *given: Buffer) -> list[Buffer]:
        self.calls["execute"] += 1
        return self.model.execute(*given)

    def capture(self, key: int, *given: Buffer) -> list[Buffer]:
        if self.fails:
            raise RuntimeError("an operation waits for the device")
        assert key not in self.captured
        self.captured[key] = given
        return []

    def replay(self, key: int, *given: Buffer) -> None:
        assert len(given) == len(self.captured[key])
        self.calls["replay"] += 1
        self.model.execute(*self.captured[key])

    def debug_verify_replay(self, key: int, *given: Buffer) -> None:
        self.model.execute(*given)
        self.calls["verify"] += 1

    def release_captured_graph(self, key: int) -> None:
        del self.captured[key]


def on_a_gpu(model: Whisper, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> tuple[Whisper, list[Captured]]:
    """Returns the model with graphs that are captured."""
    monkeypatch.setattr("maxwhisper.engine.repeated.on_gpu", lambda _: True)
    graphs = {name: model.network[name] for name in (SELECT_TOKENS, SEARCH)}
    graphs = {name: replace(graph, model=Captured(graph.model, fails)) for name, graph in graphs.items()}
    stepping = model.stepping_by(GPUStepper(graphs, model.dims, CPU()))
    return stepping, [graph.model for graph in graphs.values()]


def decoded(
    model: Whisper, heard: torch.Tensor, options: DecodingOptions, *batches: int
) -> list[tuple[list[int], float]]:
    """Returns texts and log-probabilities of batches of so many windows, one after the other."""
    found = [each for n in batches for each in model.decode(heard[:n], options)]
    return [(each.tokens, each.avg_logprob) for each in found]


@pytest.mark.parametrize(("number", "beam_size"), [(0, None), (1, 2)])
def test_a_step_is_captured_once_and_replayed(
    model: Whisper, heard: torch.Tensor, monkeypatch: pytest.MonkeyPatch, number: int, beam_size: int | None
) -> None:
    """What it reads and writes is in the same memory at every step, of one window and of the next, and of others."""
    options = DecodingOptions(language="en", beam_size=beam_size, sample_len=5, fp16=False)
    expected = decoded(model, heard, options, 1, 2, 1)
    gpu, captured = on_a_gpu(model, monkeypatch)
    assert decoded(gpu, heard, options, 1, 2, 1) == expected
    of_graph = captured[number]
    n_made = 3 if beam_size is None else 1  # windows with beams are decoded one after the other
    assert of_graph.calls["execute"] == n_made and of_graph.calls["replay"] > 8
    assert not captured[1 - number].calls
    assert len(of_graph.captured) == stepper_of(gpu).verify() == of_graph.calls["verify"] == 1
    del gpu
    gc.collect()
    assert not of_graph.captured, "what was captured is released with the memory that it works in"


def test_what_cannot_be_captured_is_executed(
    model: Whisper, heard: torch.Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = DecodingOptions(language="en", sample_len=5, fp16=False)
    expected = decoded(model, heard, options, 1)
    gpu, (captured, _) = on_a_gpu(model, monkeypatch, fails=True)
    assert decoded(gpu, heard, options, 1) == expected
    assert captured.calls["execute"] == 5 and not captured.calls["replay"]
    assert "decoder.select_tokens is not captured" in caplog.text and "waits for the device" in caplog.text
    with pytest.raises(RuntimeError, match="is not captured"):
        stepper_of(gpu).verify()


def test_a_step_is_timed_beside_the_time_to_read_what_it_has_to(model: Whisper) -> None:
    """On a CPU, a rehearsal, which says what it does not measure."""
    timing = measure(model.network, model.dims, Case(), CPU(), torch.float32, rate=1e9, rounds=1)
    assert timing.host is timing.device is timing.executed_device is timing.launches is None
    assert timing.step > 0 and timing.executed_host > 0 and not timing.captured
    assert table([timing]).splitlines()[-1].count("not measured") == 5
    dims, tensors = model.dims, load_checkpoint(NANO).tensors
    read = [name for name in tensors if re.match(r"decoder(?!.*(cross_attn\.(key|value)|positional))", name)]
    weights = sum(x.numel() * (2 if x.ndim > 1 else 4) for x in map(tensors.get, read))
    weights += 4 * dims.n_text_state * dims.n_text_layer  # what takes the place of the bias that keys have none of
    kv = 2 * dims.n_text_layer * dims.n_text_state * (dims.n_audio_ctx + N_PAST) * 4
    assert timing.floor == (weights + kv) / 1e3


@pytest.fixture(scope="module")
def not_finite() -> Whisper:
    """Returns a model which is so at a position behind the start, which nothing else looks at."""
    checkpoint = load_checkpoint(NANO)
    positions = checkpoint.tensors["decoder.positional_embedding"].clone()
    positions[SAMPLE_BEGIN + 2] = float("nan")
    return on_device(replace(checkpoint, tensors={**checkpoint.tensors, "decoder.positional_embedding": positions}))


@BEAMS
def test_what_is_not_finite_is_an_error(not_finite: Whisper, heard: torch.Tensor, beam_size: int | None) -> None:
    with pytest.raises(DecodingError, match="not finite"):
        not_finite.decode(heard[:1], DecodingOptions(language="en", beam_size=beam_size, fp16=False))


def test_beams_that_are_looked_at_now_and_then(
    model: Whisper, heard: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search has done to texts, sums and rows is what the next steps go on from, of every beam."""
    found: list[Texts] = []

    class Recorded(GPUStepper):
        def advance(self, *given: Any) -> Advanced:
            advanced = super().advance(*given)
            found.append(advanced.texts)
            return advanced

    recorded = model.stepping_by(Recorded(model.network, model.dims, CPU()))
    for n_step in (7, 3, 1):
        monkeypatch.setattr("maxwhisper.decoding.gpu.STEPS_AT_ONCE", n_step)
        recorded.decode(heard[:1], DecodingOptions(language="en", beam_size=5, sample_len=7, fp16=False))
        assert all(map(torch.equal, found[-1], found[0]))


@pytest.mark.parametrize("beam_size", [MAX_CANDIDATES - 1, MAX_CANDIDATES])
def test_as_many_beams_as_there_are_candidates_for_and_more(
    model: Whisper, usual: Whisper, heard: torch.Tensor, beam_size: int
) -> None:
    options = DecodingOptions(language="en", beam_size=beam_size, sample_len=8, fp16=False)
    (ours,), (theirs,) = (each.decode(heard[:1], options) for each in (model, usual))
    assert ours.tokens == theirs.tokens


def test_a_text_that_left_something_not_finite_does_no_harm_to_the_next(model: Whisper, heard: torch.Tensor) -> None:
    options = DecodingOptions(language="en", sample_len=6, fp16=False)
    before = decoded(model, heard, options, 1)
    for left in (float("nan"), float("inf")):
        for kv in stepper_of(model).of_thread.slots.own:
            kv.fill_(left)
        assert decoded(model, heard, options, 1) == before


@BEAMS
def test_where_the_rules_leave_no_token_for_once(
    model: Whisper, usual: Whisper, heard: torch.Tensor, beam_size: int | None
) -> None:
    """All text is suppressed, and behind the first timestamp there must be some; later, timestamps again."""
    options = DecodingOptions(language="en", suppress_tokens=[*range(BEGIN)], beam_size=beam_size, fp16=False)
    for each in (model, usual):
        with pytest.raises(DecodingError, match="exclude every token"):
            each.decode(heard[:1], options)
