"""The two-layer perceptrons."""

from reference.judge import Judgement
from reference.suite import Suite

from . import isolated


@isolated.blocks("mlp")
def test_isolated(model: Suite, block: str, judgements: list[Judgement]) -> None:
    isolated.check(model, block, judgements)
