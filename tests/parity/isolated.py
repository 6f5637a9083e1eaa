"""The isolated parity test: every layer of a block, at every moment, against the budget."""

import pytest

from maxwhisper.blocks import BLOCKS
from reference.judge import Judgement
from reference.suite import Suite


def blocks(*families: str) -> pytest.MarkDecorator:
    """Parametrizes a test by the blocks whose dotted names hold one of the words, and fails where there is none."""
    names = [name for name in BLOCKS if any(family in name.split(".") for family in families)]
    assert names, f"no block is named after {families}"
    return pytest.mark.parametrize("block", names)


def check(model: Suite, block: str, judgements: list[Judgement]) -> None:
    """Judges the block and fails with every judgement that is not within budget."""
    found = list(model.judgements(BLOCKS[block]))
    judgements += found
    failed = [str(judgement) for judgement in found if not judgement.passed]
    assert not failed, "\n" + "\n".join(failed)
    assert found
