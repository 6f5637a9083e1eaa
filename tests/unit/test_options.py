"""The suite's options: a selection that would show nothing is an error, not a success."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from reference.fixtures import NANO, ROOT
from reference.quiet import times_nothing

PARITY = ROOT / "tests" / "parity"

pytest_plugins = ["pytester"]

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Returns exit status and output of a run inside this process: with a configuration of its own, so that neither
    options nor results leak from one into the other, and without the seconds that it takes to import PyTorch and
    MAX."""

    def run(*options: str | Path) -> tuple[int, str]:
        done = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", *options)
        return done.ret, done.stdout.str() + done.stderr.str()

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "huge"], "--size huge is not known: expected some of fixture, tiny"),
        (["--dtype", "float32,int4"], "--dtype int4 is not known: expected some of float32, float16, bfloat16"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--checkpoint", str(NANO), "--size", "tiny"], "ModelDimensions"),
        (["--compile-only", "sm_1"], "--compile-only sm_1 is not known: expected some of host, sm_80, sm_90a"),
        (["--compile-only", "host", "--report", "there"], "--report: --compile-only compares nothing"),
        (["--compile-only", "host", "--faults", "graphs"], "--faults: --compile-only compares nothing"),
        (["--compile-only", "host", "-n", "2"], "--compile-only: one process compiles for a target"),
        (["--compile-only", "host", "--artifacts", str(NANO)], "--artifacts"),
        (["--compile-only", "host", "--artifacts", "there", "--or-compile"], "--or-compile: --compile-only"),
        (["--or-compile"], "--or-compile: there is nothing to compile instead of without --artifacts"),
        (["--require-gpu"], "--require-gpu: MAX and PyTorch do not both find a GPU"),
        (["--cpu", "pentium"], "argument --cpu: invalid choice: 'pentium'"),
        (["--device", "gpu"], "--device gpu: MAX and PyTorch do not both find a GPU"),
        (["--report", str(NANO)], "nano.pt: cannot be written to: File exists"),
        (["--report", ""], "--report is empty"),
        (["--checkpoint", ""], "--checkpoint is empty"),
        (["--artifacts", ""], "--artifacts is empty"),
        (["--faults", "all", "--size", "tiny"], "--faults: these are tried in the fixture"),
        (["--faults", "graphs", "--checkpoint", str(NANO)], "--faults: these are tried in the fixture"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 3 else None,
)
def test_options_that_cannot_be_met_are_errors(options: list[str], message: str, run: Run) -> None:
    if "GPU" in message:
        from maxwhisper.engine.session import gpu_found

        if gpu_found():
            pytest.skip("there is a GPU")
    status, output = run(PARITY, "--collect-only", *options)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert message in output


def test_a_gpu_that_is_required_and_not_asked_for_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a gate on a machine with a GPU would compare on its CPU and pass."""
    monkeypatch.setattr("reference.pytest_plugin.options.gpu_found", lambda: True)
    status, output = run(PARITY, "--collect-only", "--require-gpu")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "--require-gpu: nothing would be computed on the GPU: give --device gpu" in output


def test_an_error_is_one_line_of_a_run_that_fails(pytester: pytest.Pytester) -> None:
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider", PARITY, "--size", "huge")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert not any(done.outlines) and len([*filter(None, done.errlines)]) == 1, done.outlines + done.errlines
    assert "--size huge is not known" in done.stderr.str()


def test_what_compiles_is_shown_while_the_test_runs(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makepyfile("def test(): __import__('logging').getLogger('maxwhisper').info('compiling everything')")
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert done.ret == 0
    assert "compiling everything" in done.stdout.str()


def test_what_compiles_is_shown_where_nothing_is_captured() -> None:
    from reference.pytest_plugin.progress import Progress

    reporter = Mock()
    plugins = Mock(get_plugin={"terminalreporter": reporter, "capturemanager": None}.get)
    Progress(plugins).handle(logging.makeLogRecord({"msg": "compiling everything"}))
    reporter.write_line.assert_called_once_with("compiling everything", flush=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], {"skipped": 2, "xfailed": 1}), (["--require-peers"], {"failed": 1, "errors": 1, "xfailed": 1})],
)
def test_a_skip_fails_where_peers_are_required(
    options: list[str], expected: dict[str, int], pytester: pytest.Pytester
) -> None:
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makepyfile(
        """
        import pytest
        def test_inside(): pytest.skip("an engine is not installed")
        @pytest.mark.skipif(True, reason="an engine is not installed")
        def test_outside(): pass
        def test_expected(): pytest.xfail("known")
        """
    )
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)
    done.assert_outcomes(**expected)
    assert ("an engine is not installed" in done.stdout.str()) == bool(options)


def test_a_selection_that_selects_nothing_fails(run: Run) -> None:
    assert run(PARITY, "-k", "no_such_block")[0] == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_parity_run_that_compares_nothing_fails_and_says_so(run: Run) -> None:
    """It passes, but for the rule: what it selects is for a GPU, so it is skipped on a CPU."""
    captured = f"{PARITY / 'test_steps.py'}::test_a_captured_step_launches_the_kernels_of_an_executed_one"
    status, output = run(captured, "--size", "fixture", "--dtype", "float32")
    assert "2 skipped" in output and "nothing was compared with PyTorch" in output
    assert status == pytest.ExitCode.TESTS_FAILED


def test_what_compares_and_leaves_no_verdict_is_a_run_that_passed(run: Run, tmp_path: Path) -> None:
    """Loaders are held against other readers so, and properties ask the judge by themselves."""
    status, output = run(f"{PARITY / 'test_loading.py'}::test_every_format", "--report", tmp_path)
    assert status == pytest.ExitCode.OK, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["passed"], report["reason"]) == (True, "5 tests passed that leave no verdict")


def test_a_run_of_faults_alone_succeeds(run: Run) -> None:
    """What it shows is of the judge."""
    status, output = run(
        PARITY / "test_faults.py", "-k", "query_bias_dropped", "--size", "fixture", "--dtype", "float32"
    )
    assert "1 passed" in output
    assert status == pytest.ExitCode.OK


@pytest.mark.parametrize(
    ("arguments", "nothing"),
    [
        ("tests/parity", True),
        ("-q tests/parity/test_isolated.py::test_isolated tests/unit -k mlp", True),
        ("tests --benchmark-disable", True),
        ("", False),
        ("tests", False),
        ("tests/perf", False),
        ("tests/parity tests/perf", False),
        ("tests/parity tests", False),
    ],
)
def test_where_something_may_be_timed_pytorch_is_left_alone(
    arguments: str, nothing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # which times nothing, whatever it is given
    assert times_nothing(arguments.split()) == nothing
