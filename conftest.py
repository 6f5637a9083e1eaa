"""Options of both suites, and what a run prints at its end: pairs compared, graphs compiled, time that took."""

from functools import cache

import pytest

from maxwhisper.runtime import COMPILE_LOG
from reference.judge import Judgement
from reference.suite import SIZES, Suite, load_suite

ALL_SIZES = ("fixture", *SIZES)
JUDGEMENTS: list[Judgement] = []
suite = cache(load_suite)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("maxwhisper")
    group.addoption(
        "--size",
        default=",".join(ALL_SIZES),
        help=f"models to check, separated by commas, of {', '.join(ALL_SIZES)} (default: all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    unknown = [size for size in config.getoption("--size").split(",") if size not in ALL_SIZES]
    if unknown:
        raise pytest.UsageError(f"--size {','.join(unknown)} is not known: expected some of {', '.join(ALL_SIZES)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", metafunc.config.getoption("--size").split(","), scope="session")


@pytest.fixture
def model(size: str) -> Suite:
    """The model under test of one --size."""
    return suite(size)


@pytest.fixture
def judgements() -> list[Judgement]:
    """Where parity tests leave what they judged, to be counted at the end of the run."""
    return JUDGEMENTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if JUDGEMENTS:
        worst = max((m.ratio, j.block, j.size) for j in JUDGEMENTS for m in j.measures if "relative" in m.name)
        pairs = sum(judgement.pairs for judgement in JUDGEMENTS)
        terminalreporter.write_line(
            f"parity: {pairs} pairs compared; worst MAX error / PyTorch error {worst[0]:.2f} in {worst[1]}, {worst[2]}"
        )
    if COMPILE_LOG:
        graphs, seconds = sum(r.graphs for r in COMPILE_LOG), sum(r.seconds for r in COMPILE_LOG)
        terminalreporter.write_line(f"compile: {graphs} graphs in {len(COMPILE_LOG)} artifacts, {seconds:.1f} s")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A parity run that compared nothing has shown nothing."""
    parity = any("parity" in item.nodeid for item in session.items)
    if parity and not JUDGEMENTS and session.exitstatus == 0 and not session.config.getoption("collectonly"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
