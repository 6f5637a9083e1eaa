"""What a GPU executes, on a CPU: the same operations, but for the attention of many queries in float16 and bfloat16."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from max.driver import CPU
from max.dtype import DType
from max.graph import DeviceRef, TensorType
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
    STEPS_AT_ONCE,
    GPUStepper,
    candidates_program,
    log_probabilities,
    step_program,
)
from maxwhisper.decoding.openai_loop import DecodingTask, MaxInference, first_tokens
from maxwhisper.decoding.rules import TOKEN_RULES, NoWeights, TokenRules, rules_program
from maxwhisper.engine.program import Artifact, Executable, Program
from maxwhisper.errors import DecodingError
from maxwhisper.network.blocks import BLOCKS
from maxwhisper.whisper import Whisper, load_model
from reference.blocks import TWINS
from reference.chain import pytorch_logits
from reference.fixtures import NANO
from reference.judge import Comparison, judge
from reference.models import trained
from reference.steps import SCENES, Scene, judge_steps
from reference.suite import Suite
from reference.windows import avg_logprob

from .test_decoding import (
    BEGIN,
    EOT,
    N_VOCAB,
    OPTIONS,
    PROMPT,
    SAMPLE_BEGIN,
    check,
    filtered,
    filters,
    histories,
    random_logits,
)
from .test_together import SOME


@cache
def rules() -> Executable:
    """`log_probabilities` alone."""
    cpu = DeviceRef.CPU()
    inputs = {
        "logits": TensorType(DType.float32, ["batch", "vocab"], cpu),
        "texts": TensorType(DType.int64, ["batch", "capacity"], cpu),
        "lengths": TensorType(DType.int64, ["batch"], cpu),
        "begins": TensorType(DType.int64, ["batch"], cpu),
        "suppressed": TensorType(DType.bool, ["vocab"], cpu),
        "limits": TensorType(DType.int64, [2], cpu),
    }
    program = Program("rules", "", NoWeights(), lambda _, *given: [log_probabilities(*given)], inputs)
    return Artifact("rules by MAX's operations", [program], "cpu").init({})["rules"]


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, chosen: list) -> torch.Tensor:
    """Of every next token; behind the texts stands what no rule may look at."""
    known = TokenRules.of(chosen, N_VOCAB, SAMPLE_BEGIN, EOT)
    assert known is not None
    given = known.inputs(tokens, 1)
    texts = torch.nn.functional.pad(tokens, (0, 3), value=N_VOCAB - 1)
    lengths = torch.full((len(tokens),), tokens.shape[1])
    (found,) = rules()(logits, texts, lengths, given.begins, given.suppressed, given.limits)
    return found


@settings(max_examples=100, deadline=None)
@given(sampled=histories(n_text=3), **OPTIONS)
def test_log_probabilities_are_openais(sampled, seed, lean, **options) -> None:  # noqa: ANN001, ANN003
    logits, chosen = random_logits(3, seed, lean), filters(**options)
    tokens = torch.tensor([PROMPT + each for each in sampled])
    left = filtered(logits, tokens, chosen)
    ours, theirs = logprobs(logits, tokens, chosen), left.log_softmax(1)
    possible = theirs.isfinite()
    assert ours.isfinite().equal(possible)
    check(lambda given: [given["logits"].log_softmax(1)[possible]], left, ours[possible], theirs[possible])


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
def test_log_probabilities_tell_that_nothing_can_be_picked(value: float) -> None:
    assert not logprobs(torch.full((1, N_VOCAB), value), torch.tensor([PROMPT]), []).isfinite().any()


def test_a_single_logit_that_is_nan_tells_so_too() -> None:
    logits = torch.zeros(1, N_VOCAB)
    logits[0, 70] = float("nan")
    assert not logprobs(logits, torch.tensor([PROMPT]), []).isfinite().any()


# ---- blocks --------------------------------------------------------------------------------------------------------


PRODUCTS = ("encoder.stem", "encoder.mlp")
ATTENTION = ("encoder.attention", "decoder.attention.causal", "decoder.cross_attention.prefill")
ONE_QUERY = ("decoder.attention.cached", "decoder.cross_attention.step")
NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float16, (*PRODUCTS, ONE_QUERY[-1])),
        pytest.param(torch.bfloat16, (*PRODUCTS, *ONE_QUERY), marks=NIGHTLY),
        pytest.param(torch.float32, (*PRODUCTS, *ATTENTION, *ONE_QUERY), marks=NIGHTLY),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "",
)
def test_blocks_pass_the_judge(dtype: torch.dtype, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the graphs of a GPU, which in bfloat16 round a product before its bias is added. Many queries attend by a
    kernel that only GPUs have, but in float32."""
    suite = Suite(trained(), dtype)
    blocks = [BLOCKS[name] for name in names]
    with monkeypatch.context() as patch:
        for module in ("backends", "products"):
            patch.setattr(f"maxwhisper.network.{module}.own_kernels", lambda _: False)
        artifact = Artifact("as on a GPU", [block.program(suite.dims, suite.policy) for block in blocks], "cpu")
    for block in blocks:
        for comparison in suite.comparisons(block, ["speech"]):
            layer = comparison.layer
            layers = {"audio_layer": min(layer, suite.dims.n_audio_layer - 1), "text_layer": layer}
            judgement = suite.judge(comparison, artifact.init(suite.subject.tensors, **layers)[block.name])
            assert judgement.passed, f"\n{judgement}"


# ---- whole texts ---------------------------------------------------------------------------------------------------


def on_device(checkpoint: Checkpoint, dtype: str = "float32") -> Whisper:
    """A model on the CPU that decodes as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            maxwhisper.compiled,
            "stepper_programs",
            lambda *of: [rules_program(), step_program(*of), candidates_program(*of)],
        )
        model = Whisper(rounded(checkpoint, dtype), dtype=dtype)
        assert model.decoder.network[SELECT_TOKENS]  # compiled while patched
    return model.stepping_by(GPUStepper(model.network, model.dims, CPU()))


@pytest.fixture(scope="module")
def model() -> Whisper:
    return on_device(load_checkpoint(NANO))


@pytest.fixture(scope="module")
def usual() -> Whisper:
    return load_model(NANO)


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    """Of one window and, cut to its second one, of several."""
    return [load_audio(clip)[: 33 * SAMPLE_RATE] for clip in SOME]


@pytest.fixture(scope="module")
def judged(pytestconfig: pytest.Config) -> Suite:
    """What judges steps, with a memory for its verdicts."""
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


def test_transcripts_of_threads_that_share_a_model(model: Whisper) -> None:
    options = {"temperature": 0.0, "language": "en", "sample_len": 6}
    alone = [model.transcribe(clip, **options) for clip in SOME[:2]]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda clip: model.transcribe(clip, **options), SOME[:2])) == alone


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_steps_pass_the_judge(model: Whisper, judged: Suite, scene: Scene) -> None:
    judgement = judge_steps(judged, model.stepper, scene, ", on a device")
    assert judgement.passed, str(judgement)


@BEAMS
def test_transcripts(alone: Alone, usual: Whisper, recordings: list[np.ndarray], beam_size: int | None) -> None:
    """Of several windows each, which follow each other in the same memory."""
    for clip, audio, ours in zip(SOME, recordings, alone(beam_size), strict=True):
        theirs = usual.transcribe(audio, temperature=0.0, beam_size=beam_size)
        assert texts(ours) == texts(theirs) and (texts(ours) or clip.stem == "silence")
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


def windows(n: int) -> torch.Tensor:
    return torch.stack([log_mel_spectrogram(audio, 80) for audio in waveforms(n)])


def test_windows_of_a_batch_as_alone(model: Whisper, usual: Whisper) -> None:
    """Of other batches than before, too, and of other windows for as many texts: there is room for each."""
    mel = windows(3)
    for n, beam_size, sample_len in ((1, 3, 12), (3, None, 12), (1, 3, 12), (1, None, 12), (2, None, None)):
        options = DecodingOptions(language="en", beam_size=beam_size, sample_len=sample_len, fp16=False)
        ours, theirs = (each.decode(mel[:n], options) for each in (model, usual))
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
    """The avg_logprob that PyTorch's network gives to a text of a window, (1,), computed in the dtype."""
    text = torch.tensor([[*task.initial_tokens, *tokens, EOT]])
    logits = pytorch_logits(network, torch.from_numpy(audio), text, dtype)[0]
    return avg_logprob(task, tokens, logits)


@pytest.mark.nightly
def test_a_text_that_fills_the_cache(model: Whisper, usual: Whisper) -> None:
    """Behind as long a prompt as there can be."""
    prompt = list(range(1000, 1223))
    options = DecodingOptions(language="en", prompt=prompt, suppress_tokens=[EOT], sample_len=500, fp16=False)
    ours, theirs = (each.decode(windows(2), options) for each in (model, usual))
    assert [each.tokens for each in ours] == [each.tokens for each in theirs]
    assert {len(each.tokens) for each in ours} == {model.dims.n_text_ctx + 1 - SAMPLE_BEGIN - 1 - len(prompt)}


def test_as_many_tokens_as_asked_for(model: Whisper) -> None:
    """Of each text, and none of one of which none are wanted, nor of one that has ended."""
    inference, start = MaxInference(model, SAMPLE_BEGIN), torch.tensor([PROMPT] * 4)
    logits = inference.start(start, model.embed_audio(windows(4)), 0)[1]
    known = TokenRules(N_VOCAB, SAMPLE_BEGIN, EOT)
    now = first_tokens(model.network[TOKEN_RULES], known, logits, start, torch.zeros(4), 1).texts
    now.tokens[3, -1] = EOT
    n_token = torch.tensor([0, 1, STEPS_AT_ONCE + 1, 5])
    then = inference.advance(now, known.inputs(now.tokens, 1), n_token).texts
    assert (then.lengths - now.lengths).tolist() == [0, 1, STEPS_AT_ONCE, 0]
    assert then.tokens[[0, 3], now.lengths[0] :].eq(EOT).all()
    assert then.totals[[0, 3]].equal(now.totals[[0, 3]]) and (then.totals < now.totals).tolist()[1:3] == [True, True]


def test_a_text_goes_no_further_than_what_is_not_finite(model: Whisper) -> None:
    """Else later tokens would hide it."""
    inference, start = MaxInference(model, SAMPLE_BEGIN), torch.tensor([PROMPT] * 3)
    inference.start(start, model.embed_audio(windows(3)), 0)
    cache = model.stepper._in_slots(inference.cache)
    texts = torch.nn.functional.pad(start, (0, 1))
    logprobs = torch.tensor([float("nan"), -float("inf"), -1.0])
    lengths, ends = torch.full((3,), SAMPLE_BEGIN), torch.full((3,), SAMPLE_BEGIN + 1)
    state = {"texts": texts, "lengths": lengths, "totals": torch.zeros(3), "logprobs": logprobs, "ends": ends}
    rules = TokenRules(N_VOCAB, SAMPLE_BEGIN, EOT).inputs(start, 1)._asdict()
    del rules["n_best"]
    _, lengths, _, latest = model.network[SELECT_TOKENS](**state, **rules, **cache.inputs(), **cache.written())
    assert (lengths - SAMPLE_BEGIN).tolist() == [0, 0, 1]
    assert latest.isfinite().tolist() == [False, False, True]


@pytest.fixture(scope="module")
def not_finite() -> Whisper:
    """A model which is so at a place behind the start, which nothing else looks at."""
    checkpoint = load_checkpoint(NANO)
    positions = checkpoint.tensors["decoder.positional_embedding"].clone()
    positions[SAMPLE_BEGIN + 2] = float("nan")
    return on_device(replace(checkpoint, tensors={**checkpoint.tensors, "decoder.positional_embedding": positions}))


@BEAMS
def test_what_is_not_finite_is_an_error(not_finite: Whisper, beam_size: int | None) -> None:
    with pytest.raises(DecodingError, match="not finite"):
        not_finite.decode(windows(1), DecodingOptions(language="en", beam_size=beam_size, fp16=False))


@pytest.mark.parametrize("beam_size", [MAX_CANDIDATES - 1, MAX_CANDIDATES])
def test_as_many_beams_as_there_are_candidates_for_and_more(model: Whisper, usual: Whisper, beam_size: int) -> None:
    options = DecodingOptions(language="en", beam_size=beam_size, sample_len=16, fp16=False)
    (ours,), (theirs,) = (each.decode(windows(1), options) for each in (model, usual))
    assert ours.tokens == theirs.tokens


def test_a_text_that_left_something_not_finite_does_no_harm_to_the_next(model: Whisper) -> None:
    before = model.transcribe(SOME[0], temperature=0.0)
    for left in (float("nan"), float("inf")):
        for kv in model.stepper.of_thread.slots.own:
            kv.fill_(left)
        assert model.transcribe(SOME[0], temperature=0.0) == before


@BEAMS
def test_where_the_rules_leave_no_token_for_once(model: Whisper, usual: Whisper, beam_size: int | None) -> None:
    """All text is suppressed, and behind the first timestamp there must be some; later, timestamps again."""
    options = DecodingOptions(language="en", suppress_tokens=[*range(BEGIN)], beam_size=beam_size, fp16=False)
    for each in (model, usual):
        with pytest.raises(DecodingError, match="exclude every token"):
            each.decode(windows(1), options)
