"""How much a block may round, counted by hand: a count too large lets errors pass, of every block at once."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maxwhisper import checkpoint
from maxwhisper.network.blocks import BLOCKS
from reference.blocks import TWINS
from reference.checkpoints import differences, differing_heads
from reference.fixtures import ROOT
from reference.measures import DTYPES, ROUNDING, SMALLEST, UNIT_ROUNDOFF, K
from reference.models import SIZES

ATTENTION, MLP = (1500, 3), (1536, 3)
"""Of tiny: the most terms of a sum, here over the audio or the hidden channels; and values in a row that are rounded: a
query, weighted values and what is put out, or hidden channels, their GELU and what is put out."""
ENCODER_BLOCK, DECODER_BLOCK = (1536, 10), (1536, 15)
"""Two norms and two sums besides; three of each in the decoder, and another attention."""
COUNTS = {
    "log_mel": (400, 1),
    "encoder.stem": (3 * 384, 5),
    "encoder.layer_norm": (2, 1),
    "encoder.attention": ATTENTION,
    "encoder.mlp": MLP,
    "encoder.block": ENCODER_BLOCK,
    "encoder": (1536, 5 + 4 * 10 + 1),
    "decoder.embedding": (1, 1),
    "decoder.attention.causal": ATTENTION,
    "decoder.attention.cached": ATTENTION,
    "decoder.cross_attention.keys_values": (384, 1),
    "decoder.cross_attention.prefill": ATTENTION,
    "decoder.cross_attention.step": ATTENTION,
    "decoder.mlp.prefill": MLP,
    "decoder.mlp.step": MLP,
    "decoder.block.prefill": DECODER_BLOCK,
    "decoder.block.step": DECODER_BLOCK,
    "decoder.logits.prefill": (384, 2),
    "decoder.logits.step": (384, 2),
    "decoder.keys_values": (384, 1),
    **dict.fromkeys(("decoder.prefill", "decoder.start", "decoder.step", "decoder.alignment"), (1536, 1 + 4 * 15 + 2)),
}


def test_what_a_block_rounds_is_what_is_counted_by_hand() -> None:
    dims = SIZES["tiny"]
    assert {name: (twin.longest_reduction(dims), twin.roundings(dims)) for name, twin in TWINS.items()} == COUNTS
    assert set(COUNTS) == set(BLOCKS)


def test_the_numbers_of_the_derivation() -> None:
    """Sizes below which float32 sums are flushed, or numbers of the dtype itself."""
    assert K == 4 and list(DTYPES) == ["float32", "float16", "bfloat16"] and 0.424 < ROUNDING < 0.425
    assert {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8} == UNIT_ROUNDOFF
    assert {torch.float32: 2**-102, torch.float16: 2**-14, torch.bfloat16: 2**-118} == SMALLEST


@pytest.mark.parametrize(
    ("ours", "same"),
    [([[1, 0], [0, 1]], True), ([[0, 1], [1, 1]], False), ([[0, 1]], False), (None, False), ([], False)],
)
def test_alignment_heads_are_compared_one_by_one(ours: Any, same: bool) -> None:
    heads = torch.tensor([[False, True], [True, False]]).to_sparse()
    model: Any = SimpleNamespace(dims=SimpleNamespace(n_text_layer=2, n_text_head=2), alignment_heads=heads)
    assert (not differing_heads(ours, model)) == same
    model.alignment_heads = torch.tensor([[False, False], [True, True]]).to_sparse()
    assert not differing_heads(None, model), "all heads of the upper half"


@pytest.mark.parametrize("n_vocab", [7, 9])
def test_a_dimension_that_is_smaller_or_larger_is_wrong(n_vocab: int) -> None:
    tiny = SIZES["tiny"]
    right, ours = replace(tiny, n_vocab=8), replace(tiny, n_vocab=n_vocab)
    assert differences(ours, {}, right, {}) == {"n_vocab": f"it is {n_vocab}, not 8"}


def test_rows_that_stand_for_no_token_are_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "vocabulary_size", lambda *_: 3)
    tensors = {"decoder.token_embedding.weight": torch.arange(5)[:, None]}
    with pytest.warns(UserWarning, match="the 2 rows of the token embedding"):
        dims = checkpoint._without_added_rows(ROOT, replace(SIZES["tiny"], n_vocab=5), tensors, {})
    assert dims.n_vocab == 3 and tensors["decoder.token_embedding.weight"].flatten().tolist() == [0, 1, 2]
