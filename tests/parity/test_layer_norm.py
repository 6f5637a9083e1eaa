"""Layer norm."""

from reference.judge import Judgement
from reference.suite import Suite

from . import isolated


@isolated.blocks("layer_norm")
def test_isolated(model: Suite, block: str, judgements: list[Judgement]) -> None:
    isolated.check(model, block, judgements)
