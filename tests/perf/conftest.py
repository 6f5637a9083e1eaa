"""What the benchmarks share: a process for each engine, the machine's ceilings, and the table at the end of the run."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from reference.judge import dtype_name
from reference.models import CHECKPOINT
from reference.perf.engine import ENGINES, WORKER, Setting, Worker
from reference.perf.table import Row, table
from reference.suite import Suite

FEW_TOKENS = Path(__file__).with_name("few_tokens.py")


class Timing:
    """The workers of the setting that is being timed, and what was found in every setting."""

    def __init__(self, checkpoint: str | None, artifacts: str | None, timed: bool = True):
        self.timed = timed
        self.checkpoint = checkpoint
        self.artifacts = artifacts
        self.workers: dict[tuple[Setting, str], Worker] = {}
        self.found: dict[Setting, dict[str, float]] = {}
        self.rows: dict[Setting, list[Row]] = {}

    def setting(self, suite: Suite) -> Setting:
        checkpoint = self.checkpoint if suite.model.size == CHECKPOINT else None
        return Setting(suite.model.size, dtype_name(suite.dtype), suite.device, checkpoint, self.artifacts)

    def worker(self, setting: Setting, engine: str) -> Worker:
        """Returns the engine's process, started at the first call; those of an earlier setting end. Where nothing is
        timed, one process is both engines'."""
        engine = engine if self.timed else "either engine"
        if any(earlier != setting for earlier, _ in self.workers):
            self.close()
        if (setting, engine) not in self.workers:
            with patch("reference.perf.engine.WORKER", WORKER if self.timed else FEW_TOKENS):
                self.workers[setting, engine] = Worker(setting, name=engine)
        return self.workers[setting, engine]

    def ceilings(self, setting: Setting) -> dict[str, float]:
        """Returns what the machine can do at most, measured once for a setting; the product by the faster of both."""
        if setting not in self.found:
            products = [self.worker(setting, engine).ask("product", engine=engine) for engine in ENGINES]
            faster = max(products, key=lambda each: each["matmul"])
            self.found[setting] = faster | self.worker(setting, "PyTorch").ask("bandwidth")
        return self.found[setting]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


TIMING = pytest.StashKey[Timing]()


@pytest.fixture(scope="session")
def timing(pytestconfig: pytest.Config) -> Iterator[Timing]:
    timing = pytestconfig.stash[TIMING] = Timing(
        pytestconfig.getoption("--checkpoint"),
        pytestconfig.getoption("--artifacts"),
        timed=not pytestconfig.getoption("benchmark_disable", True),
    )
    yield timing
    timing.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    timing = config.stash.get(TIMING, None)
    for setting, rows in timing.rows.items() if timing else ():
        terminalreporter.section(f"blocks, {setting}")
        for line in table(rows, timing.found[setting]):
            terminalreporter.write_line(line)
