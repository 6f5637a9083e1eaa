"""What blocks are compared on: every layer, on every kind of inputs, at every moment, and each of these is another."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maxwhisper.network.blocks import BLOCKS
from reference import activations
from reference.activations import (
    AUDIO,
    BATCH,
    END,
    KINDS,
    LOUD,
    N_PROMPT,
    QUIET,
    RANDOM,
    SCALED,
    VOCABULARY,
    WINDOWS,
    Activations,
    is_step,
)
from reference.models import trained
from reference.suite import Suite


@pytest.fixture(scope="module")
def judged() -> Suite:
    return Suite(trained(), torch.float32)


def kinds_of(block: str) -> set[str]:
    if block == "log_mel":
        return {*AUDIO, RANDOM, *SCALED}
    if block == "decoder.embedding":
        return {"speech", BATCH, END, VOCABULARY, RANDOM}
    of_text = block.startswith("decoder") and "keys_values" not in block and "logits" not in block
    return {*AUDIO, BATCH, RANDOM, *SCALED, *([END] if of_text else [])}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_layer_is_compared_on_every_kind_of_inputs(judged: Suite, block: str) -> None:
    """A step early in the text too, on speech and on random inputs."""
    found = list(judged.comparisons(BLOCKS[block], KINDS, seed=3))
    kinds = kinds_of(block)
    if is_step(BLOCKS[block]):
        kinds = {f"{kind}.late" for kind in kinds} | {"speech.first", f"{RANDOM}.first"}
    layered = any(word in block for word in ("attention", "mlp", "block", "layer_norm"))
    n_layer = (judged.dims.n_audio_layer if block.startswith("encoder") else judged.dims.n_text_layer) if layered else 1
    assert {(each.layer, each.inputs) for each in found} == {(n, kind) for n in range(n_layer) for kind in kinds}
    assert len(found) == n_layer * len(kinds) and {each.seed for each in found} == {3}


@pytest.mark.parametrize("block", ["encoder.block", "decoder.block.step"])
def test_no_two_comparisons_of_a_block_are_of_the_same_inputs(
    judged: Suite, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are made from what is recorded of speech, here noise."""
    draw = lambda: torch.randn(1, 9, 8, dtype=torch.float64)  # noqa: E731
    x = {f"{part}.blocks.{n}": draw() for part in ("encoder", "decoder") for n in range(3)}
    kv = {f"decoder.blocks.{n}.{attention}": draw() for n in range(3) for attention in ("attn", "cross_attn")}
    recorded = Activations(draw(), draw(), torch.arange(9)[None], x, kv, kv, draw())
    monkeypatch.setitem(judged.model.known, "speech", recorded)
    some = ["speech", RANDOM, *SCALED]
    compared = [each for seed in (0, 1) for each in judged.comparisons(BLOCKS[block], some, seed)]
    of = {(each.layer, each.inputs, each.seed): judged.inputs(BLOCKS[block], each)["x"] for each in compared}
    of_random = [(key, each) for key, each in of.items() if key[1].startswith(RANDOM) or not key[2]]
    assert not any(one.equal(other) for n, (_, one) in enumerate(of_random) for _, other in of_random[:n])
    late = ".late" if is_step(BLOCKS[block]) else ""
    for kind, times in (("loud", LOUD), ("quiet", QUIET)):
        assert of[0, kind + late, 0].equal(of[0, "speech" + late, 0] * times)


def distinct(rows: torch.Tensor) -> bool:
    return len(rows.unique(dim=0)) == len(rows)


def test_what_is_recorded_differs_by_kind_window_and_text(judged: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three windows each has three texts; to the end there is a text of as many tokens as there are positions."""
    monkeypatch.setattr(activations, "record", lambda oracle, audio, tokens: (audio, tokens))
    oracle: Any = SimpleNamespace(dims=judged.dims)
    found: dict[str, Any] = {kind: activations.recorded(oracle, kind) for kind in (*AUDIO, BATCH, END)}
    sound, text = found["speech"]
    assert distinct(torch.cat([found[kind][0] for kind in AUDIO])) and all(found[kind][1].equal(text) for kind in AUDIO)
    windows, texts = found[BATCH]
    assert windows.equal(torch.cat([found[kind][0] for kind in WINDOWS])) and len(windows) == 3
    assert texts.shape == (9, text.shape[1]) and distinct(texts[:, N_PROMPT:-1])
    assert found[END][0].equal(sound) and found[END][1].shape == (1, judged.dims.n_text_ctx)
    for tokens in (texts, found[END][1]):
        assert (tokens[:, :N_PROMPT] == text[:, :N_PROMPT]).all() and (tokens[:, -1] == text[0, -1]).all()


def test_a_block_is_given_its_own_part_of_what_is_recorded() -> None:
    """Where it is told a position, one that is not the first."""
    tokens = torch.arange(9)[None]
    x = {f"decoder.blocks.{n}.attn": torch.full((1, 9, 2), float(n)) + tokens[..., None] / 16 for n in range(3)}
    names = [f"decoder.blocks.{n}.{attention}" for n in range(3) for attention in ("attn", "cross_attn")]
    keys, values = ({name: torch.full((1,), side + n) for n, name in enumerate(names)} for side in (0.0, 10.0))
    nothing = torch.zeros(1)
    recorded = Activations(nothing, nothing, tokens, x, keys, values, nothing)
    block = BLOCKS["decoder.attention.cached"]
    given = recorded.of(block, ["x", "offset", "k_cache", "v_cache"], 2, 7)
    assert given["x"].equal(x["decoder.blocks.2.attn"][:, 7:8]) and int(given["offset"]) == 7
    assert given["k_cache"].equal(keys["decoder.blocks.2.attn"]) and given["v_cache"].equal(
        values["decoder.blocks.2.attn"]
    )
    given = recorded.of(BLOCKS["decoder.step"], ["tokens", "v_cross.1", "k_cache.0"], 0, 8)
    assert given["tokens"].tolist() == [[8]] and given["k_cache.0"].equal(keys["decoder.blocks.0.attn"])
    assert given["v_cross.1"].equal(values["decoder.blocks.1.cross_attn"])
    given = recorded.of(BLOCKS["decoder.embedding"], ["tokens", "offset"], 0, 8)
    assert given["tokens"].tolist() == [[3, 4, 5, 6, 7]] and int(given["offset"]) == 3
    given = recorded.of(BLOCKS["decoder.start"], ["tokens", "positions"], 0, 8)
    assert given["tokens"].tolist() == [[*range(8)]] and given["positions"].tolist() == [1, 7]
