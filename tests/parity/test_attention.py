"""Attention in its four uses: over audio, causal, cached, and across from text to audio."""

import pytest

from reference.judge import Comparison
from reference.results import Run

from . import isolated


@pytest.mark.compares("attention", "cross_attention")
def test_isolated(
    comparison: Comparison, suite_for: isolated.SuiteFor, run: Run, request: pytest.FixtureRequest
) -> None:
    isolated.check(comparison, suite_for, run, request)
