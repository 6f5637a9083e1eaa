"""What a run says at its end: all of it, whatever fails there, and whoever ran the tests."""

import json
import math
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import reference.report.charts  # noqa: F401 - what a run inside this process imports first is not kept
from reference.chain import Chain
from reference.compile_log import CompileRecord
from reference.faults import FaultResult
from reference.fixtures import ROOT
from reference.graph_faults import graph_faults
from reference.judge import Comparison, Judgement, Measure, Output, explain
from reference.pytest_plugin.ending import ENDING, LEFT_OUT, Ending, pytest_sessionfinish
from reference.report.figures import conclusion
from reference.results import Run
from reference.transcripts import Transcript
from reference.weight_faults import weight_faults

pytest_plugins = ["pytester"]

CONFTEST = """
import pytest, torch
from reference.pytest_plugin.ending import Ending
from reference.results import Run
from reference.judge import Comparison, Judgement, Measure, Output

def pytest_addoption(parser):
    parser.addoption("--report")

def pytest_configure(config):
    config.pluginmanager.register(Ending(config, run := Run()))
    measure = Measure("relative L2", 1.0, 1.0, 4.0)
    output = Output(0, (1, 2), (measure,))
    run.judgements.append(Judgement(Comparison("fixture", torch.float32, "encoder.mlp", 0, "speech"), (output,), ()))
"""
SUMMARY = "parity: 1 pairs compared"
ISOLATED = ROOT / "tests" / "parity" / "test_isolated.py"


def run_with(pytester: pytest.Pytester, plugin: str, *options: str) -> tuple[int, list[str]]:
    """Status and lines of a run of one test that passes, beside a judgement and a plugin."""
    pytester.makeconftest(CONFTEST)
    pytester.syspathinsert()
    pytester.makepyfile(other=plugin, test_it="def test(): pass")
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "other", *options)
    return done.ret, done.outlines


def only(lines: list[str], text: str) -> str:
    (line,) = (line for line in lines if text in line)
    return line


@pytest.mark.parametrize("order", ["", "@pytest.hookimpl(tryfirst=True)", "@pytest.hookimpl(trylast=True)"])
def test_a_plugin_that_fails_as_the_run_ends_takes_no_summary_with_it(
    order: str, pytester: pytest.Pytester, tmp_path: Path
) -> None:
    plugin = f"import pytest\n{order}\ndef pytest_sessionfinish(): raise OSError(28, 'No space left on device')"
    status, lines = run_with(pytester, plugin, f"--report={tmp_path / 'report'}")
    assert status == pytest.ExitCode.TESTS_FAILED
    only(lines, SUMMARY)
    only(lines, "1 passed")
    assert only(lines, "No space left") == (
        "other.py, pytest_sessionfinish failed as the run ended: No space left on device"
    )
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.json", "summary.md"}
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["exit_status"], report["passed"]) == (1, False)


def test_a_junit_file_that_cannot_be_written_takes_no_summary_with_it(pytester: pytest.Pytester) -> None:
    status, lines = run_with(pytester, "", "--junitxml", "/dev/full")
    assert status == pytest.ExitCode.TESTS_FAILED
    only(lines, SUMMARY)
    only(lines, "1 passed")
    assert only(lines, "No space left").startswith("junitxml.py, pytest_sessionfinish failed")


def test_an_error_of_pytests_own_hooks_leaves_the_summary(pytester: pytest.Pytester) -> None:
    status, lines = run_with(pytester, "def pytest_runtest_logfinish(): 1 / 0")
    assert status == pytest.ExitCode.INTERNAL_ERROR
    only(lines, SUMMARY)


def test_a_report_that_cannot_be_written_is_a_line_and_a_failure(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    status, lines = run_with(pytester, "", f"--report={tmp_path}")
    assert status == pytest.ExitCode.TESTS_FAILED
    only(lines, SUMMARY)
    only(lines, "1 passed")
    assert only(lines, "--report: ").count("cannot be written: No space left on device") == 3


def test_a_summary_that_fails_is_a_line_and_a_failure(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "summary_lines", lambda run: 1 / 0)
    status, lines = run_with(pytester, "")
    assert status == pytest.ExitCode.TESTS_FAILED
    only(lines, "what was found cannot be summed up: ZeroDivisionError")


def test_without_a_terminal_what_failed_is_said_to_standard_error(
    pytester: pytest.Pytester, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _ = run_with(pytester, "def pytest_sessionfinish(): 1 / 0", "-p", "no:terminalreporter")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "other.py, pytest_sessionfinish failed" in capfd.readouterr().err


def test_seconds_of_comparing_are_those_of_parity_tests_but_for_what_they_wait_for_compilers() -> None:
    """Be that here or in another process; what other tests compile is none of it."""
    run = Run(test_seconds=10.0)
    ending = Ending(Mock(spec=["getoption"], getoption=lambda name: None), run)
    for folder, compiled, waited in (("parity", 2.0, 3.0), ("unit", 500.0, 7.0), ("parity", 0.0, 0.0)):
        run.compiled += [CompileRecord("a", 1, compiled)]
        run.waiting += waited
        report = ending.pytest_runtest_makereport(Mock(nodeid=f"tests/{folder}/test_a.py::test", fixturenames=["run"]))
        next(report)
        with pytest.raises(StopIteration):
            report.send(Mock(skipped=False))
    assert (run.compile_seconds, run.compare_seconds) == (502.0, 5.0)


@pytest.mark.parametrize("run_again", ["test_one", "test_other"])
def test_benchmarks_that_are_compared_with_none_fail_where_a_slower_one_would(
    run_again: str, pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # in which nothing is timed
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makepyfile("def test_one(benchmark): benchmark(int)\ndef test_other(benchmark): benchmark(int)")
    options = ["-p", "no:cacheprovider", f"--benchmark-storage={tmp_path}", "--benchmark-max-time=0.01"]
    assert pytester.runpytest_inprocess(*options, "--benchmark-save=x", "-k", "test_one").ret == pytest.ExitCode.OK
    compare = ["--benchmark-compare", "--benchmark-compare-fail=median:100000%"]
    done = pytester.runpytest_inprocess(*options, *compare, "-k", run_again)
    same = run_again == "test_one"
    assert done.ret == (pytest.ExitCode.OK if same else pytest.ExitCode.TESTS_FAILED)
    assert ("--benchmark-compare: nothing was compared" in done.stdout.str()) != same


# ---- workers -------------------------------------------------------------------------------------------------------


def everything() -> Run:
    """Returns what tests can find, with a map of errors, values that are not finite, and every fault."""
    comparison = Comparison("fixture", torch.bfloat16, "encoder.mlp", 0, "speech")
    oracle = torch.arange(6.0, dtype=torch.float64).reshape(1, 2, 3)
    measures = (Measure("relative L2", math.inf, 1e-7, 4e-7),)
    explanations = explain([oracle], [oracle.float()], [oracle.float() + 1])
    judgement = Judgement(comparison, (Output(0, (1, 2, 3), measures),), ("shape",), explanations=explanations)
    results = [
        FaultResult(fault, torch.float32, ("chain",), None, 2.0, {"speech": 1e-3}, {"speech": 1e-2})
        for fault in (*weight_faults(), *graph_faults())
    ]
    return Run(
        judgements=[judgement],
        chains=[Chain(comparison, {"encoder": judgement}, ())],
        faults=results,
        transcripts=[Transcript("english-1.wav", "greedy", True, 41)],
        held=["tests/parity/test_loading.py::test_two_channels"],
        waits=[2.5],
        compiled=[CompileRecord("fixture, float32, parts", 19, 2.5)],
        lost=["a worker"],
        notes={"cache": "a note"},
    )


def test_what_a_worker_finds_arrives_whole() -> None:
    worker, run = everything(), Run(test_seconds=2.0, notes={"cache": "the same of another worker"})
    found = worker.taken()
    assert found.anything and not worker.anything
    for _ in range(2):
        run.add(pickle.loads(pickle.dumps(found)))
    for name in ("judgements", "chains", "transcripts", "held", "waits", "compiled", "lost"):
        assert getattr(run, name) == getattr(everything(), name) * 2, name
    assert [str(each) for each in run.faults] == [str(each) for each in everything().faults] * 2
    errors = (each.judgements[0].explanations[0].errors for each in (run, found))
    assert torch.equal(*errors)
    assert run.notes == {"cache": "the same of another worker"}
    assert run.test_seconds == 2.0


def test_a_worker_that_died_fails_the_run() -> None:
    """Also where it had no test left to run, so that no test fails."""
    run = Run(held=["a test"])
    assert conclusion(run).passed
    config = Mock(spec=["getoption", "pluginmanager"], getoption=lambda name: None)
    ending, session = Ending(config, run), Mock(exitstatus=pytest.ExitCode.OK)
    ending.pytest_testnodedown(Mock(spec=["gateway"], **{"gateway.id": "gw0"}), None)
    assert not run.lost
    ending.pytest_testnodedown(Mock(spec=["gateway"], **{"gateway.id": "gw0"}), "Not properly terminated")
    finish = ending.pytest_sessionfinish(session)
    next(finish)
    with pytest.raises(StopIteration):
        next(finish)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert run.lost == ["worker gw0 ended early, with what it had not reported: Not properly terminated"]
    assert not conclusion(run).passed


def test_a_selection_that_left_workers_nothing_to_compare_fails_the_run() -> None:
    """Their tests are not among those of the process that says how the run ended."""
    config, run = SimpleNamespace(stash=pytest.Stash(), getoption=lambda name: None), Run(held=["a test"])
    config.stash[ENDING] = ending = Ending(config, run)  # type: ignore[arg-type]
    ending.pytest_testnodedown(Mock(workeroutput={LEFT_OUT: "no block was compared"}), None)
    session = Mock(config=config, items=[], exitstatus=pytest.ExitCode.OK)
    pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert list(run.notes) == ["no block was compared"]


@pytest.mark.nightly  # two processes of the whole suite
def test_the_verdicts_of_workers_are_those_of_one_run(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))  # where another Python is the first, if any is
    selection = [ISOLATED, "-k", "encoder.layer_norm and speech", "--size", "fixture", "--dtype", "float32"]
    reports, said = [], ""
    for options in ((), ("-v", "-n", "2", "--dist", "loadgroup")):
        done = pytester.runpytest_inprocess(*selection, *options, "--report", tmp_path)
        said = done.stdout.str()
        assert done.ret == 0, said + done.stderr.str()
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    alone, shared = ([each["comparison"] for each in report["judgements"]] for report in reports)
    pairs = reports[0]["totals"]["pairs"]
    assert alone == shared and len(alone) == 2 < pairs, "each with several cuts of the work"
    assert f"parity: {pairs} pairs compared" in said and "2 passed" in said
    assert len(set(re.findall(r"^\[(gw\d)\].* PASSED", said, re.M))) == 1, "both are of one model"
    assert [(report["passed"], report["totals"]["pairs"]) for report in reports] == [(True, pairs)] * 2
