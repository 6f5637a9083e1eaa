"""Every block under pytest-benchmark, MAX and PyTorch side by side, on the true inputs of one layer; and whole decode
loops.

    pytest tests/perf --benchmark-autosave
    pytest tests/perf --benchmark-compare --benchmark-compare-fail=median:10%

Graphs are compiled and run once before anything is timed. A decoder's step is timed at the end of the text. Each engine
computes in a process of its own, which also reads the clock (reference/perf/worker.py says why).
"""

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest
import torch

from maxwhisper.network.blocks import BLOCKS
from reference.perf.costs import Cost, costs
from reference.perf.engine import ENGINES, Worker
from reference.perf.table import Row
from reference.perf.worker import LOOPS, N_TOKEN
from reference.suite import Suite

from .conftest import Timing

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


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
DEVICE_CALLS = 20
"""Of which the median is the time on a GPU."""


class Timed:
    """What is benchmarked of a suite on an engine, under pytest-benchmark."""

    def __init__(self, benchmark: "BenchmarkFixture", suite: Suite, timing: Timing, tmp_path: Path):
        self.benchmark, self.timing, self.saved = benchmark, timing, str(tmp_path / "inputs.pt")
        self.setting = timing.setting(suite)

    def run(self, block: str, engine: str, cost: Cost | None, **extra_info: Any) -> None:
        timing, setting, benchmark = self.timing, self.setting, self.benchmark
        worker = timing.worker(setting, engine)
        timing.worker(setting, "PyTorch").ask("save", block=block, path=self.saved)  # torch is to be at rest in MAX's
        worker.ask("prepare", block=block, path=self.saved, engine=engine)
        benchmark.group = f"{block}, {setting}"
        benchmark.extra_info |= {"engine": engine, **extra_info}
        benchmark(CLOCK.call, worker, block)
        if benchmark.stats is None:  # --benchmark-disable
            return
        row = Row(block, engine, benchmark.stats.stats.median, cost)
        if device := worker.ask("device_time", block=block, engine=engine, calls=DEVICE_CALLS):
            row = replace(row, device_seconds=median(device))
            benchmark.extra_info["device seconds"] = row.device_seconds
        benchmark.extra_info |= row.rates(timing.ceilings(setting))
        timing.rows.setdefault(setting, []).append(row)


@pytest.fixture
def timed(benchmark: "BenchmarkFixture", suite: Suite, timing: Timing, tmp_path: Path) -> Timed:
    return Timed(benchmark, suite, timing, tmp_path)


@pytest.mark.benchmarked
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", BLOCKS)
def test_speed(timed: Timed, suite: Suite, block: str, engine: str) -> None:
    comparison = list(suite.comparisons(BLOCKS[block], ["speech"]))[-1]
    inputs = suite.inputs(BLOCKS[block], comparison)
    shapes = {name: list(x.shape) for name, x in inputs.items()}
    timed.run(block, engine, costs(suite, comparison)[engine], shapes=shapes)


@pytest.mark.benchmarked
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loop", LOOPS)
def test_decode_loop(timed: Timed, timing: Timing, suite: Suite, loop: str, engine: str) -> None:
    """N_TOKEN tokens by openai-whisper's `decode`, ours and its own."""
    if suite.dtype != torch.float32:
        pytest.skip("decode loops are timed in float32, openai-whisper's own arithmetic on a CPU")
    if loop not in timing.worker(timing.setting(suite), engine).takes:
        pytest.skip(f"{timing.artifacts} holds no graphs that select tokens for {suite.model.size}")
    timed.run(loop, engine, None, tokens=N_TOKEN, **vars(LOOPS[loop]))
