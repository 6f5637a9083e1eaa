"""The suite's options: a selection that would show nothing is an error, not a success."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NANO = ROOT / "fixtures" / "nano.pt"


def run(*options: str) -> tuple[int, str]:
    """Exit status and output of a run in a process of its own, whose options cannot leak into this one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "huge"], "--size huge is not known: expected some of fixture, tiny"),
        (["--dtype", "float32,int4"], "--dtype int4 is not known: expected some of float32, float16, bfloat16"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--checkpoint", str(NANO), "--size", "tiny"], "ModelDimensions"),
        (["--compile-only", "sm_1"], "--compile-only sm_1 is not known: expected some of host, sm_80, sm_90a"),
        (["--compile-only", "host", "--report", "there"], "--report: --compile-only compares nothing"),
        (["--or-compile"], "--or-compile: there is nothing to compile instead of without --artifacts"),
        (["--require-gpu"], "--require-gpu: MAX and PyTorch do not both find a GPU"),
        (["--device", "gpu"], "--device gpu: MAX and PyTorch do not both find a GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 3 else None,
)
def test_options_that_cannot_be_met_are_errors(options: list[str], message: str) -> None:
    if "GPU" in message:
        from conftest import gpu_found

        if gpu_found():
            pytest.skip("there is a GPU")
    status, output = run("tests/parity", *options)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert message in output


def test_a_selection_that_selects_nothing_fails() -> None:
    assert run("tests/parity", "-k", "no_such_block")[0] == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_parity_run_that_compares_nothing_fails() -> None:
    """It passes, but for the rule: the one test that it selects compares no values."""
    status, output = run("tests/parity/test_faults.py", "-k", "at_least_forty", "--size", "fixture")
    assert "1 passed" in output
    assert status == pytest.ExitCode.TESTS_FAILED
