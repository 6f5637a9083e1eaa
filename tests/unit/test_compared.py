"""What blocks are compared on: every layer, on every kind of inputs, at every moment, and each of these is another."""

import pytest
import torch

from maxwhisper.network.blocks import BLOCKS
from reference.activations import AUDIO, BATCH, END, KINDS, LOUD, QUIET, RANDOM, SCALED, VOCABULARY, is_step
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
def test_no_two_comparisons_of_a_block_are_of_the_same_inputs(judged: Suite, block: str) -> None:
    """Those that are made from speech: of other kinds `reference.activations` records others."""
    some = ["speech", RANDOM, *SCALED]
    compared = [each for seed in (0, 1) for each in judged.comparisons(BLOCKS[block], some, seed)]
    x = {(each.layer, each.inputs, each.seed): judged.inputs(BLOCKS[block], each)["x"] for each in compared}
    of_random = [(key, each) for key, each in x.items() if key[1].startswith(RANDOM) or not key[2]]
    assert not any(one.equal(other) for n, (_, one) in enumerate(of_random) for _, other in of_random[:n])
    late = ".late" if is_step(BLOCKS[block]) else ""
    for kind, times in (("loud", LOUD), ("quiet", QUIET)):
        assert x[0, kind + late, 0].equal(x[0, "speech" + late, 0] * times)
