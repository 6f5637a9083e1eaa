"""scripts/gpu-runner.sh: its options, and that another machine's results and status come back."""

import os
import subprocess
from pathlib import Path

import pytest

RUNNER = Path(__file__).parents[2] / "scripts" / "gpu-runner.sh"


def run(*options: str, path: str = "") -> tuple[int, str]:
    environment = dict(os.environ, PATH=f"{path}:{os.environ['PATH']}")
    done = subprocess.run([RUNNER, *options], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bogus", "x"], "--bogus is not known"),
        (["--host"], "--host needs user@machine"),
        (["--out", ""], "a folder"),
    ],
)
def test_unusable_options(options: list[str], message: str) -> None:
    status, output = run(*options)
    assert status == 2 and message in output and len(output.splitlines()) == 1


@pytest.mark.parametrize("status", [0, 1])
def test_another_machine_is_sent_the_tree_and_sends_back_its_results(status: int, tmp_path: Path) -> None:
    """With programs in the place of ssh and rsync that only write down what they were asked for."""
    calls = tmp_path / "calls"
    for name in ("ssh", "rsync"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" | tr "\\n" " " >>{calls}; echo >>{calls}\n'
            f'case "$*" in *gpu-runner.sh*) exit {status};; esac\n'
        )
        program.chmod(0o755)
    out = tmp_path / "out"
    assert run("--host", "me@there", "--out", str(out), path=str(tmp_path))[0] == status
    install, send, work, collect = calls.read_text().splitlines()
    assert install.startswith("ssh -- me@there command -v rsync")
    assert send.startswith("rsync ") and send.endswith("./ me@there:maxwhisper/ ")
    assert work == "ssh -- me@there maxwhisper/scripts/gpu-runner.sh --out build/gpu "
    assert collect == f"rsync --archive me@there:maxwhisper/build/gpu/ {out}/ " and out.is_dir()
