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

LAUNCHES = {SELECT_TOKENS: 109, SEARCH: 105}
"""By the graph of a step on a GPU, how many kernels it launched at least in bfloat16, in the fixture (3 layers), at
f6d12ac, the last revision whose steps were counted; the second was `decoder.candidates` then. To be lowered with every
kernel that is saved."""


def test_lowers(lowering: Lowering, size: str, dtype: torch.dtype, graph: str) -> None:
    if reason := lowering.failure(size, dtype, graph):
        name = dtype_name(dtype)
        pytest.fail(f"\n{graph} of {size} in {name} does not lower for {lowering.target}: {reason}", pytrace=False)


def test_a_step_launches_no_more_kernels_than_before(lowering: Lowering, size: str, dtype: torch.dtype) -> None:
    assert lowering.finish(), lowering.summary()
    if lowering.target == HOST or (size, dtype) != (FIXTURE, torch.bfloat16):
        pytest.skip("counted are the fixture's steps on a GPU in bfloat16")
    found = {name.block: graph.n_launch for name, graph in read(lowering.out).items() if name.dtype == "bfloat16"}
    assert {name: found[name] for name in LAUNCHES if found[name] > LAUNCHES[name]} == {}
