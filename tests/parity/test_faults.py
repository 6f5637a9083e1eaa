"""The judge on trial: every wrong model is caught, in the block that is wrong."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from maxwhisper.engine.program import Executable
from reference.chain import first_divergence
from reference.faults import (
    Fault,
    compile_graph_faults,
    isolated,
    result_of,
    until_caught,
    with_weight_fault,
)
from reference.graph_faults import graph_faults
from reference.models import FIXTURE
from reference.pytest_plugin.models import SuiteFor
from reference.results import Run
from reference.suite import Suite
from reference.weight_faults import weight_faults

GraphsWith = Callable[[Suite, Fault], dict[str, Executable]]
WEIGHT_FAULTS, GRAPH_FAULTS = list(weight_faults()), list(graph_faults())


def try_on_the_judge(fault: Fault, suite: Suite, suite_for: SuiteFor, run: Run, graphs: GraphsWith) -> None:
    """Records the result and fails unless it is accepted. `graphs` gives a suite's graphs with the fault in them."""
    if fault.block == "log_mel" and suite.dtype != torch.float32:
        pytest.skip("the log-mel spectrogram is float32 in every dtype")
    wrong = graphs(suite, fault)
    judgements = until_caught(isolated(suite, fault, wrong[fault.block]))
    # A graph fault is in one block's graph only, so there is no chain to run.
    divergence = first_divergence(suite, wrong) if fault.change else None
    in_float32 = judgements
    if judgements[-1].passed and not divergence and suite.dtype != torch.float32:
        exact = suite_for(FIXTURE, torch.float32)
        in_float32 = list(isolated(exact, fault, graphs(exact, fault)[fault.block]))
    found = result_of(fault, suite.dtype, judgements, in_float32, divergence)
    run.faults.append(found)
    if not found.accepted:
        pytest.fail(f"\n{found}", pytrace=False)
    if not found.caught and not found.below_rounding:
        pytest.xfail(f"the effect is between PyTorch's rounding and the budget\n{found}")


@pytest.mark.faults("weights")
@pytest.mark.parametrize("fault", WEIGHT_FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_weight_fault(fault: Fault, suite: Suite, suite_for: SuiteFor, run: Run) -> None:
    try_on_the_judge(fault, suite, suite_for, run, with_weight_fault)


@pytest.mark.faults("graphs")
@pytest.mark.parametrize("fault", GRAPH_FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_graph_fault(fault: Fault, suite: Suite, suite_for: SuiteFor, run: Run) -> None:
    try_on_the_judge(fault, suite, suite_for, run, lambda suite, fault: {fault.block: compiled(suite)[fault.name]})


@cache
def compiled(suite: Suite) -> dict[str, Executable]:
    return compile_graph_faults(suite, GRAPH_FAULTS)
