"""Layer norm."""

import pytest

from reference.judge import Comparison
from reference.results import Run

from . import isolated


@pytest.mark.compares("layer_norm")
def test_isolated(
    comparison: Comparison, suite_for: isolated.SuiteFor, run: Run, request: pytest.FixtureRequest
) -> None:
    isolated.check(comparison, suite_for, run, request)
