"""Without pytest-benchmark everything runs but what it times, which says so in one line."""

from pathlib import Path

import pytest

from reference.perf import gate  # noqa: F401 - before a run in this process would: parts of NumPy are imported once

from .test_options import PARITY

pytest_plugins = ["pytester"]

SPEED = PARITY.parent / "perf" / "test_speed.py"
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--size", "fixture")
NEEDED = "tests/perf needs pytest-benchmark"


@pytest.mark.parametrize("selection", [[], ["-k", "stem"]])
def test_benchmarks_alone_are_an_error(selection: list[str], pytester: pytest.Pytester) -> None:
    done = pytester.runpytest_inprocess(*OPTIONS, SPEED, *selection)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert [NEEDED in line for line in done.stderr.str().strip().splitlines()] == [True]
    assert "INTERNALERROR" not in done.stdout.str()


def test_benchmarks_beside_others_are_skipped(pytester: pytest.Pytester) -> None:
    other = Path(__file__).with_name("test_perf_report.py")
    done = pytester.runpytest_inprocess(*OPTIONS, SPEED, other, "-k", "stem or test_perf_report")
    assert done.ret == pytest.ExitCode.OK
    assert sum(NEEDED in line for line in done.stdout.lines) == 1
    outcomes = done.parseoutcomes()
    assert outcomes["passed"] and outcomes["skipped"] == 2


def test_everything_is_collected(pytester: pytest.Pytester) -> None:
    files = [PARITY, SPEED.parent, Path(__file__).with_name("test_perf.py")]
    done = pytester.runpytest_inprocess(*OPTIONS, "--collect-only", *files)
    assert done.ret == pytest.ExitCode.OK
    assert all(name in done.stdout.str() for name in ("test_isolated.py", "test_speed.py", "test_perf.py"))
