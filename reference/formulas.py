"""The verdict on what is no block of the network: numbers that MAX finds, beside the formula that they are found by."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from .judge import UNIT_ROUNDOFF, Comparison, Judgement, condition, judge, judge_by_condition

Formula = Callable[[dict[str, Tensor]], list[Tensor]]
"""From inputs by name to outputs, in the dtype of the inputs."""


@torch.no_grad()
def judge_formula(
    name: str,
    formula: Formula,
    inputs: Mapping[str, Tensor],
    subject: list[Tensor],
    *,
    longest_reduction: int,
    peer: list[Tensor] | None = None,
) -> Judgement:
    """Judges what MAX made of inputs as a block's outputs are judged.

    formula: the oracle makes it of the inputs in float64. peer: what PyTorch made of them, if that is not what the
    formula gives in float32. longest_reduction: as for `judge`.
    """
    exact = in_float64(inputs)
    comparison = Comparison("a formula", torch.float32, name, 0, "inputs of a test")
    three = formula(exact), formula(dict(inputs)) if peer is None else peer, subject
    verdict = partial(judge, comparison, *three, longest_reduction=longest_reduction)
    return judge_by_condition(verdict, lambda: condition(formula, exact, UNIT_ROUNDOFF[torch.float32]))


def in_float64(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns inputs as the oracle takes them."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def bound_of_sums(n_term: int, terms: Tensor) -> Tensor:
    """Returns the most by which sums of n_term products can be off in float32, in whatever order they are added.

    terms: the sums of the products' absolute values.
    """
    return n_term * UNIT_ROUNDOFF[torch.float32] * terms
