"""float32 on a GPU: PyTorch's stays float32."""

import pytest
import torch

from maxwhisper.blocks import BLOCKS
from reference.judge import Comparison
from reference.suite import FIXTURE, Suite, load


@pytest.fixture(scope="module")
def fixture() -> Suite:
    return Suite(load(FIXTURE), torch.float32)


def comparison(fixture: Suite, block: str) -> Comparison:
    return list(fixture.comparisons(BLOCKS[block], ["speech"]))[-1]


# ---- PyTorch -------------------------------------------------------------------------------------------------------


def test_the_peer_computes_without_tf32(fixture: Suite) -> None:
    seen = []

    def look(*_: object) -> None:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    of = comparison(fixture, "encoder.stem")
    hook = fixture.peer.encoder.conv1.register_forward_hook(look)
    fixture.references(of, fixture.inputs(BLOCKS[of.block], of))
    hook.remove()
    assert seen == [(False, False)]
