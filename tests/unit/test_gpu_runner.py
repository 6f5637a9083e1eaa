"""scripts/gpu-runner.sh: its options, that another machine's results and status come back, and what its steps run."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxwhisper.cli import build_parser
from maxwhisper.compare.material import SIZES
from reference.fixtures import ROOT
from reference.gpu_run import held
from reference.gpu_run.steps import STEPS, Workspace
from reference.models import trained

from .gpu_run import artifacts, bundle_of

RUNNER = ROOT / "scripts" / "gpu-runner.sh"
BARE = ("__init__", "__main__", "steps", "held", "limits", "findings", "results", "offline")
"""The modules of reference/gpu_run that run before anything is installed."""


@pytest.fixture
def this_python(tmp_path: Path) -> str:
    """Returns a folder in which python3 is the Python of these tests."""
    program = tmp_path / "bin" / "python3"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program.parent)


def run(*options: str, path: str = "") -> tuple[int, str]:
    environment = dict(os.environ, PATH=f"{path}:{os.environ['PATH']}")
    done = subprocess.run([RUNNER, *options], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bogus", "x"], "--bogus is not known"),
        (["--host"], "--host needs user@machine"),
        (["--out", ""], "--out needs a folder"),
        (["--minutes"], "--minutes needs a value"),
        (["--minutes", "-1"], "argument --minutes: must be a number above 0, not '-1'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--offline", "/no/such"], "--offline needs a bundle's folder, not '/no/such'"),
        (["--offline", "/tmp", "--host", "a@b"], "--host and --offline: send the bundle"),
        (["--offline", str(ROOT)], f"argument --offline: {ROOT}/bundle.json: cannot be read: No such file"),
    ],
)
def test_unusable_options(options: list[str], message: str, this_python: str) -> None:
    status, output = run(*options, path=this_python)
    assert status == 2 and message in output and len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"python": "2.7"}, "python is 2.7, expected that of"),
        ({"has": ["no-such-thing"]}, "no-such-thing: neither in the bundle nor in"),
        ({"parts": {"part.00": {"bytes": 9, "sha256": ""}}}, "part.00: is missing, expected 9 bytes"),
        ({"parts": None}, "is no manifest of a bundle"),
    ],
)
def test_a_bundle_that_cannot_be_used(manifest: dict, message: str, tmp_path: Path, this_python: str) -> None:
    bundle = str(bundle_of(tmp_path, manifest))
    status, output = run("--offline", bundle, "--out", str(tmp_path / "out"), path=this_python)
    assert status == 2 and message in output and len(output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


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
    assert run("--host", "me@there", "--minutes", "8", "--out", str(out), path=str(tmp_path))[0] == status
    install, send, work, collect = calls.read_text().splitlines()
    assert install.startswith("ssh -- me@there command -v rsync")
    assert send.startswith("rsync ") and send.endswith("./ me@there:maxwhisper/ ")
    assert work.rstrip() == "ssh -- me@there maxwhisper/scripts/gpu-runner.sh --minutes 8"
    assert collect == f"rsync --archive me@there:maxwhisper/build/gpu/ {out}/ " and out.is_dir()


@pytest.mark.parametrize("name", BARE)
def test_what_runs_first_needs_only_a_python_from_3_10(name: str) -> None:
    tree = ast.parse((ROOT / "reference" / "gpu_run" / f"{name}.py").read_text(), feature_version=(3, 10))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    absolute = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    imported |= {node.module or "" for node in absolute}
    assert {each.split(".")[0] for each in imported} <= set(sys.stdlib_module_names)
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = {node.module or alias.name for node in relative for alias in node.names}
    assert names <= set(BARE)


# ---- what steps run ------------------------------------------------------------------------------------------------


def commands(workspace: Workspace, name: str) -> list[list[str]]:
    [step] = [step for step in STEPS if step.name == name]
    return [command.arguments for command in step.commands(workspace)]


def test_sizes_are_those_of_the_models() -> None:
    dims = {"fixture": trained().dims, **SIZES}
    assert {size: held.dimensions(vars(dims[size])) for size in held.SIZES} == held.SIZES


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_command_line_knows_every_option_of_a_step(device: str, tmp_path: Path) -> None:
    workspace = Workspace(ROOT, tmp_path, Path("python"), device)
    found = 0
    for step in STEPS:
        for arguments in (command.arguments for command in step.commands(workspace)):
            if arguments[1:3] == ["-m", "maxwhisper"]:
                build_parser().parse_args(arguments[3:])
                found += 1
    assert found == 5


def test_steps_take_the_artifacts_of_their_model_precision_and_device(tmp_path: Path) -> None:
    root = tmp_path / "build" / "artifacts"
    fixture = artifacts(root / "a", "sm_90a", parts=["float16", "float32"], network=["float32"])
    tiny = artifacts(root / "deep" / "b", "sm_90a", "tiny", network=["float16"])
    artifacts(root / "c", "sm_80", "turbo", network=["float16"])
    host = artifacts(root / "d", "host", parts=["bfloat16"])
    (root / "broken").mkdir()
    (root / "broken" / "manifest.json").write_text("{")
    (tmp_path / "doctor.json").write_text(
        '{"rows": [{"check": "driver", "data": {}},'
        ' {"check": "compute capability", "data": {"compute_capability": "9.0"}}]}'
    )
    workspace = Workspace(tmp_path, tmp_path, Path("python"), "gpu").with_artifacts()
    for name, folder in {
        "parity float16": fixture,
        "parity bfloat16": None,
        "parity float32": fixture,
        "transcripts": fixture,
        "speed tiny": tiny,
        "speed turbo": None,
        "blocks": fixture,
        "kernels": tiny,
    }.items():
        last = [each for each in commands(workspace, name) if each[0] == "python"][-1]
        given = last[last.index("--artifacts") + 1] if "--artifacts" in last else None
        assert given == (str(folder) if folder else None), name
    on_cpu = Workspace(tmp_path, tmp_path, Path("python"), "cpu").with_artifacts()
    [parity] = commands(on_cpu, "parity bfloat16")
    assert parity[parity.index("--artifacts") + 1] == str(host) and "--require-gpu" not in parity
