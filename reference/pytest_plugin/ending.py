"""What a run of the suite says at its end, whatever else fails there, and however many processes ran its tests.

What a worker of pytest-xdist finds travels with the report of the test that found it, so that a worker which dies takes
no verdict with it but that of the test it was running.
"""

import pickle
import sys
import traceback
import warnings
from collections.abc import Generator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pluggy
import pytest

from ..compile_log import compilations
from ..reasons import one_line
from ..report import ReportError, write
from ..results import Run
from ..verdicts import Lenient
from .models import RUN
from .selection import COMPARES, leaves_no_verdict, left_out, of_parity
from .workers import is_worker

PLUGGY = Path(pluggy.__file__).parent
FOUND = "maxwhisper_found"
"""Attribute of the report of a test that ran in a worker."""
LEFT_OUT = "maxwhisper_left_out"
"""Key of what `left_out` says in what a worker gives back."""
ENDING = pytest.StashKey["Ending"]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUN] = run = Run()
    stack = ExitStack()
    stack.enter_context(compilations(lambda record: run.compiled.append(record)))
    config.add_cleanup(stack.close)
    config.stash[ENDING] = ending = Ending(config, run)
    config.pluginmanager.register(ending)
    if cache := getattr(config, "cache", None):
        config.cache = Lenient(cache, run.note)  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a parity run that compared nothing, for it has shown nothing, and one of whose blocks -k left none."""
    config = session.config
    if config.getoption("collectonly"):
        return
    reason = left_out(config, session.items) if config.stash.get(COMPARES, False) else None
    if is_worker(config):
        config.workeroutput[LEFT_OUT] = reason  # type: ignore[attr-defined]
        return
    ending = config.stash[ENDING]
    reason = ending.left_out_by_workers or reason
    if not reason and any(map(of_parity, ending.selected(session))) and not ending.run.compared:
        reason = "nothing was compared with PyTorch"
    if reason:
        ending.fail(session, reason)
    if line := compared_with_none(config):
        ending.run.note(line)
        if config.getoption("--benchmark-compare-fail"):
            ending.fail(session)


def compared_with_none(config: pytest.Config) -> str | None:
    """Says so where --benchmark-compare has found no benchmark of this run among those that were saved."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not (session.compare and session.benchmarks):
        return None
    saved = {name for benchmarks in session.compared_mapping.values() for name in benchmarks}
    if any(benchmark.fullname in saved for benchmark in session.benchmarks):
        return None
    return "--benchmark-compare: nothing was compared, for no benchmark of this run was saved by an earlier one"


class Ending:
    """A plugin that collects what was found, writes the report, and says the last lines.

    A failure in any of this, or where another plugin ends, is one more line, and a status that is not 0.
    """

    def __init__(self, config: pytest.Config, run: Run):
        self.config, self.run = config, run
        self.distributed: list[str] = []
        self.left_out_by_workers: str | None = None
        self.n_compiled = 0
        self.lines: list[str] = []

    # ---- what was found ----------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Fails what is skipped where peers are required; notes what passed without a verdict; in a worker, gives the
        report of a test what it found since the one before."""
        report = yield
        if report.skipped and not hasattr(report, "wasxfail") and self.config.getoption("--require-peers"):
            report.outcome, report.longrepr = "failed", f"--require-peers: {report.longrepr[-1]}"  # type: ignore[index]
        if report.when == "call" and report.passed and leaves_no_verdict(item):
            self.run.held.append(report.nodeid)
        self.note_waits(item)
        if is_worker(self.config):
            found = self.run.taken()
            if found.anything:
                vars(report)[FOUND] = pickle.dumps(found)
        self.n_compiled = len(self.run.compiled)
        return report

    def note_waits(self, item: pytest.Item) -> None:
        """Keeps how long a parity test has waited for compilers since the last report."""
        run = self.run
        waited = run.waiting + sum(record.seconds for record in run.compiled[self.n_compiled :])
        if waited and of_parity(item.nodeid):
            run.waits.append(waited)
        run.waiting = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not is_worker(self.config) and FOUND in vars(report):
            self.run.add(pickle.loads(vars(report).pop(FOUND)))
        if of_parity(report.nodeid):
            self.run.test_seconds += report.duration

    def selected(self, session: pytest.Session) -> list[str]:
        """Returns the ids of the tests that were selected, in whatever process they run."""
        return self.distributed or [item.nodeid for item in session.items]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Skips what pytest-benchmark would run if it is not there; raises a usage error if nothing else was chosen."""
        benchmarks = [item for item in items if item.get_closest_marker("benchmark")]
        if not benchmarks or self.config.pluginmanager.has_plugin("benchmark"):
            return
        reason = "tests/perf needs pytest-benchmark: install it, or leave out -p no:benchmark"
        if len(benchmarks) == len(items) and not is_worker(self.config):
            raise pytest.UsageError(reason)
        self.run.note(reason)
        for item in benchmarks:
            item.add_marker(pytest.mark.skip(reason=reason))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.distributed = ids

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        self.left_out_by_workers = getattr(node, "workeroutput", {}).get(LEFT_OUT) or self.left_out_by_workers
        if error:
            self.run.lost.append(f"worker {node.gateway.id} ended early, with what it had not reported: {error}")

    # ---- what is said of it ------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """Counts what there is to be said, after all other plugins but the one that prints."""
        try:
            yield
        except pytest.exit.Exception:
            raise
        except Exception as error:
            self.fail(session, f"{failing_hook(error)} failed as the run ended: {one_line(error)}")
        if is_worker(self.config) or self.config.getoption("collectonly"):
            return
        if self.run.lost:
            self.fail(session)
        self.write_report(session)
        try:
            self.lines += self.run.summary_lines()
        except Exception as error:
            self.fail(session, f"what was found cannot be summed up: {one_line(error)}")
        if compiled := self.run.compiled:
            seconds = f"{self.run.compile_seconds:.1f} s"
            self.lines.append(f"compile: {self.run.graphs_compiled} graphs in {len(compiled)} artifacts, {seconds}")
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None:
            for line in (*self.run.lost, *self.run.notes.values()):
                print(line, file=sys.stderr)
        elif session.exitstatus == pytest.ExitCode.INTERNAL_ERROR:  # after which pytest has no summary
            self.pytest_terminal_summary(reporter)

    def fail(self, session: pytest.Session, line: str = "") -> None:
        """Says the line, and fails the run unless it has failed already."""
        if line:
            self.run.note(line)
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def write_report(self, session: pytest.Session) -> None:
        if folder := self.config.getoption("--report"):
            self.run.exit_status = int(session.exitstatus)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("default")  # no part of it is to be lost over one, whatever -W says
                    write(self.run, Path(folder))
            except ReportError as error:
                self.fail(session, f"--report: {error}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.lines:
            terminalreporter.write_line(line)
        for line in (*self.run.lost, *self.run.notes.values()):
            terminalreporter.write_line(line, yellow=True)


def failing_hook(error: BaseException) -> str:
    """Returns the file and the function of the plugin whose hook raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    hooks = [hook for caller, hook in pairwise(frames) if Path(caller.filename).parent == PLUGGY]
    of_plugins = [hook for hook in hooks if Path(hook.filename).parent != PLUGGY]
    hook = [*frames, *of_plugins][-1]  # the wrappers around it stand before it
    return f"{Path(hook.filename).name}, {hook.name}"
