"""Every block under pytest-benchmark, MAX and PyTorch side by side, on the true inputs of one layer.

    pytest tests/perf --benchmark-autosave
    pytest tests/perf --benchmark-compare --benchmark-compare-fail=median:10%

Graphs are compiled and run once before anything is timed. A decoder's step is timed at the end of the text. Each engine
computes in a process of its own, which also reads the clock (reference/perf/worker.py says why).
"""

import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from maxwhisper.blocks import BLOCKS
from reference.perf.costs import costs
from reference.perf.engine import ENGINES, Worker
from reference.perf.table import Row
from reference.suite import Suite

from .conftest import Timing


class EngineClock:
    """time.perf_counter without what passes between asking a worker for a call and its having made it, but for the
    call itself."""

    def __init__(self) -> None:
        self.outside = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self.outside

    def call(self, worker: Worker, block: str) -> None:
        """Has the block called once; this clock moves on by the seconds that the worker measured."""
        start = time.perf_counter()
        (seconds,) = worker.ask("time", block=block, calls=1)
        self.outside += time.perf_counter() - start - seconds


CLOCK = EngineClock()


@pytest.mark.benchmarked
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", BLOCKS)
def test_block(
    benchmark: BenchmarkFixture, suite: Suite, timing: Timing, tmp_path: Path, block: str, engine: str
) -> None:
    comparison = list(suite.comparisons(BLOCKS[block], ["speech"]))[-1]
    inputs = suite.inputs(BLOCKS[block], comparison)
    cost, setting = costs(suite, comparison)[engine], timing.setting(suite)
    worker, saved = timing.worker(setting, engine), str(tmp_path / "inputs.pt")
    timing.worker(setting, "PyTorch").ask("save", block=block, path=saved)  # not MAX's, to leave torch at rest there
    worker.ask("prepare", block=block, path=saved, engine=engine)

    benchmark.group = f"{block}, {setting}"
    benchmark.extra_info |= {"engine": engine, "shapes": {name: list(x.shape) for name, x in inputs.items()}}
    benchmark(CLOCK.call, worker, block)
    if benchmark.stats is None:  # --benchmark-disable
        return
    row = Row(block, engine, benchmark.stats.stats.median, cost)
    benchmark.extra_info |= row.rates(timing.ceilings(setting))
    timing.rows.setdefault(setting, []).append(row)
