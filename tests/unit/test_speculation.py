"""Speculation: whatever the draft guesses, the text is the decoder's own, bit for bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from hypothesis import given, settings
from hypothesis import strategies as st
from max.dtype import DType
from max.graph import DeviceRef, TensorType
from whisper.audio import N_SAMPLES, pad_or_trim

import maxwhisper.decoding
import maxwhisper.whisper
from maxwhisper.audio import load_audio, log_mel_spectrogram
from maxwhisper.blocks import BLOCKS
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.decoding import NoWeights, likeliest, own_rows, rules_inputs, texts_inputs
from maxwhisper.model import Cache, KeyValue
from maxwhisper.runtime import Artifact, Executable, Policy, Program
from maxwhisper.speculation import N_GUESS, UNIT_SIZE, draft_of, make_rough
from maxwhisper.whisper import DTYPES, Whisper, load_model

FIXTURES = Path(__file__).parents[2] / "fixtures"
NANO = FIXTURES / "nano.pt"
CLIPS = [Path(clip["file"]).name for clip in json.loads((FIXTURES / "clips.json").read_text())["clips"]]
N_VOCAB, BEGIN, EOT = 51865, 50364, 50257
N_TOKEN = 4

Draft = dict[str, torch.Tensor]
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


@pytest.fixture(scope="module", params=[*DTYPES, "stored in float32"])
def model(request: pytest.FixtureRequest) -> Whisper:
    if request.param in DTYPES:
        return load_model(NANO, dtype=request.param)
    checkpoint = load_checkpoint(NANO)
    return Whisper(replace(checkpoint, tensors={name: each.float() for name, each in checkpoint.tensors.items()}))


@pytest.fixture(scope="module")
def mels() -> dict[str, torch.Tensor]:
    return {
        clip: log_mel_spectrogram(pad_or_trim(load_audio(FIXTURES / "clips" / clip), N_SAMPLES), 80) for clip in CLIPS
    }


def decoded(model: Whisper, mel: torch.Tensor, **options: Any) -> tuple[Any, ...]:
    result = model.decode(mel, whisper.DecodingOptions(fp16=False, language="en", **options))
    return result.tokens, result.avg_logprob, result.no_speech_prob


def one_by_one(model: Whisper, mel: torch.Tensor, **options: Any) -> tuple[Any, ...]:
    """What is decoded without guesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maxwhisper.whisper, "N_GUESS", model.dims.n_text_ctx)
        return decoded(model, mel, **options)


@pytest.mark.parametrize("options", [{}, {"without_timestamps": True}, {"suppress_tokens": [EOT]}], ids=str)
def test_a_text_is_what_it_is_without_guesses(
    model: Whisper, mels: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    for mel in mels.values():
        assert decoded(model, mel, **options) == one_by_one(model, mel, **options)


@pytest.mark.parametrize("draft", DRAFTS)
def test_wrong_guesses_change_nothing(
    mels: dict[str, torch.Tensor], draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(*given: Any) -> Draft:
        return {name: DRAFTS[draft](tensor) for name, tensor in draft_of(*given).items()}

    monkeypatch.setattr(maxwhisper.whisper, "draft_of", of)
    model, right = load_model(NANO), load_model(NANO)
    for mel in list(mels.values())[:4]:
        assert decoded(model, mel) == one_by_one(right, mel)


def test_nearly_all_guesses_are_right(model: Whisper, mels: dict[str, torch.Tensor]) -> None:
    """Else decoding would be slower with them."""
    n_round, n_token = 0, 0
    steps = model.decoder.steps

    def counted(*given: Any) -> Any:
        nonlocal n_round, n_token
        found = steps(*given)
        if given[-1]:  # what the draft takes
            n_round, n_token = n_round + 1, n_token + found[0]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maxwhisper.decoding, "MAX_STEPS", N_GUESS + 1)  # so that each execution is one round
        patch.setattr(model.decoder, "steps", counted)
        for mel in mels.values():
            decoded(model, mel, suppress_tokens=[EOT], sample_len=1 + 5 * (N_GUESS + 1))
    assert n_round >= 5 * len(mels)
    assert n_token / n_round > 0.8 * (N_GUESS + 1)


@pytest.mark.parametrize("n_token", [1, N_GUESS, N_GUESS + 1, N_GUESS + 2, N_GUESS + 3, 2 * N_GUESS + 3])
def test_a_text_may_end_anywhere_in_a_round(model: Whisper, mels: dict[str, torch.Tensor], n_token: int) -> None:
    options = {"suppress_tokens": [EOT], "sample_len": n_token}
    for mel in list(mels.values())[:2]:
        found = decoded(model, mel, **options)
        assert found == one_by_one(model, mel, **options) and len(found[0]) == n_token


def test_a_cache_is_one_memory_for_the_draft(model: Whisper, mels: dict[str, torch.Tensor]) -> None:
    cache, _ = model.install_kv_cache_hooks()
    tokens = torch.arange(10)[None]
    model.decoder(tokens, model.encoder(next(iter(mels.values()))[None]), kv_cache=cache)
    for each in (cache, cache.copy()):
        assert each.memory is not None
        assert [kv.data_ptr() for kv in each.own] == [kv.data_ptr() for kv in each.memory]


@pytest.fixture(scope="module")
def pick() -> Executable:
    """The graph that picks tokens, of texts with guesses behind them."""
    logits = TensorType(DType.float32, ["batch", "token", N_VOCAB], DeviceRef.CPU())
    inputs = {"logits": logits, **texts_inputs(), **rules_inputs(N_VOCAB)}
    program = Program("pick", "", NoWeights(), lambda _, *values: likeliest(*values), inputs)
    return Artifact("picking guesses", [program], "cpu").init({})["pick"]


def picked(
    pick: Executable, logits: torch.Tensor, text: list[int], guesses: list[int], total: float
) -> tuple[list[int], list[torch.Tensor]]:
    """The text with what is put behind it, and what else the graph gives."""
    texts = torch.tensor([[*text, *guesses, 0]])
    limits, begins = torch.tensor([BEGIN, EOT]), torch.tensor([1])
    suppressed = torch.zeros(N_VOCAB, dtype=torch.bool)
    rules = (suppressed, begins, limits, torch.zeros(2, dtype=torch.int64))
    *found, new_lengths, stopped = pick(logits, texts, torch.tensor([len(text)]), torch.tensor([total]), *rules)
    return texts[0, : int(new_lengths)].tolist(), [*found, stopped]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_right=st.integers(0, N_TOKEN - 1),
    lean=st.sampled_from([-30.0, 0.0, 30.0]),
    n_end=st.integers(0, N_TOKEN),
    not_finite=st.integers(0, 2 * N_TOKEN),
)
def test_guesses_are_taken_as_far_as_they_are_right(
    pick: Executable, seed: int, n_right: int, lean: float, n_end: int, not_finite: int
) -> None:
    """Several tokens at once: what they are one at a time, until the first one that was not guessed."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(1, N_TOKEN, N_VOCAB, generator=generator)
    logits[:, :, BEGIN:] += lean
    if n_end < N_TOKEN:
        logits[:, n_end, EOT] = 100
    if not_finite < N_TOKEN:
        logits[:, not_finite] = torch.nan
    text, total, rows = [50258, 400], -1.0, []
    for row in range(N_TOKEN):
        text, found = picked(pick, logits[:, row : row + 1], text, [], total)
        rows.append((text, found))
        *_, totals, stopped = found
        total = float(totals)
        if stopped:
            break
    right = [*text[2:], *[0] * N_TOKEN]
    guesses = [*right[:n_right], *[(token + 1) % EOT for token in right[n_right : N_TOKEN - 1]]]
    expected, others = rows[min(n_right, len(rows) - 1)]
    text, found = picked(pick, logits, [50258, 400], guesses, -1.0)
    assert text == expected
    for ours, theirs in zip(found, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_several_tokens_of_a_layer_are_bitwise_as_many_steps() -> None:
    checkpoint = load_checkpoint(NANO)
    dims, policy = checkpoint.dims, Policy(DeviceRef.CPU(), DType.float16, DType.float32)
    n_text, n_token, n_place, n_past = 2, 5, 100, [70, 3]
    _, _, *cached = BLOCKS["decoder.block.step"].inputs(dims, policy).values()
    cpu = DeviceRef.CPU()
    inputs = {
        "x": TensorType(DType.float32, ["batch", "token", dims.n_text_state], cpu),
        "offset": TensorType(DType.int64, ["batch"], cpu),
        "sources": TensorType(DType.int64, ["batch", "place"], cpu),
        **{str(number): each for number, each in enumerate(cached)},
    }

    def steps(block: Any, x: Any, offset: Any, sources: Any, *kv: Any) -> Any:
        return block.steps(x, KeyValue(*kv[2:]), Cache(*kv[:2], offset, sources))

    block = BLOCKS["decoder.block.step"]
    program = Program("steps", block.path, block.module(dims, policy), steps, inputs)
    graph = Artifact("several tokens", [program], "cpu").init(checkpoint.tensors, text_layer=1)["steps"]
    n_head, n_channel = dims.n_text_head, dims.n_text_state // dims.n_text_head
    own = [torch.randn(n_text, n_head, n_place, n_channel) for _ in range(2)]
    cross = [torch.randn(n_text, n_head, dims.n_audio_ctx, n_channel) for _ in range(2)]
    x, lengths, sources = torch.randn(n_text, n_token, dims.n_text_state), torch.tensor(n_past), own_rows(2, n_place)
    at_once = graph(x, lengths, sources, *own, *cross)
    for token in range(n_token):
        one = graph(x[:, token : token + 1], lengths + token, sources, *own, *cross)
        for ours, theirs in zip(at_once, one, strict=True):
            assert ours[:, token : token + 1].equal(theirs)
        for kv, new in zip(own, one[1:], strict=True):
            for text in range(n_text):
                kv[text, :, n_past[text] + token] = new[text].reshape(n_head, n_channel)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_rough_matrix_has_the_nearest_multiples(bits: int, dtype: torch.dtype) -> None:
    """Of a unit that is a power of two, so that all of this is exact in every dtype."""
    unit, greatest = 2.0**-6, 2 ** (bits - 1) - 1
    expected = torch.randint(-greatest, greatest + 1, (5000, 64))
    expected[:, 5] = greatest
    expected[7] = 0
    between = torch.randint(-1, 2, expected.shape) / 4 * (expected.abs() < min(greatest, 32))
    between[7] = 0
    matrix = ((expected + between) * unit).to(dtype)
    before, packed = matrix.clone(), rough_like(matrix, bits)
    make_rough(matrix, bits, packed)
    assert matrix.equal(before)
    whole, units = packed[:, :-UNIT_SIZE], packed[:, -UNIT_SIZE:].contiguous().view(torch.float32)
    if bits == 4:
        whole = torch.cat([whole & 15, whole >> 4], 1).to(torch.int8) - 8
    assert whole.equal(expected.to(torch.int8))
    assert (units[torch.arange(5000) != 7] == unit).all()


def rough_like(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    dtype = torch.int8 if bits == 8 else torch.uint8
    return torch.empty(len(matrix), matrix.shape[1] * bits // 8 + UNIT_SIZE, dtype=dtype)
