"""What the judge says of the arithmetic of kernels for GPUs: of that which an H100 failed with, and of that in its
place."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from maxwhisper.engine.surroundings import one_torch_thread
from maxwhisper.network.backends import PART
from maxwhisper.network.blocks import BLOCKS
from reference.activations import KINDS
from reference.fixtures import ROOT
from reference.judge import Comparison, Judgement
from reference.models import FIXTURE, load
from reference.suite import Suite

from .gpu_arithmetic import Attends, attention, cut_off, float32, mlp, of_operands, of_parts, one_after_another

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
ENCODER, PREFILL, STEP = "encoder.attention", "decoder.cross_attention.prefill", "decoder.cross_attention.step"
MLP = "decoder.mlp.prefill"
HALF = 768
"""Keys of the parts that MAX cuts 1,500 into, in multiples of 64."""

in_tf32 = of_operands(cut_off)
suite = cache(lambda dtype: Suite(load(FIXTURE), dtype))
trial = cache(lambda dtype, comparison: suite(dtype).trial(comparison, Mock()))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@torch.no_grad()
def judged(
    dtype: torch.dtype, block: str, run: Callable[[int], Callable[..., list[Tensor]]], kinds: Iterable[str]
) -> list[Judgement]:
    """Returns the verdicts on a block whose layers `run` computes, by their numbers."""

    def judge(comparison: Comparison) -> Judgement:
        of = trial(dtype, comparison)
        return of.judge(run(comparison.layer)(**of.given))

    return [judge(comparison) for comparison in suite(dtype).comparisons(BLOCKS[block], kinds)]


def attending(
    dtype: torch.dtype, block: str, attends: Attends, kinds: Iterable[str] = ("speech", "silence")
) -> list[Judgement]:
    return judged(dtype, block, lambda layer: attention(suite(dtype).peer, block, layer, attends), kinds)


def in_dtype(dtype: torch.dtype) -> Attends:
    """Returns attention as of tensor cores, whose operands are of the dtype."""
    return Attends(values=of_operands(lambda x: x.to(dtype).float()))


OURS = Attends(part=PART)
RIGHT = {
    "many queries, float16": (FLOAT16, ENCODER, in_dtype(FLOAT16)),
    "many queries, bfloat16": (BFLOAT16, ENCODER, in_dtype(BFLOAT16)),
    "many queries, float32": (FLOAT32, PREFILL, OURS),
    "a text's, float16": (FLOAT16, PREFILL, in_dtype(FLOAT16)),
    "one query, float16": (FLOAT16, STEP, OURS),
    "one query, bfloat16": (BFLOAT16, STEP, OURS),
    "one query, float32": (FLOAT32, STEP, OURS),
}
WRONG = {  # as MAX's kernels compute, but for the third and the last
    "parts weighed by exp, float32": (FLOAT32, STEP, Attends(part=HALF, power=torch.exp)),
    "parts weighed by exp, float16": (FLOAT16, STEP, Attends(part=HALF, power=torch.exp)),
    "ours, weighed by exp": (FLOAT16, STEP, Attends(part=PART, power=torch.exp)),
    "probabilities cut off to TF32, float16": (FLOAT16, ENCODER, Attends(in_tf32, in_tf32)),
    "products cut off to TF32, many queries": (FLOAT32, PREFILL, Attends(in_tf32, in_tf32)),
    "products cut off to TF32, one query": (FLOAT32, STEP, Attends(in_tf32, in_tf32)),
    "one long sum, many queries": (FLOAT32, PREFILL, Attends(values=one_after_another)),
    "parts of TF32 that are not promoted": (FLOAT32, STEP, Attends(of_parts(None), of_parts(None))),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_arithmetic_passes(name: str) -> None:
    for judgement in attending(*RIGHT[name]):
        assert judgement.passed, f"\n{judgement}"


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*RIGHT, "encoder, float32"])
def test_right_arithmetic_passes_on_all_inputs(name: str) -> None:
    for judgement in attending(*RIGHT.get(name, (FLOAT32, ENCODER, OURS)), KINDS):
        assert judgement.passed, f"\n{judgement}"


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arithmetic_fails_under_the_name_of_its_block(name: str) -> None:
    failed = [judgement for judgement in attending(*WRONG[name], ["speech"]) if not judgement.passed]
    assert failed and all(WRONG[name][1] in str(judgement) for judgement in failed)


def test_it_is_the_power_that_is_wrong() -> None:
    """So an H100 failed: by a hundred budgets, where the same parts weighed by exp2 pass."""
    by_exp, by_exp2 = (
        attending(FLOAT16, STEP, Attends(in_tf32, in_tf32, HALF, power)) for power in (torch.exp, torch.exp2)
    )
    assert max(measure.used for judgement in by_exp for _, measure in judgement.measures) > 100
    assert all(judgement.passed for judgement in by_exp2)


def test_the_numbers_of_the_write_up() -> None:
    """They stand in docs/max-split-attention.md, whose script needs a GPU."""
    q, (k, v) = torch.ones(1, 1, 1, 64), torch.zeros(2, 1, 1, 1500, 64)
    k[:, :, HALF:], v[:, :, HALF:] = 0.25, 1
    written = (ROOT / "docs" / "max-split-attention.md").read_text()
    for power, says in ((torch.exp2, "= {:.4f}.\n"), (torch.exp, "an H100 prints {:.4f} for the first")):
        assert says.format(Attends(part=HALF, power=power)(q, k, v).mean()) in written


@pytest.mark.parametrize(
    ("product", "passes"),
    [(float32, True), (in_tf32, False), (of_parts(32), True), (of_parts(None), False)],
    ids=["float32", "TF32", "parts, promoted", "parts, not promoted"],
)
def test_products_of_float32(product: Callable[[Tensor, Tensor], Tensor], passes: bool) -> None:
    judgements = judged(FLOAT32, MLP, lambda layer: mlp(suite(FLOAT32).peer, layer, product), ["speech", "random"])
    assert all(judgement.passed for judgement in judgements) == passes
    assert all(MLP in str(judgement) for judgement in judgements)
