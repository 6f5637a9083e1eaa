"""From tokens to vectors, and from vectors to logits."""

from reference.judge import Judgement
from reference.suite import Suite

from . import isolated


@isolated.blocks("embedding", "logits")
def test_isolated(model: Suite, block: str, judgements: list[Judgement]) -> None:
    isolated.check(model, block, judgements)
