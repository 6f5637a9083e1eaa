"""Logits over every clip, the right text given: how far the probabilities of every next token are from the oracle's."""

from typing import Any

import pytest

from reference.activations import CLIPS
from reference.chain import teacher_forced
from reference.results import Run
from reference.suite import Suite


@pytest.mark.trained
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip["file"])
def test_logits_given_the_text(suite: Suite, clip: dict[str, Any], run: Run) -> None:
    judgement = teacher_forced(suite, clip)
    run.judgements.append(judgement)
    if not judgement.passed:
        pytest.fail(f"\n{judgement}", pytrace=False)
