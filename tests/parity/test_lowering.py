"""The compile gate: every graph lowers for every target of --compile-only, on a machine that has none of them."""

import pytest
import torch

from reference.judge import dtype_name
from reference.lowering import Lowering


def test_lowers(lowering: Lowering, size: str, dtype: torch.dtype, graph: str) -> None:
    if reason := lowering.failure(size, dtype, graph):
        name = dtype_name(dtype)
        pytest.fail(f"\n{graph} of {size} in {name} does not lower for {lowering.target}: {reason}", pytrace=False)
