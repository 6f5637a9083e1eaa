"""The judge's arithmetic by hand: budgets where PyTorch errs too, what is as bad as it gets, what is amplified."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.judge import UNIT_ROUNDOFF, Comparison, Judgement, Output, condition, judge, perturbed
from reference.measures import (
    WELL_CONDITIONED,
    Allowance,
    Condition,
    Measure,
    expected_maximum,
    kl_divergences,
    measure_logits,
    measure_values,
    norms,
    severity,
)

EXACT = Measure("x", subject=0.0, peer=0.0, budget=1.0, ceiling=1.0)


@pytest.mark.parametrize(
    ("changed", "within", "sound", "used", "ratio"),
    [
        ({}, True, True, 0.0, 1.0),
        ({"subject": 1.0, "peer": 1.0}, True, True, 1.0, 1.0),
        ({"subject": 1.5, "peer": 0.5}, False, True, 1.5, 3.0),
        ({"subject": 0.5, "peer": 1.5}, True, False, 0.5, 1 / 3),
        ({"subject": math.nan}, False, True, math.nan, math.inf),
        ({"peer": math.nan}, True, False, 0.0, math.nan),
        ({"budget": math.nan}, False, True, math.nan, 1.0),
        ({"ceiling": math.nan}, True, False, 0.0, 1.0),
        ({"budget": 0.0}, True, True, 0.0, 1.0),
        ({"budget": 0.0, "subject": 0.1}, False, True, math.inf, math.inf),
    ],
)
def test_what_a_measure_says(changed: dict[str, float], within: bool, sound: bool, used: float, ratio: float) -> None:
    measure = replace(EXACT, **changed)  # type: ignore[arg-type]
    assert (measure.within, measure.sound, measure.passed) == (within, sound, within and sound)
    assert severity(measure.used) == severity(used) and severity(measure.ratio) == severity(ratio)


def judgement(*outputs: list[Measure], defects: tuple[str, ...] = ()) -> Judgement:
    comparison = Comparison("s", torch.float32, "b", 0, "i")
    return Judgement(comparison, tuple(Output(i, (1,), tuple(each)) for i, each in enumerate(outputs)), defects)


def test_one_measure_of_one_output_fails_all() -> None:
    right, wrong = replace(EXACT, name="relative L2"), replace(EXACT, subject=2.0)
    assert judgement([right, right], [right]).passed
    for outputs in ([[wrong, right], [right]], [[right, right], [right, wrong]]):
        found = judgement(*outputs)
        assert not found.passed and found.worst is wrong and found.used == 2.0
    assert not judgement([right], defects=("shape",)).passed and judgement([right], defects=("shape",)).used == math.inf
    assert not judgement().passed and not judgement([]).passed and judgement().used == math.inf


ALLOWED = Allowance(values=2**-10, sums=2**-13, most=2**-7)
SIGNS = torch.tensor([[1.0, -1.0] * 4, [-1.0, 1.0] * 4] * 50, dtype=torch.float64)
"""100 positions of 8 channels, whose size is 1."""


def measured(oracle: Tensor, peer: Tensor, subject: Tensor, allowed: Allowance = ALLOWED) -> dict[str, Measure]:
    of = measure_values(norms(oracle), norms(peer - oracle), norms(subject - oracle), allowed)
    return {measure.name: measure for measure in of}


@pytest.mark.parametrize("error", [2**-16, 2**-8])
def test_a_budget_is_k_times_pytorchs_error_or_what_is_expected_not_both(error: float) -> None:
    """Of a peer that is off by the same everywhere."""
    found = measured(SIGNS, SIGNS + error, SIGNS)
    least = 4 * 2**-10
    exact = {
        "relative L2": least,
        "worst position": 2**-7 * expected_maximum(100),
        "worst channel": least * expected_maximum(8),
        "worst small channel": least * expected_maximum(4),
        "worst channel's mean": 4 * 2**-13 * expected_maximum(8),
        "largest error / RMS": 2**-7 * expected_maximum(800),
    }
    assert {name: m.budget for name, m in found.items()} == {name: max(4 * error, x) for name, x in exact.items()}
    assert {m.peer for m in found.values()} == {error}


def test_the_error_of_zeros_and_of_twice_the_right_values_is_never_allowed() -> None:
    found = measured(SIGNS, SIGNS * 1.5, SIGNS * 2, replace(ALLOWED, ceilings=False))
    assert found["relative L2"].budget == 1 - 2**-7 and not found["relative L2"].within


@pytest.mark.parametrize("error", [0.5, -0.5])
def test_an_error_of_either_sign_is_one(error: float) -> None:
    """A bias that is missing is negative where it was positive."""
    subject = SIGNS.clone()
    subject[:, 3] += error
    found = measured(SIGNS, SIGNS, subject)["worst channel's mean"]
    assert found.subject == 0.5 and not found.within


def test_a_position_of_zeros_is_held_against_the_size_of_the_whole() -> None:
    oracle = torch.zeros(4, 8, dtype=torch.float64)
    oracle[2] = 1
    subject = oracle.clone()
    subject[1] = 0.25
    found = measured(oracle, oracle, subject)["worst position"]
    assert found.subject == 0.5 and not found.within


def test_what_rounding_explains_is_the_ceiling_of_the_peer() -> None:
    def ceilings(allowed: Allowance) -> dict[str, float]:
        return {name: m.ceiling for name, m in measured(SIGNS, SIGNS, SIGNS, allowed).items() if m.ceiling < math.inf}

    assert ceilings(ALLOWED) == {
        "relative L2": 4 * 2**-7,
        "worst channel": 4 * 2**-7 * expected_maximum(8),
        "largest error / RMS": 4 * 2**-7 * expected_maximum(800),
    }
    assert ceilings(replace(ALLOWED, ceilings=False)) == {}
    conditioned = replace(ALLOWED, condition=Condition(4.0, 64.0))
    found = measured(SIGNS, SIGNS, SIGNS, conditioned)
    assert found["relative L2"].budget == 4 * 2**-10 + 3 * 2**-7
    assert found["relative L2"].ceiling == 4 * 4 * 2**-7
    assert found["largest error / RMS"].ceiling == 64 * 4 * 2**-7, "16 times as much as all are"


def test_a_large_value_may_be_off_by_as_much_as_it_is_larger() -> None:
    oracle = torch.zeros(64, 4, dtype=torch.float64)
    oracle[3, 1] = 16.0
    found = measured(oracle, oracle, oracle)
    assert found["largest error / RMS"].budget == 2**-7 * 16
    assert found["worst channel"].budget == 4 * 2**-10 * 2 * expected_maximum(4)


def test_half_of_the_channels_are_small() -> None:
    """Of three, two, beside which a large one does not count."""
    oracle = torch.tensor([[1.0, 64.0, -1.0]] * 4, dtype=torch.float64)
    subject = oracle.clone()
    subject[:, 2] += 0.5
    assert measured(oracle, oracle, subject)["worst small channel"].subject == 0.5
    subject = oracle.clone()
    subject[:, 1] += 0.5
    assert measured(oracle, oracle, subject)["worst small channel"].subject == 0


def test_the_largest_of_few_is_no_smaller_than_one() -> None:
    assert [expected_maximum(n) for n in (1, 2, 100)] == [1.0, *(math.sqrt(2 * math.log(n)) for n in (2, 100))]


@pytest.mark.parametrize(
    ("size", "smallest", "expected"), [(8.0, 0.0, 8.0), (8.0, 2.0, 8.0), (1.0, 2.0, 2.0), (0.0, 2.0, 1.0)]
)
def test_the_size_that_errors_are_relative_to(size: float, smallest: float, expected: float) -> None:
    assert norms(torch.full((2, 4), size, dtype=torch.float64), smallest).size == expected


# ---- probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_position", [1, 4, 6])
def test_divergences_are_of_every_position(n_position: int) -> None:
    right, other = torch.randn(2, n_position, 5, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(other.log_softmax(1), right.log_softmax(1), reduction="none", log_target=True)
    assert kl_divergences(right, other)[0].equal(expected.sum(1))


def test_what_cancels_out_to_less_than_nothing_is_no_divergence() -> None:
    right = torch.randn(200, 50)
    found = kl_divergences(right, right + 1000)[0]
    assert (found >= 0).all() and (found == 0).any()


def test_budgets_of_probabilities_follow_pytorchs() -> None:
    oracle = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [2.0, 1.875]], dtype=torch.float64)
    peer = oracle.clone()
    peer[0, 0] += 0.125
    size, error = norms(oracle), norms(peer - oracle)
    found = {m.name: m for m in measure_logits(oracle, peer, oracle, size, error, 2**-10)}
    divergences = kl_divergences(oracle, peer)[0]
    for name, of in (("KL max", divergences.max()), ("KL mean", divergences.mean())):
        assert (found[name].peer, found[name].budget) == (float(of), (4 * float(of) ** 0.5) ** 2)
    assert found["top-1 margin"].budget == 2 * 4 * (0.125 / size.size)
    assert found["top-1 disagreement"].budget == 1 / 3, "two tokens nearer than twice the error of each"
    exact = {m.name: m for m in measure_logits(oracle, oracle, oracle, size, norms(oracle - oracle), 2**-10)}
    assert exact["KL max"].budget == (2**-10 * size.size / 2**0.5) ** 2
    assert exact["top-1 margin"].budget == 2 * 2**-10 * (2 / size.size), "of the largest logit"
    assert exact["top-1 disagreement"].budget == 0


# ---- what is compared ----------------------------------------------------------------------------------------------


def verdict(oracle: list[Tensor], peer: list[Tensor], subject: list[Tensor], **options: Any) -> Judgement:
    comparison = Comparison("s", torch.float32, "b", 0, "i")
    return judge(comparison, oracle, peer, subject, **{"longest_reduction": 16} | options)


@pytest.mark.parametrize("missing", ["oracle", "peer", "subject"])
def test_an_output_that_one_of_three_lacks_is_a_defect(missing: str) -> None:
    x = torch.ones(3, 4)
    three = {"oracle": [x.double()] * 2, "peer": [x] * 2, "subject": [x] * 2}
    three[missing] = three[missing][:1]
    found = verdict(**three)
    assert not found.passed and found.defects and found.pairs


def test_a_scalar_is_no_row_of_logits() -> None:
    one = torch.tensor(1.0)
    assert verdict([one.double()], [one], [one], n_vocab=1).passed


def test_values_of_one_number_and_of_chains_count_as_sums() -> None:
    """Of 9 roundings in a row: an output as wide as the vocabulary holds logits, others do not."""
    x = torch.ones(50, 16)
    found = {}
    for name, options in {"values": {}, "logits": {"n_vocab": 16}, "chained": {"chained": True}}.items():
        output = verdict([x.double()], [x], [x], roundings=9, **options).outputs[0]
        found[name] = output["worst channel's mean"].budget, output["relative L2"].ceiling < math.inf
    assert found["logits"][0] == found["chained"][0] > found["values"][0]
    assert [of[1] for of in found.values()] == [True, True, False]


# ---- conditions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_a_rounding_goes_up_and_down(dtype: torch.dtype) -> None:
    x, tokens = torch.arange(1.0, 1001.0, dtype=torch.float64), torch.arange(5)
    relative = perturbed(x, UNIT_ROUNDOFF[dtype], torch.Generator().manual_seed(0)) / x - 1
    assert relative.abs().max() < UNIT_ROUNDOFF[dtype] < relative.square().mean().sqrt() * 2
    assert 400 < int((relative > 0).sum()) < 600 and (relative != 0).all()
    assert perturbed(tokens, 0.5, torch.Generator()) is tokens


def test_a_condition_is_the_worst_of_any_output_and_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.judge.perturbed", lambda x, roundoff, generator: x * (1 + roundoff))
    amplified = iter([1.0, 1.0, 1.0, 8.0, 1.0])

    def oracle(given: dict[str, Tensor]) -> list[Tensor]:
        change = next(amplified) * (given["x"] - 1)
        single = torch.zeros_like(change)
        single[0] = 4 * change[0]
        return [1 + change / 2, 1 + single, 1 + change]

    x = torch.ones(64, dtype=torch.float64)
    found = condition(oracle, {"x": x}, 2**-10)
    assert (found.whole, found.largest, found.channel, found.mean) == (8.0, 32.0, 32.0, 32.0)
    assert condition(lambda given: [0 * given["x"] + 1], {"x": x}, 2**-10) == WELL_CONDITIONED
