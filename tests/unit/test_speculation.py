"""Speculation: whatever the draft proposes, the text is the decoder's own, bit for bit."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import whisper
from hypothesis import given, settings
from hypothesis import strategies as st
from max.dtype import DType
from max.graph import DeviceRef, TensorType
from whisper.audio import N_SAMPLES, pad_or_trim

import maxwhisper.compiled
import maxwhisper.decoding.openai_loop
from maxwhisper.audio import load_audio, log_mel_spectrogram
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compiled import DTYPES
from maxwhisper.decoding.cache import SCALE_SIZE, rows_of
from maxwhisper.decoding.cpu import CPUStepper
from maxwhisper.decoding.openai_loop import MAX_STEPS, MaxInference
from maxwhisper.decoding.rules import NoWeights, Rules, TokenRules, rules_inputs, texts_inputs, top_tokens
from maxwhisper.decoding.speculative import N_PROPOSED, SPECULATE, WORTH_PROPOSING, Draft, draft_of, quantize
from maxwhisper.decoding.stepper import Texts
from maxwhisper.engine.program import Program
from maxwhisper.engine.session import Policy
from maxwhisper.errors import DecodingError
from maxwhisper.network.blocks import BLOCKS
from maxwhisper.network.model import ResidualAttentionBlock
from maxwhisper.whisper import Whisper, load_model
from reference.fixtures import FIXTURES, NANO

from .small_graphs import small_graphs

CLIPS = [Path(clip["file"]).name for clip in json.loads((FIXTURES / "clips.json").read_text())["clips"]]
SOME = [CLIPS[number] for number in (0, 3, 6, 10, 11)]
"""Five, short and long, in two languages."""
N_VOCAB, BEGIN, EOT = 51865, 50364, 50257
N_TOKEN = 4

DRAFTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another one": lambda weights: weights.roll(1, dims=0),
    "zeros": torch.zeros_like,
    "other vectors": lambda weights: torch.randn_like(weights) if weights.is_floating_point() else weights,
    "not finite": lambda weights: torch.full_like(weights, torch.nan) if weights.is_floating_point() else weights,
    "any bits": lambda weights: (
        torch.randint(0, 256, weights.shape, dtype=torch.uint8).view(weights.dtype)
        if weights.element_size() == 1
        else weights
    ),
}


def at_night(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.nightly) for name in names]


EVERY = ("bfloat16", "float16", "stored in float32")
OTHERS_AT_NIGHT = pytest.mark.parametrize("model", ["float32", *at_night(*EVERY)], indirect=True)


@pytest.fixture(scope="module", params=["float32", "bfloat16", *at_night(*EVERY[1:])])
def model(request: pytest.FixtureRequest) -> Whisper:
    if request.param in DTYPES:
        return load_model(NANO, dtype=request.param)
    checkpoint = load_checkpoint(NANO)
    return Whisper(replace(checkpoint, tensors={name: each.float() for name, each in checkpoint.tensors.items()}))


@pytest.fixture(scope="module")
def mels() -> torch.Tensor:
    """Returns the spectrogram of five clips, (clip, n_mels, frame)."""
    return spectrograms(SOME)


def spectrograms(clips: list[str]) -> torch.Tensor:
    waveforms = [pad_or_trim(load_audio(FIXTURES / "clips" / clip), N_SAMPLES) for clip in clips]
    return torch.stack([log_mel_spectrogram(waveform, 80) for waveform in waveforms])


@pytest.fixture(scope="module")
def heard(model: Whisper, mels: torch.Tensor) -> torch.Tensor:
    """Returns the clips' audio features, which a decode takes as well as the mels."""
    return torch.cat([model.embed_audio(mel[None]) for mel in mels])


Found = list[tuple[Any, ...]]


def decoded(model: Whisper, heard: torch.Tensor, **options: Any) -> Found:
    """Returns what is found in windows that decode together."""
    results = model.decode(heard, whisper.DecodingOptions(fp16=False, language="en", **options))
    return [(result.tokens, result.avg_logprob, result.no_speech_prob) for result in results]


def by_steps(model: Whisper, heard: torch.Tensor, **options: Any) -> Found:
    """Returns what is decoded without proposals."""
    return decoded(model.stepping_by(CPUStepper(model.network, model.dims.n_text_ctx)), heard, **options)


class Counted:
    """The graph that proposes and verifies, and how many tokens each execution puts behind each text that goes on."""

    def __init__(self, model: Whisper, monkeypatch: pytest.MonkeyPatch):
        self.gained: list[list[int]] = []
        self.executable = model.decoder.network[SPECULATE]
        monkeypatch.setitem(model.decoder.network.executables, SPECULATE, self)

    def __call__(self, lengths: torch.Tensor, **others: Any) -> list[torch.Tensor]:
        found = self.executable(lengths=lengths, **others)
        self.gained.append((found[-1] - lengths)[lengths > 1].tolist())
        return found


def test_texts_are_what_they_are_without_proposals(
    model: Whisper, heard: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = assert_as_without_proposals(model, heard, monkeypatch)
    assert len({len(tokens) for tokens, *_ in expected}) > 3  # so that some wait for others
    assert max(len(tokens) for tokens, *_ in expected) > 2 * MAX_STEPS


@OTHERS_AT_NIGHT
@pytest.mark.parametrize(
    ("options", "n_text"),
    [
        ({"without_timestamps": True}, 2),
        ({"suppress_tokens": [EOT], "sample_len": 2 * MAX_STEPS + 6}, 3),
        ({"prompt": list(range(1000, 1223))}, 2),
    ],
    ids=["no timestamps", "no end", "long prompt"],
)
def test_texts_by_other_options_are_what_they_are_without_proposals(
    model: Whisper, heard: torch.Tensor, options: dict[str, Any], n_text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_without_proposals(model, heard[-n_text:], monkeypatch, **options)


def assert_as_without_proposals(
    model: Whisper, heard: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Found:
    """Together and alone. Returns what is found."""
    expected = by_steps(model, heard, **options)
    counted = Counted(model, monkeypatch)
    assert decoded(model, heard, **options) == expected
    assert max(map(len, counted.gained)) == len(heard)
    for some, found in ((heard[:1], expected[:1]), (heard[-1:], expected[-1:])):
        assert decoded(model, some, **options) == found
    return expected


@OTHERS_AT_NIGHT
def test_a_text_of_all_the_models_places_is_what_it_is_without_proposals(model: Whisper, heard: torch.Tensor) -> None:
    options = {"prompt": list(range(1000, 1223)), "prefix": list(range(2000, 2120)), "suppress_tokens": [EOT]}
    n_token = model.dims.n_text_ctx + 1 - len((50361, *options["prompt"], 50258, 50259, 50359, *options["prefix"]))
    expected = by_steps(model, heard[:2], **options)
    assert [len(tokens) for tokens, *_ in expected] == [n_token] * 2
    for n in (1, 2):
        assert decoded(model, heard[:n], **options) == expected[:n]


@pytest.fixture(scope="module")
def right(mels: torch.Tensor) -> list[tuple[torch.Tensor, Found]]:
    """Windows, alone and together, and what is decoded of them without proposals."""
    model = load_model(NANO)
    heard = model.embed_audio(mels[:3])
    found = by_steps(model, heard)
    return [(heard[:n], found[:n]) for n in (1, 3)]


@pytest.mark.parametrize("draft", DRAFTS)
def test_wrong_proposals_change_nothing(
    right: list[tuple[torch.Tensor, Found]], draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(*given: Any) -> Draft:
        return Draft(*map(DRAFTS[draft], draft_of(*given)))

    monkeypatch.setattr(maxwhisper.compiled, "draft_of", of)
    model = load_model(NANO)
    for some, found in right:
        assert decoded(model, some) == found


def test_proposals_that_fail_are_given_up(mels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as many tokens as are computed in a call, or decoding would take several times as long as by steps."""

    def of(*given: Any) -> Draft:
        return Draft(*map(torch.zeros_like, draft_of(*given)))

    monkeypatch.setattr(maxwhisper.compiled, "draft_of", of)
    model = load_model(NANO)
    counted = Counted(model, monkeypatch)
    n_token = 3 * MAX_STEPS
    decoded(model, mels[:1], suppress_tokens=[EOT], sample_len=1 + n_token)
    assert [len(gained) for gained in counted.gained] == [1] * 3
    assert all(gained[0] < MAX_STEPS / 4 for gained in counted.gained)


def test_texts_that_have_ended_do_not_count(
    model: Whisper, heard: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or proposals would be given up for the others."""
    tokens = torch.tensor([[50258, 50259, 50359, 50363, 400]]).repeat(5, 1)
    rules = TokenRules(N_VOCAB, 4, EOT)
    rules.suppressed[EOT] = True
    inference = MaxInference(model, tokens.shape[1] - 1)
    inference.start(tokens[:, :-1], heard[:5], 0)
    counted = Counted(model, monkeypatch)
    inference.advance(Texts.of(tokens, torch.zeros(5)), rules.inputs(tokens, 1), torch.tensor([0, 0, MAX_STEPS, 0, 0]))
    ((gained,),) = counted.gained
    assert gained > MAX_STEPS - WORTH_PROPOSING


@pytest.mark.parametrize("ended", [0, 1])
def test_a_text_that_ends_ends_the_rounds(
    model: Whisper, heard: torch.Tensor, ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them it is; else steps would decode what is left where proposals are given up."""

    class Ends(Counted):
        def __call__(self, lengths: torch.Tensor, **others: Any) -> list[torch.Tensor]:
            for text, length in enumerate(lengths.tolist()):
                others["texts"][text, length] = EOT if text == ended else 400
            return [others["totals"], lengths + 1]

    tokens = torch.tensor([[50258, 50259, 50359, 50363, 400]]).repeat(2, 1)
    inference = MaxInference(model, tokens.shape[1] - 1)
    inference.start(tokens[:, :-1], heard[:2], 0)
    Ends(model, monkeypatch)
    monkeypatch.setattr(CPUStepper, "advance", Mock(side_effect=AssertionError("a step")))
    rules = TokenRules(N_VOCAB, 4, EOT).inputs(tokens, 1)
    advanced = inference.advance(Texts.of(tokens, torch.zeros(2)), rules, torch.tensor([MAX_STEPS] * 2))
    assert advanced.texts.last()[:, 0].eq(EOT).tolist() == [ended == 0, ended == 1]


def test_a_round_that_cannot_go_on_is_an_error(
    model: Whisper, heard: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the next step could."""

    class NotFinite(Counted):
        def __call__(self, lengths: torch.Tensor, **others: Any) -> list[torch.Tensor]:
            totals, _ = super().__call__(lengths=lengths, **others)
            others["logprobs"].fill_(torch.nan)
            return [totals * torch.nan, lengths + 1]

    NotFinite(model, monkeypatch)
    with pytest.raises(DecodingError, match="not finite"):
        decoded(model, heard[:1], suppress_tokens=[EOT])


WANTED = N_PROPOSED - 1
"""Of each execution, which is then one round; or more, if rounds give one or two tokens, but these together give fewer
than are wanted."""


@pytest.mark.parametrize("n_text", [1, len(SOME)])
def test_nearly_all_proposals_are_right(
    model: Whisper, heard: torch.Tensor, n_text: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else decoding would be slower with them."""
    assert_right_in_rounds(model, heard, n_text, monkeypatch)


@pytest.mark.nightly
def test_nearly_all_proposals_are_right_for_every_clip(model: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = torch.cat([model.embed_audio(mel[None]) for mel in spectrograms(CLIPS)])
    assert_right_in_rounds(model, heard, len(CLIPS), monkeypatch)


def assert_right_in_rounds(model: Whisper, heard: torch.Tensor, n_text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(model, monkeypatch)
    monkeypatch.setattr(maxwhisper.decoding.openai_loop, "MAX_STEPS", WANTED)
    for some in heard.split(n_text):
        decoded(model, some, suppress_tokens=[EOT], sample_len=1 + 5 * WANTED)
    assert_nearly_all_right(counted, 5 * len(heard))


@OTHERS_AT_NIGHT
def test_nearly_all_proposals_are_right_for_recordings_together(
    model: Whisper, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(model, monkeypatch)
    monkeypatch.setattr(maxwhisper.decoding.openai_loop, "MAX_STEPS", WANTED)
    paths = [FIXTURES / "clips" / clip for clip in SOME[:4]]
    options = {"suppress_tokens": [EOT], "sample_len": 1 + 5 * WANTED, "temperature": 0.0, "language": "en"}
    found = dict(model.transcribe_many(paths, 3, clip_timestamps="0,3", **options))
    assert not any(isinstance(result, Exception) for result in found.values())
    assert max(map(len, counted.gained)) == 3
    assert_nearly_all_right(counted, 5 * len(paths))


def assert_nearly_all_right(counted: Counted, n_round: int) -> None:
    """Looks at every text: one for which all are wrong would not show in the average of several."""
    assert sum(map(len, counted.gained)) >= n_round
    width = max(map(len, counted.gained))
    for gained in zip(*(each for each in counted.gained if len(each) == width), strict=True):
        assert sum(gained) / len(gained) > 0.8 * WANTED


@pytest.mark.parametrize(
    "n_token", [1, WORTH_PROPOSING, N_PROPOSED, N_PROPOSED + 1, N_PROPOSED + 2, 2 * N_PROPOSED + 3]
)
def test_a_text_may_end_anywhere_in_a_round(model: Whisper, heard: torch.Tensor, n_token: int) -> None:
    options = {"suppress_tokens": [EOT], "sample_len": n_token}
    expected = by_steps(model, heard[:3], **options)
    assert [len(tokens) for tokens, *_ in expected] == [n_token] * 3
    for n in (1, 3):
        assert decoded(model, heard[:n], **options) == expected[:n]


def test_a_cache_is_one_memory_for_the_draft(model: Whisper, heard: torch.Tensor) -> None:
    cache, _ = model.install_kv_cache_hooks()
    tokens = torch.arange(10)[None]
    model.decoder(tokens, heard[:1], kv_cache=cache)
    for each in (cache, cache.copy()):
        assert each.memory is not None
        assert [kv.data_ptr() for kv in each.own] == [kv.data_ptr() for kv in each.memory]


def verifying_and_steps() -> list[Program]:
    """Returns the graph that selects tokens, of texts with proposals behind them, and a layer's for several tokens."""
    cpu = DeviceRef.CPU()
    logits = TensorType(DType.float32, ["batch", "token", N_VOCAB], cpu)
    types = {"logits": logits, **texts_inputs(), **rules_inputs(N_VOCAB)}
    verify = Program("verify", "", NoWeights(), lambda _, logits, **given: top_tokens(logits, given), types)
    dims, policy = load_checkpoint(NANO).dims, Policy(cpu, DType.float16, DType.float32)
    block = BLOCKS["decoder.block.step"]
    types = {
        **block.inputs(dims, policy),
        "x": TensorType(DType.float32, ["batch", "token", dims.n_text_state], cpu),
        "offset": TensorType(DType.int64, ["batch"], cpu),
        "rows": TensorType(DType.int64, ["batch", "position"], cpu),
    }
    steps = Program("steps", block.path, block.module(dims, policy), ResidualAttentionBlock.steps, types)
    return [verify, steps]


def verified(
    logits: torch.Tensor, text: list[int], proposals: list[int], total: float, end: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Returns the text with what is put behind it, and what else the graph gives."""
    texts = torch.tensor([[*text, *proposals, 0]])
    limits, begins = torch.tensor([BEGIN, EOT]), torch.tensor([1])
    rules = Rules(torch.zeros(N_VOCAB, dtype=torch.bool), begins, limits, n_best=2).inputs()
    state = {"lengths": torch.tensor([len(text)]), "ends": torch.tensor([end]), "totals": torch.tensor([total])}
    last, totals, lengths, left = small_graphs()["verify"](logits=logits, texts=texts, **state, **rules)
    return texts[0, : int(lengths)].tolist(), [rules["candidates"], rules["logprobs"], last, totals, left]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_right=st.integers(0, N_TOKEN - 1),
    lean=st.sampled_from([-30.0, 0.0, 30.0]),
    n_end=st.integers(0, N_TOKEN),
    not_finite=st.integers(0, 2 * N_TOKEN),
    n_wanted=st.integers(1, 2 * N_TOKEN),
)
def test_proposals_are_accepted_as_far_as_they_are_right(
    seed: int, n_right: int, lean: float, n_end: int, not_finite: int, n_wanted: int
) -> None:
    """Several tokens at once: what they are one at a time, until the first one that was not proposed, or as many as are
    wanted."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(1, N_TOKEN, N_VOCAB, generator=generator)
    logits[:, :, BEGIN:] += lean
    if n_end < N_TOKEN:
        logits[:, n_end, EOT] = 100
    if not_finite < N_TOKEN:
        logits[:, not_finite] = torch.nan
    text, total, rows, end = [50258, 400], -1.0, [], 2 + n_wanted
    for row in range(N_TOKEN):
        text, found = verified(logits[:, row : row + 1], text, [], total, end)
        rows.append((text, found))
        *_, totals, left = found
        total = float(totals)
        assert not left or math.isfinite(total) and text[-1] != EOT
        if not left:
            break
    right = [*text[2:], *[0] * N_TOKEN]
    proposals = [*right[:n_right], *[(token + 1) % EOT for token in right[n_right : N_TOKEN - 1]]]
    expected, others = rows[min(n_right, len(rows) - 1)]
    text, found = verified(logits, [50258, 400], proposals, -1.0, end)
    assert text == expected
    for ours, theirs in zip(found, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_several_tokens_of_a_layer_are_bitwise_as_many_steps() -> None:
    dims, graph = load_checkpoint(NANO).dims, small_graphs()["steps"]
    n_text, n_token, n_position, n_past = 2, 5, 100, [70, 3]
    n_head, n_channel = dims.n_text_head, dims.n_text_state // dims.n_text_head
    own = {name: torch.randn(n_text, n_head, n_position, n_channel) for name in ("k_cache", "v_cache")}
    cross = {name: torch.randn(n_text, n_head, dims.n_audio_ctx, n_channel) for name in ("k_cross", "v_cross")}
    x, lengths, rows = torch.randn(n_text, n_token, dims.n_text_state), torch.tensor(n_past), rows_of(2, n_position)
    at_once = graph(x=x, offset=lengths, rows=rows, **own, **cross)
    for token in range(n_token):
        one = graph(x=x[:, token : token + 1], offset=lengths + token, rows=rows, **own, **cross)
        for ours, theirs in zip(at_once, one, strict=True):
            assert ours[:, token : token + 1].equal(theirs)
        for kv, new in zip(own.values(), one[1:], strict=True):
            for text in range(n_text):
                kv[text, :, n_past[text] + token] = new[text].reshape(n_head, n_channel)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_quantized_matrix_has_the_nearest_multiples(bits: int, dtype: torch.dtype) -> None:
    """The scale is a power of two, so that all of this is exact in every dtype."""
    scale, greatest = 2.0**-6, 2 ** (bits - 1) - 1
    expected = torch.randint(-greatest, greatest + 1, (5000, 64))
    expected[:, 5] = greatest
    expected[7] = 0
    between = torch.randint(-1, 2, expected.shape) / 4 * (expected.abs() < min(greatest, 32))
    between[7] = 0
    matrix = ((expected + between) * scale).to(dtype)
    before, packed = matrix.clone(), quantized_like(matrix, bits)
    quantize(matrix, bits, packed)
    assert matrix.equal(before)
    whole, scales = packed[:, :-SCALE_SIZE], packed[:, -SCALE_SIZE:].contiguous().view(torch.float32)
    if bits == 4:
        whole = torch.cat([whole & 15, whole >> 4], 1).to(torch.int8) - 8
    assert whole.equal(expected.to(torch.int8))
    assert (scales[torch.arange(5000) != 7] == scale).all()


def quantized_like(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    dtype = torch.int8 if bits == 8 else torch.uint8
    return torch.empty(len(matrix), matrix.shape[1] * bits // 8 + SCALE_SIZE, dtype=dtype)
