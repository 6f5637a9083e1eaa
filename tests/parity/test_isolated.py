"""Every block of the table on its own, in every layer, on every kind of inputs, against its budget."""

import shlex
from dataclasses import replace

import pytest

from reference.chain import AUDIO, run_chain
from reference.judge import Comparison, Judgement, dtype_name
from reference.models import CHECKPOINT
from reference.pytest_plugin.models import SuiteFor
from reference.results import Run
from reference.suite import Suite


def test_isolated(comparison: Comparison, suite_for: SuiteFor, run: Run, request: pytest.FixtureRequest) -> None:
    """Judges the comparison; a failure says all there is to know about it on one screen."""
    suite = suite_for(comparison.size, comparison.dtype)
    judgement = suite.judge(comparison)
    if judgement.pairs and not (judgement.passed or judgement.explanations):
        judgement = replace(judgement, explanations=suite.explain(comparison))
    run.judgements.append(judgement)
    if not judgement.passed:
        pytest.fail(f"\n{message(judgement, suite, request.node.nodeid)}", pytrace=False)


def message(judgement: Judgement, suite: Suite, node: str) -> str:
    c = judgement.comparison
    model = ["--checkpoint", str(suite.model.source)] if c.size == CHECKPOINT else ["--size", c.size]
    options = shlex.join([*model, "--dtype", dtype_name(c.dtype), "--device", c.device])
    return f"""isolated: {judgement}
chained: {chained(judgement, suite)}
again: pytest '{node}' {options}"""


def chained(judgement: Judgement, suite: Suite) -> str:
    """Returns what the same block does where it is fed by the blocks before it, on MAX."""
    if not judgement.pairs:
        return "not run"
    kind = judgement.comparison.inputs.partition(".")[0]
    chain = run_chain(suite, kind if kind in AUDIO else "speech")
    return f"first divergence {chain.first_divergence}" if chain.first_divergence else "within budget everywhere"
