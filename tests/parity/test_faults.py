"""The judge on trial: every wrong model is caught, in the block that is wrong."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from maxwhisper.blocks import BLOCKS
from reference.faults import (
    Fault,
    compile_graph_faults,
    graph_faults,
    isolated,
    verdict,
    weight_fault_judgements,
    weight_faults,
)
from reference.judge import Judgement
from reference.results import Run
from reference.suite import FIXTURE, Suite

from .isolated import SuiteFor

WEIGHT_FAULTS, GRAPH_FAULTS = list(weight_faults()), list(graph_faults())
Tried = tuple[list[Judgement], str | None]


def try_on_the_judge(
    fault: Fault, suite: Suite, suite_for: SuiteFor, run: Run, attempt: Callable[[Suite, Fault], Tried]
) -> None:
    """Records the verdict and fails unless it is accepted. `attempt` gives judgements and the first divergence."""
    if fault.block == "log_mel" and suite.dtype != torch.float32:
        pytest.skip("the log-mel spectrogram is float32 in every dtype")
    judgements, divergence = attempt(suite, fault)
    in_float32 = judgements
    if suite.dtype != torch.float32:
        in_float32 = attempt(suite_for(FIXTURE, torch.float32), fault)[0]
    found = verdict(fault, suite.dtype, judgements, in_float32, divergence)
    run.faults.append(found)
    if not found.accepted:
        pytest.fail(f"\n{found}", pytrace=False)


@pytest.mark.faults("weights")
@pytest.mark.parametrize("fault", WEIGHT_FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_weight_fault(fault: Fault, suite: Suite, suite_for: SuiteFor, run: Run) -> None:
    try_on_the_judge(fault, suite, suite_for, run, try_weights)


@cache
def try_weights(suite: Suite, fault: Fault) -> Tried:
    return weight_fault_judgements(suite, fault)


@pytest.mark.faults("graphs")
@pytest.mark.parametrize("fault", GRAPH_FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_graph_fault(fault: Fault, suite: Suite, suite_for: SuiteFor, run: Run) -> None:
    try_on_the_judge(fault, suite, suite_for, run, try_graph)


@cache
def try_graph(suite: Suite, fault: Fault) -> Tried:
    return list(isolated(suite, fault, compiled(suite)[fault.name])), None


compiled = cache(lambda suite: compile_graph_faults(suite, GRAPH_FAULTS))


def test_there_are_at_least_forty_faults_each_in_a_block_of_its_own_name() -> None:
    faults = [*WEIGHT_FAULTS, *GRAPH_FAULTS]
    assert len({fault.name for fault in faults}) == len(faults) >= 40
    assert {fault.block for fault in faults} <= BLOCKS.keys()
