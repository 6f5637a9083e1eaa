"""The log-mel spectrogram."""

from reference.judge import Judgement
from reference.suite import Suite

from . import isolated


@isolated.blocks("log_mel")
def test_isolated(model: Suite, block: str, judgements: list[Judgement]) -> None:
    isolated.check(model, block, judgements)
