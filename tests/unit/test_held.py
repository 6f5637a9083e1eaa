"""What counts of tests that leave no verdict, and what is given and said where nothing right can come of it."""

import math
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from maxwhisper.network.blocks import Block
from reference.faults import fault_totals, isolated, result_of, until_caught
from reference.judge import Comparison
from reference.models import SIZES
from reference.pytest_plugin.ending import Ending
from reference.report.data import as_data
from reference.report.figures import figures_of
from reference.results import Run
from reference.suite import Suite
from reference.trial import Trial

from .reports import failing, fault, judgement


@pytest.mark.parametrize(
    ("folder", "fixtures", "when", "passed", "held"),
    [
        ("parity", [], "call", True, True),
        ("parity", [], "call", False, False),
        ("parity", [], "setup", True, False),
        ("parity", ["run"], "call", True, False),  # which leaves a verdict
        ("unit", [], "call", True, False),
    ],
)
def test_what_passed_and_leaves_no_verdict_is_held(
    folder: str, fixtures: list[str], when: str, passed: bool, held: bool
) -> None:
    run, node = Run(), f"tests/{folder}/test_a.py::test"
    ending = Ending(Mock(spec=["getoption"], getoption=lambda name: None), run)
    making = ending.pytest_runtest_makereport(Mock(nodeid=node, fixturenames=fixtures))
    next(making)
    with pytest.raises(StopIteration):
        making.send(Mock(when=when, passed=passed, skipped=False, nodeid=node))
    assert run.held == [node] * held and run.compared == held


@pytest.mark.parametrize(
    ("required", "expected", "outcome"), [(True, False, "failed"), (True, True, "skipped"), (False, False, "skipped")]
)
def test_a_skip_is_a_failure_where_all_must_run(required: bool, expected: bool, outcome: str) -> None:
    ending = Ending(Mock(spec=["getoption"], getoption=lambda name: required), Run())
    making = ending.pytest_runtest_makereport(Mock(nodeid="tests/unit/test_a.py::test", fixturenames=[]))
    next(making)
    report: Any = SimpleNamespace(when="call", skipped=True, passed=False, outcome="skipped", longrepr=("a", 1, "why"))
    if expected:
        report.wasxfail = "it is known"
    with pytest.raises(StopIteration):
        making.send(report)
    assert report.outcome == outcome


def test_what_runs_before_a_cut_is_given_nothing_that_comes_right() -> None:
    given = {"x": torch.ones(2, 3), "tokens": torch.tensor([[5, 6]]), "offset": torch.tensor(3)}
    comparison = Comparison("s", torch.float32, "decoder.step", 0, "speech.late")
    found = Trial(None, comparison, given, None).no_numbers  # type: ignore[arg-type]
    assert found["x"].isnan().all() and found["x"].shape == (2, 3)
    assert found["tokens"].tolist() == [[0, 0]] and found["offset"] == 3


@pytest.mark.parametrize("wrong", [None, (0, 1), (1, 2)])
def test_every_value_is_finite_where_pytorchs_or_the_oracles_is(wrong: tuple[int, int] | None) -> None:
    """Of every output: in the first PyTorch has a NaN that the oracle has not, in the second the other way round."""
    comparison = Comparison("s", torch.float32, "decoder.step", 0, "speech.late")
    trial = Trial(None, comparison, {}, None)  # type: ignore[arg-type]
    right = [torch.ones(3), torch.ones(3)]
    peer, oracle, subject = ([x.clone() for x in right] for _ in range(3))
    peer[0][0] = oracle[1][0] = subject[1][0] = torch.nan
    if wrong:
        subject[wrong[0]][wrong[1]] = torch.inf
    vars(trial).update(peer=peer, oracle=oracle, subject=subject)
    assert trial.finite_as_pytorch() == (wrong is None)


def test_a_ratio_that_is_no_number_is_the_worst_of_a_block() -> None:
    found = figures_of([judgement(error=error) for error in (math.nan, 2e-7, 1e-7)])
    assert math.isnan(found.worst) and found.best == judgement(error=1e-7).ratio and found.failed == 1
    assert found.median == judgement(error=2e-7).ratio and found.used == math.inf


# ---- faults --------------------------------------------------------------------------------------------------------


def test_a_fault_is_caught_by_what_max_errs_by_or_by_what_cannot_be_compared() -> None:
    """Not by a yardstick that is bad, as which the right model would be caught too."""
    wrong, right = fault("a").fault, judgement(error=1e-7)
    output = right.outputs[0]
    bad = replace(right, outputs=(replace(output, measures=(replace(output.measures[0], ceiling=0.0),)),))
    assert not bad.passed and result_of(wrong, torch.bfloat16, [bad], [bad], None).checks == ()
    other_shape = replace(right, outputs=(), defects=("shape",))
    found = result_of(wrong, torch.bfloat16, [other_shape], [], None)
    assert found.checks == ("isolated: not comparable",) and found.used == math.inf and found.accepted


def test_only_what_was_not_caught_is_below_rounding() -> None:
    little = {"effect": {"speech": 1e-5}, "rounding": {"speech": 1e-3}}
    some = {"effect": {"speech": 3e-3}, "rounding": {"speech": 1e-3}}
    faults = [
        fault(f"{n}", torch.bfloat16, checks, **of)
        for n, (checks, of) in enumerate(  # type: ignore[arg-type]
            [(("KL max",), little), ((), little), ((), some), ((), {})]
        )
    ]
    found = fault_totals(faults)["bfloat16"]
    assert (found.n, found.caught, found.below, found.between, found.missed) == (4, 1, 1, 1, 1)


def test_a_block_is_judged_until_the_fault_shows() -> None:
    right, wrong = judgement(), judgement(error=9e-7)
    assert until_caught([right, wrong, right]) == [right, wrong] and until_caught([right, right]) == [right, right]


def test_failures_are_counted_whatever_they_are_of() -> None:
    found = as_data(failing(), {})["totals"]
    assert (found["comparisons"], found["comparisons_failed"]) == (8, 5), "of values, and of what is no number"
    assert (found["chains_failed"], found["transcripts_failed"]) == (1, 1)


@pytest.mark.parametrize(
    ("divergence", "right"),
    [
        (None, True),
        ("encoder.blocks.1.mlp", True),
        ("encoder.blocks.1.mlp.0", True),
        ("encoder.blocks.0.mlp", False),
        ("encoder.blocks.1.attn", False),
        ("encoder", False),
        ("decoder.ln", False),
    ],
)
def test_the_chain_must_diverge_inside_the_block_that_is_wrong(divergence: str | None, right: bool) -> None:
    found = fault("a", checks=("KL max", "chain"), divergence=divergence)
    assert found.caught and (found.right_block, found.accepted) == (right, right)
    of_step = replace(found, fault=replace(found.fault, path="decoder.ln"), divergence="step decoder.ln")
    assert of_step.right_block
    missed = replace(found, checks=())
    assert not missed.right_block and not missed.accepted


def test_a_fault_is_judged_in_its_own_layer() -> None:
    """The weights of others are right, so there the block would be wrong whatever the fault."""
    found = torch.ones(2)

    class StubSuite:
        dims, trials = SIZES["tiny"], dict[Comparison, Any]()

        def comparisons(self, block: Block, kinds: Iterable[str]) -> list[Comparison]:
            return [Comparison("s", torch.float32, block.name, n, "speech") for n in range(4)]

        def trial(self, comparison: Comparison) -> Any:
            def judge(outputs: list[Tensor]) -> tuple[int, bool]:
                return comparison.layer, outputs[0] is found

            return SimpleNamespace(there={"x": 3}, judge=judge)

    suite: Any = StubSuite()

    def run(x: int) -> list[Tensor]:
        return [found] if x == 3 else []

    of_block = fault("a").fault
    assert list(isolated(suite, of_block, run)) == [(1, True)]
    assert list(isolated(suite, replace(of_block, block="encoder.stem"), run)) == [(0, True)]


# ---- loaders -------------------------------------------------------------------------------------------------------


def test_a_wrong_dimension_is_every_blocks_and_a_wrong_tensor_its_own() -> None:
    model: Any = SimpleNamespace(misread={"n_text_ctx": "it is 9", "encoder.blocks.1.mlp.0.weight": "it is zero"})
    suite = Suite(model, torch.float32)

    def misread(block: str, layer: int) -> list[str]:
        found = suite.misread(Comparison("s", torch.float32, block, layer, "speech"))
        return [line.removeprefix("the loaders of weights differ in ").partition(":")[0] for line in found]

    assert misread("encoder.mlp", 1) == misread("encoder", 0) == ["n_text_ctx", "encoder.blocks.1.mlp.0.weight"]
    assert misread("encoder.mlp", 0) == misread("decoder.step", 0) == misread("encoder.stem", 0) == ["n_text_ctx"]
