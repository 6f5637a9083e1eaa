"""Attention in its four uses: over audio, causal, cached, and across from text to audio."""

from reference.judge import Judgement
from reference.suite import Suite

from . import isolated


@isolated.blocks("attention", "cross_attention")
def test_isolated(model: Suite, block: str, judgements: list[Judgement]) -> None:
    isolated.check(model, block, judgements)
