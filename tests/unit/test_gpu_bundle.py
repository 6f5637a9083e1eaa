"""`make gpu-bundle`, with wheels of a few bytes in the place of pip's, and what a machine makes of it."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from reference.fixtures import ROOT
from reference.gpu_run import bundle, offline
from reference.gpu_run.steps import STEPS

from .gpu_run import HERE, artifacts, wheel

Fetched = list[list[str]]
PACKAGES: dict[str, dict[str, Any]] = {
    "maxwhisper-needs": {"needs": ["deep[extra]>=1", "torch", "old; python_version < '3.12'", "more; extra == 'x'"]},
    "deep": {"needs": ["maxwhisper-needs", "max-shmem-libs==1", "triton", "windows; sys_platform == 'win32'"]},
    "old": {},
    "torch": {"needs": ["nvidia-everything"]},
    "nvidia-everything": {},
}
"""What there is on an index, and what it requires."""


def index(packages: Mapping[str, Mapping[str, Any]] = PACKAGES) -> tuple[Fetched, bundle.Fetch]:
    """Returns what has been asked for, and what brings it."""
    asked: Fetched = []

    def fetch(requirements: list[str], python: str, into: Path) -> None:
        asked.append(sorted(Requirement(each).name for each in requirements))
        for name in asked[-1]:
            if name in packages:
                wheel(into, name, **packages[name])

    return asked, fetch


# ---- wheels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("python", "has", "expected"),
    [
        ("3.12", ["torch"], [["maxwhisper-needs"], ["deep"]]),
        ("3.11", ["torch"], [["maxwhisper-needs"], ["deep", "old"]]),
        ("3.12", ["torch", "deep"], [["maxwhisper-needs"]]),
    ],
)
def test_wheels_are_those_of_a_python_without_what_is_there(
    python: str, has: list[str], expected: Fetched, tmp_path: Path
) -> None:
    asked, fetch = index()
    bundle.collect(["maxwhisper-needs"], has, python, tmp_path, fetch)
    assert asked == expected


def test_all_is_brought_to_a_machine_that_has_nothing(tmp_path: Path) -> None:
    _, fetch = index(PACKAGES | {"triton": {}})
    bundle.collect(["maxwhisper-needs"], [], "3.12", tmp_path, fetch)
    brought = {each.name.split("-")[0] for each in tmp_path.iterdir()}
    assert brought == {"maxwhisper_needs", "deep", "torch", "triton", "nvidia_everything"}


def test_what_is_not_to_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(bundle.UnusableError, match="no wheel of no-such for Python 3.12"):
        bundle.collect(["no-such"], [], "3.12", tmp_path, index()[1])
    here_alone = index({"openai-whisper": {"tag": "cp311-cp311-linux_x86_64"}})[1]
    with pytest.raises(bundle.UnusableError, match=r"openai_whisper-1-cp311.*: made here, and not for every Python"):
        bundle.collect(["openai-whisper"], [], "3.12", tmp_path, here_alone)


def test_pip_is_asked_for_wheels_of_that_python_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(bundle, "pip", lambda *arguments: calls.append(arguments))
    bundle.fetch(["max<26.8,>=26.7", "openai_whisper>=1"], "3.13", tmp_path)
    download, build = calls
    assert download[0] == "download" and download[-1] == "max<26.8,>=26.7"
    assert {"--no-deps", "--only-binary=:all:", "--platform=manylinux_2_34_x86_64"} <= set(download)
    assert download[download.index("--python-version") + 1] == "3.13"
    assert build[0] == "wheel" and build[-1] == "openai_whisper>=1" and "--no-deps" in build
    for call in calls:
        assert call[call.index("--constraint") + 1] == str(ROOT / "constraints.txt")


def test_a_failure_of_pip_is_said_in_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr="ERROR: No matching distribution found for max\n")
    monkeypatch.setattr(bundle.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(bundle.UnusableError, match="^pip download: ERROR: No matching distribution found for max$"):
        bundle.fetch(["max"], "3.13", tmp_path)


def test_a_wheel_is_stored_without_what_no_graph_needs(tmp_path: Path) -> None:
    files = {"max__graph__g.py": "x" * 999, "max__serve__s.py": "", "modular__lib__nixl__n.so": "", "maxi.py": ""}
    (tmp_path / "plain").mkdir()
    path = bundle.stored(wheel(tmp_path, "max", **files), tmp_path / "plain")
    with bundle.zipfile.ZipFile(path) as archive:
        modules = {each.filename for each in archive.infolist() if "dist-info" not in each.filename}
        assert archive.getinfo("max/graph/g.py").compress_size == 999
    assert modules == {"max/graph/g.py", "maxi.py"}


# ---- bundles -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a project of the runner alone, whose wheels are of a few bytes."""
    root = tmp_path / "tree"
    for name in ("scripts/gpu-runner.sh", "reference/__init__.py", *(f"reference/gpu_run/{each}" for each in MODULES)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "scripts" / "gpu-runner.sh").chmod(0o755)
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["a"]\n')
    (root / ".gitignore").write_text("build\n")
    (root / "build").mkdir()
    (root / "build" / "ignored").touch()
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "1"],
    ):
        subprocess.run(["git", "-C", root, *arguments], check=True)
    (root / "untracked").touch()
    kernels = tmp_path / "kernels.mojoc"
    kernels.write_text("compiled")
    monkeypatch.setattr(bundle, "ROOT", root)
    monkeypatch.setattr(bundle, "STEPS_NEED", ("b",))
    monkeypatch.setattr(bundle, "kernel_package", lambda: kernels)
    monkeypatch.setattr(bundle, "PART", 1000)
    return root


MODULES = [path.name for path in (ROOT / "reference" / "gpu_run").glob("*.py")]


@pytest.fixture
def made(tree: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a bundle with artifacts and the wheels of a, b and c, for this Python."""

    def make() -> Path:
        held = artifacts(tmp_path / "held" / "tiny", "sm_90a", "tiny", network=["float16"])
        (held / "network.mef").write_bytes(bytes(range(256)) * 64)
        packages = {"a": {"needs": ["c"], "a.py": "one = 1\n"}, "b": {"b__b.py": ""}, "c": {}}
        out = tmp_path / "out" / "bundle"
        bundle.make(out, HERE, [], [tmp_path / "held"], index(packages)[1])
        return out

    return make


def test_a_bundle_holds_wheels_artifacts_kernels_and_the_project(
    made: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made()
    manifest = json.loads((out / "bundle.json").read_text())
    assert manifest["wheels"] == [f"{name}-1-py3-none-any.whl" for name in "abc"]
    parts = sorted(path.name for path in out.glob("part.*"))
    assert len(parts) > 1 and list(manifest["parts"]) == parts
    with tarfile.open(out / "project.tar.gz") as archive:
        names = archive.getnames()
        assert archive.getmember("scripts/gpu-runner.sh").mode & 0o111
    assert {"untracked", "pyproject.toml"} <= set(names) and "build/ignored" not in names

    offline.check(out)
    into = out / offline.UNPACKED
    into.mkdir()
    offline.unpack(out, into)
    assert (into / "artifacts" / "0" / "network.mef").read_bytes() == bytes(range(256)) * 64
    assert (into / "cache" / "maxwhisper" / "kernels" / "kernels.mojoc").read_text() == "compiled"
    calls: list[list[str]] = []
    monkeypatch.setattr(offline.subprocess, "run", lambda command, **_: calls.append(command))
    offline.install(into)
    [pip] = calls
    assert {"--no-index", "--no-deps"} <= set(pip)
    assert [Path(each).name for each in pip[-3:]] == manifest["wheels"]


def test_a_damaged_part_is_named(made: Callable[[], Path]) -> None:
    out = made()
    part = out / "part.01"
    part.write_bytes(part.read_bytes()[::-1])
    offline.check(out)  # which does not read all of it
    with pytest.raises(offline.BundleError, match=r"part\.01: sha256 is .*, expected "):
        offline.unpack(out, out / "unpacked")


def test_only_a_bundle_is_replaced(made: Callable[[], Path], tree: Path) -> None:
    out = made()
    (out / "of the earlier one").touch()
    bundle.make(out, HERE, [], [], index({"a": {}, "b": {}})[1])
    assert not (out / "of the earlier one").exists()
    with pytest.raises(bundle.UnusableError, match="is there already, and is no bundle"):
        bundle.make(tree, HERE, [], [], index()[1])


@pytest.mark.nightly
def test_a_bundle_is_unpacked_and_started_by_one_command(made: Callable[[], Path], tmp_path: Path) -> None:
    """By pip itself. The suites are not in this project, so every step behind fails, and takes none along."""
    out, results = made(), tmp_path / "results"
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [out / "start.sh", "--minutes", "2", "--device", "cpu", "--out", results]
    for again in ("3 wheels installed into", "installed before"):
        subprocess.run(command, env={"PATH": f"{python.parent}:/usr/bin:/bin"}, stdout=subprocess.DEVNULL, check=False)
        environment, *others = json.loads((results / "run.json").read_text())["steps"]
        assert environment["result"] == "ok" and again in environment["found"]
        assert all(step["result"].startswith("failed (") for step in others)
        assert "peers" not in {step["name"] for step in others} and len(others) == len(STEPS) - 2
    found = subprocess.run([offline.python(out), "-c", "import a, packaging; print(a.one)"], stdout=subprocess.PIPE)
    assert found.stdout == b"1\n"
