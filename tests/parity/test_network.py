"""The graphs that transcribe, all in a row."""

import pytest

from reference.activations import AUDIO
from reference.chain import run_chain
from reference.models import CHECKPOINT, FIXTURE
from reference.results import Run
from reference.suite import Suite


def test_chain(suite: Suite, run: Run) -> None:
    """Judges every submodule in the order of computing; of a trained model on every kind of audio."""
    for kind in AUDIO if suite.model.size in (FIXTURE, CHECKPOINT) else ("speech",):
        chain = run_chain(suite, kind)
        run.chains.append(chain)
        if not chain.passed:
            pytest.fail(f"\n{chain}", pytrace=False)
