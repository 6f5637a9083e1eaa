"""Every block under pytest-benchmark, MAX and PyTorch side by side, on the true inputs of one layer.

    pytest tests/perf --benchmark-autosave
    pytest tests/perf --benchmark-compare --benchmark-compare-fail=median:10%

Graphs are compiled and run once before anything is timed. A decoder's step is timed at the end of the text.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from maxwhisper.blocks import BLOCKS
from reference.blocks import TWINS
from reference.judge import dtype_name
from reference.suite import Suite

ENGINES = ("MAX", "PyTorch")


@pytest.mark.benchmarked
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", BLOCKS)
def test_block(benchmark: BenchmarkFixture, suite: Suite, block: str, engine: str) -> None:
    comparison = list(suite.comparisons(BLOCKS[block], ["speech"]))[-1]
    inputs = suite.inputs(BLOCKS[block], comparison)
    there = {name: x.to(suite.torch_device) if x.ndim else x for name, x in inputs.items()}
    run, twin = suite.executable(BLOCKS[block], comparison.layer), TWINS[block]

    def on_max() -> None:
        run(*there.values())
        synchronize(suite)

    def on_pytorch() -> None:
        with torch.inference_mode():
            twin(suite.peer, comparison.layer, **there)
        synchronize(suite)

    timed = on_max if engine == "MAX" else on_pytorch
    timed()
    benchmark.group = f"{block}, {suite.model.size}, {dtype_name(suite.dtype)}, {suite.device}"
    benchmark.extra_info |= {"engine": engine, "shapes": {name: list(x.shape) for name, x in inputs.items()}}
    benchmark(timed)


def synchronize(suite: Suite) -> None:
    """A GPU works on while Python goes on; the time is that of the work."""
    if suite.device == "gpu":
        torch.cuda.synchronize()
