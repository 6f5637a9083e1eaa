"""float32 on a GPU: PyTorch's stays float32, and what is computed in TF32 in its place is named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from whisper.model import disable_sdpa

from maxwhisper.network.blocks import BLOCKS
from reference.blocks import TWINS
from reference.judge import Comparison, Condition, Judgement
from reference.models import FIXTURE, load
from reference.results import Run
from reference.suite import Suite
from reference.tf32 import TF32, name, operand
from reference.trial import Trial

from .reports import written

LAST_BITS = 23 - 10


@pytest.fixture(scope="module")
def fixture() -> Suite:
    return Suite(load(FIXTURE), torch.float32)


def comparison(fixture: Suite, block: str) -> Comparison:
    return list(fixture.comparisons(BLOCKS[block], ["speech"]))[-1]


# ---- PyTorch -------------------------------------------------------------------------------------------------------


def test_the_peer_computes_without_tf32(fixture: Suite) -> None:
    seen = []

    def look(*_: object) -> None:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    of = comparison(fixture, "encoder.stem")
    hook = fixture.peer.encoder.conv1.register_forward_hook(look)
    assert fixture.trial(of, Mock()).peer
    hook.remove()
    assert seen == [(False, False)]


# ---- TF32 ----------------------------------------------------------------------------------------------------------


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def test_operands_have_ten_bits_of_mantissa() -> None:
    """Bits are rounded, ties to the even one, or cut off."""
    x = torch.randn(10_000) * 2.0 ** torch.randint(-30, 30, (10_000,))
    halfway = bits(x) >> LAST_BITS << LAST_BITS | 1 << LAST_BITS - 1
    for values in (x, halfway.view(torch.float32), torch.tensor([0.0, 1.0, -1.0, 65504.0])):
        even = bits(values) >> LAST_BITS & 1
        rounded = bits(values) + (1 << LAST_BITS - 1) - 1 + even >> LAST_BITS << LAST_BITS
        assert torch.equal(operand(values, "rounded to"), rounded.view(torch.float32))
        assert torch.equal(
            operand(values, "cut off after"), (bits(values) >> LAST_BITS << LAST_BITS).view(torch.float32)
        )
        assert torch.equal(operand(values.double(), "rounded to"), operand(values, "rounded to").double())


PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "convolution": 0}
"""Of ATen, and where the first of their two operands stands."""


class Operands(TorchDispatchMode):
    """While this is open, collects the operands of every product, and the names of other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func._schema.name.removeprefix("aten::")
        if operation in PRODUCTS:
            self.found += args[PRODUCTS[operation] :][:2]
        else:
            self.others.add(operation)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_every_product_of_a_twin_has_operands_in_tf32(fixture: Suite, block: str) -> None:
    of = comparison(fixture, block)
    with Operands() as operands, TF32("rounded to"):
        TWINS[block](fixture.peer, of.layer, **fixture.inputs(BLOCKS[block], of))
    assert operands.found or "layer_norm" in block or "embedding" in block
    assert all(torch.equal(x, operand(x, "rounded to")) for x in operands.found)
    assert not [other for other in operands.others if "attention" in other or "linear" in other or "mv" in other]


# ---- what a failure looks like -------------------------------------------------------------------------------------


@contextmanager
def in_float16(fixture: Suite, module: str) -> Iterator[None]:
    """Rounds what the submodules of a name make to float16, which has TF32's mantissa."""
    modules = [each for path, each in fixture.peer.named_modules() if path.endswith(module)]
    hooks = [each.register_forward_hook(lambda _, inputs, output: output.half().float()) for each in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Kept(Trial):
    """A trial that finds once what it needs for whatever subject."""

    in_tf32 = cache(Trial.in_tf32)

    @cached_property
    def condition(self) -> Condition:
        return super().condition


@pytest.fixture(scope="module")
def trial_of(fixture: Suite) -> Callable[[str], Trial]:
    """Returns what gives the trial of a block, the same each time."""

    @cache
    def trial(block: str) -> Trial:
        of = comparison(fixture, block)
        return Kept(fixture, of, fixture.inputs(BLOCKS[block], of), Mock())

    return trial


def judged(trial: Trial, around: Callable[[], Any], change: Callable[[Tensor], Tensor] = lambda x: x) -> Judgement:
    """Returns the explained verdict on PyTorch in float32 as the subject, computing in a context, its outputs
    changed."""
    of = trial.comparison
    with torch.no_grad(), around():
        outputs = [change(x) for x in TWINS[of.block](trial.suite.peer, of.layer, **trial.given)]
    return replace(trial.judge(outputs), explanations=trial.explain(outputs))


def named(judgement: Judgement) -> list[str]:
    """Returns the best explanation of each output."""
    return [e.diagnoses[0].name if e.diagnoses else "" for e in judgement.explanations]


WITH_PRODUCTS = ("encoder.stem", "encoder.attention", "encoder.mlp", "decoder.attention.causal", "decoder.logits.step")


@pytest.mark.parametrize(
    ("block", "rounding"), [*((block, "rounded to") for block in WITH_PRODUCTS), ("encoder.mlp", "cut off after")]
)
def test_tf32_fails_and_is_named(trial_of: Callable[[str], Trial], block: str, rounding: str, tmp_path: Path) -> None:
    judgement = judged(trial_of(block), lambda: TF32(rounding))
    assert not judgement.passed
    assert set(named(judgement)) == {name(rounding)}
    assert f"looks like: float32 products in TF32, operands {rounding}" in str(judgement)
    page, data, _ = written(Run(judgements=[judgement]), tmp_path, drawn=False)
    (found,) = data["judgements"]
    assert found["explanations"][0]["diagnoses"][0]["name"] == name(rounding)
    assert not found["passed"]
    assert name(rounding) in page


@pytest.mark.parametrize("block", WITH_PRODUCTS)
def test_what_is_scaled_or_rounded_at_the_end_is_not_taken_for_tf32(
    trial_of: Callable[[str], Trial], block: str
) -> None:
    for change in (lambda x: 1.56 * x, lambda x: x.half().float()):
        judgement = judged(trial_of(block), nullcontext, change)
        assert not judgement.passed and "TF32" not in str(judgement)


@pytest.mark.parametrize(
    ("block", "module"), [("encoder.mlp", "mlp.0"), ("encoder.mlp", "mlp.1"), ("encoder.attention", "value")]
)
def test_one_activation_in_float16_is_not_taken_for_tf32(
    trial_of: Callable[[str], Trial], fixture: Suite, block: str, module: str
) -> None:
    judgement = judged(trial_of(block), lambda: in_float16(fixture, module))
    assert not judgement.passed and "TF32" not in str(judgement)


@pytest.mark.parametrize("block", WITH_PRODUCTS)
def test_a_right_subject_is_not_taken_for_tf32(trial_of: Callable[[str], Trial], block: str) -> None:
    judgement = judged(trial_of(block), disable_sdpa)
    assert judgement.passed and "TF32" not in str(judgement)
