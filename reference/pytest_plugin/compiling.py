"""What other processes compile: for later tests, and for the targets of --compile-only."""

import itertools
import logging
from collections.abc import Sequence

import pytest

from maxwhisper.engine.precompile import Precompiler

from ..lowering import Lowering
from ..precompile import WhenCompiling, precompiler
from .options import OfRun, Options


class Compiling(OfRun):
    """The processes of a run that compile.

    precompilers: what later tests need. lowering: by target of --compile-only, in the order in which they were started.
    """

    def __init__(self, config: pytest.Config):
        super().__init__(config)
        self.options = Options.of(config)
        self.precompilers: list[Precompiler] = []
        self.lowering: dict[str, Lowering] = {}

    def start(self, jobs: Sequence[str]) -> None:
        """Has jobs done by a process, from when this one compiles something on."""
        self.precompilers.append(precompiler(jobs, self.options.checkpoint, self.options.device))
        logging.getLogger("maxwhisper").addHandler(WhenCompiling(self.precompilers[-1]))

    def wait(self, job: str) -> None:
        """Waits for the job if a process does it."""
        for each in self.precompilers:
            each.wait(job, job)

    def for_target(self, target: str) -> Lowering:
        """Returns the process that compiles for a target, started at the first call."""
        if target not in self.lowering:
            self.stop_lowering()  # one at a time: two would take as long, and twice the memory
            models = list(itertools.product(self.options.sizes, self.options.dtypes))
            out = self.options.compiled_into / target
            self.lowering[target] = Lowering(target, models, out, self.options.checkpoint)
        return self.lowering[target]

    def stop_lowering(self) -> None:
        for each in self.lowering.values():
            each.stop()

    def stop(self) -> None:
        for each in self.precompilers:
            each.stop()
        self.stop_lowering()


@pytest.fixture
def lowering(request: pytest.FixtureRequest) -> Lowering:
    """Returns the process that compiles for a target of --compile-only."""
    return Compiling.of(request.config).for_target(request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    Compiling.of(session.config).stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for each in Compiling.of(config).lowering.values():
        terminalreporter.write_line(each.summary())
