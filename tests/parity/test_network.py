"""The graphs that transcribe: encoder, cross-attention keys and values, decoder prefill and step, alignment."""

import pytest

from maxwhisper.blocks import BLOCKS
from reference.judge import Judgement
from reference.suite import Suite

from . import isolated


@pytest.mark.parametrize("block", [name for name, block in BLOCKS.items() if block.unit in ("network", "alignment")])
def test_isolated(model: Suite, block: str, judgements: list[Judgement]) -> None:
    isolated.check(model, block, judgements)
