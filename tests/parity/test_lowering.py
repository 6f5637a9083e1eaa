"""The compile gate: every graph lowers for every target of --compile-only, on a machine that has none of them."""

import pytest
import torch

from maxwhisper.decoding.cpu import SELECT_TOKENS
from maxwhisper.decoding.gpu import SEARCH
from maxwhisper.engine.artifacts import HOST
from reference.judge import dtype_name
from reference.kernel_diff.graphs import read
from reference.lowering import Lowering
from reference.models import FIXTURE

LAUNCHES = {SELECT_TOKENS: 30, SEARCH: 31}
"""By the graph of a step on a GPU, how many kernels it launches at least in float16, in the fixture (3 layers), as
counted at 848fa9f. To be lowered with every kernel that is saved."""


def test_lowers(lowering: Lowering, size: str, dtype: torch.dtype, graph: str) -> None:
    if reason := lowering.failure(size, dtype, graph):
        name = dtype_name(dtype)
        pytest.fail(f"\n{graph} of {size} in {name} does not lower for {lowering.target}: {reason}", pytrace=False)


def test_a_step_launches_no_more_kernels_than_before(lowering: Lowering, size: str, dtype: torch.dtype) -> None:
    assert lowering.finish(), lowering.summary()
    if lowering.target == HOST or (size, dtype) != (FIXTURE, torch.float16):
        pytest.skip("counted are the fixture's steps on a GPU in float16")
    found = {name.block: graph.n_launch for name, graph in read(lowering.out).items() if name.dtype == "float16"}
    assert {name: found[name] for name in LAUNCHES if found[name] > LAUNCHES[name]} == {}
