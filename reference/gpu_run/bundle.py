"""Makes what `scripts/gpu-runner.sh --offline` runs from, on a machine with network: `make gpu-bundle`.

    python -m reference.gpu_run.bundle --python 3.12 --out build/gpu-bundle

The folder holds parts of one archive, each small enough to be sent alone, the project, and `start.sh`, which unpacks
the project and starts the run. Wheels are those of constraints.txt, for another Python than this one if need be.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from maxwhisper.engine.kernel_library import kernel_package
from maxwhisper.files import replacing

from ..fixtures import ROOT
from .held import folders
from .offline import MANIFEST

STEPS_NEED = (
    *("pytest", "pytest-benchmark", "hypothesis", "jiwer", "matplotlib", "psutil", "scipy", "soundfile"),
    *("transformers", "silero-vad", "onnxruntime"),
)
"""By the suites, and by the engines that are compared, beside what maxwhisper needs. faster-whisper is not among them:
on a GPU it needs cuBLAS and cuDNN of CUDA 12."""
WITH_TORCH = ("triton",)
"""What is where torch is: its builds for GPUs bring it."""
SOURCE_ALONE = ("openai-whisper",)
"""What has no wheels on the index; it holds no compiled code, so a wheel made here is one for every Python."""
LEFT_OUT = ("max-shmem-libs",)
UNUSED = re.compile(r"(^|/)(max/(pipelines|serve|benchmark)/|modular/lib/nixl/)")
"""What MAX has for several GPUs, and for serving: no graph of ours needs it."""
PART = 60_000_000
"""Bytes of a part at most."""
START = """#!/usr/bin/env bash
# Unpacks the project into this folder and starts the run, with options of scripts/gpu-runner.sh: start.sh --minutes 8
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$here/project"
tar -xzf "$here/project.tar.gz" -C "$here/project"
exec "$here/project/scripts/gpu-runner.sh" --offline "$here" "$@"
"""

Fetch = Callable[[list[str], str, Path], None]
"""Brings requirements, without what they need, for a Python as wheels into a folder."""


class UnusableError(Exception):
    """A bundle cannot be made; the message names the package or the folder."""


# ---- wheels --------------------------------------------------------------------------------------------------------


def fetch(requirements: list[str], python: str, into: Path) -> None:
    """Has pip bring them; raises UnusableError for what it does not find, in its words."""
    # pip takes exactly the platforms that are named, and none below them.
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + ["manylinux2014_x86_64"]
    target = ["--python-version", python, "--implementation", "cp", *(f"--platform={each}" for each in platforms)]
    source = [each for each in requirements if canonicalize_name(Requirement(each).name) in SOURCE_ALONE]
    wheels = [each for each in requirements if each not in source]
    common = ["--quiet", "--no-deps", "--constraint", str(ROOT / "constraints.txt")]
    if wheels:
        pip("download", *common, "--only-binary=:all:", *target, "--dest", str(into), *wheels)
    if source:
        pip("wheel", *common, "--wheel-dir", str(into), *source)


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UnusableError(f"pip {arguments[0]}: {done.stderr.strip()}")


def collect(roots: Iterable[str], has: Iterable[str], python: str, into: Path, fetch: Fetch = fetch) -> None:
    """Brings wheels of packages and of all that they need, but for what the machine has and what that alone needs.

    Raises UnusableError if one is not to be had, or is not for every Python where it was made here.
    """
    skipped = {canonicalize_name(name) for name in (*has, *LEFT_OUT, *(WITH_TORCH if "torch" in set(has) else ()))}
    todo, done = [Requirement(root) for root in roots], set(skipped)
    while new := {canonicalize_name(each.name): str(each) for each in todo if canonicalize_name(each.name) not in done}:
        fetch(list(new.values()), python, into)
        done |= set(new)
        found = {canonicalize_name(wheel.name.split("-")[0]): wheel for wheel in into.glob("*.whl")}
        if missing := [name for name in new if name not in found]:
            raise UnusableError(f"no wheel of {', '.join(missing)} for Python {python}")
        if own := [name for name in new if name in SOURCE_ALONE and not found[name].name.endswith("-none-any.whl")]:
            raise UnusableError(f"{found[own[0]].name}: made here, and not for every Python")
        todo = [need for name in new for need in needs(found[name], python)]


def needs(wheel: Path, python: str) -> list[Requirement]:
    """Returns what a wheel requires on Linux with a Python, without extras and pins: those are in constraints.txt."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [each for each in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", each)]
        lines = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    there = {"python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0"}
    there |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    required = [Requirement(line) for line in lines]
    return [each for each in required if each.marker is None or each.marker.evaluate({**there, "extra": ""})]


def stored(wheel: Path, into: Path) -> Path:
    """Writes a wheel uncompressed, which packs better, without what is unused; returns its path."""
    with zipfile.ZipFile(wheel) as read, zipfile.ZipFile(into / wheel.name, "w") as written:
        for entry in read.infolist():
            if not UNUSED.search(entry.filename):
                content = read.read(entry)
                entry.compress_type = zipfile.ZIP_STORED
                written.writestr(entry, content)
    return into / wheel.name


# ---- archives ------------------------------------------------------------------------------------------------------


def packed(archive: Path, files: dict[str, Path]) -> Path:
    """Writes files and folders, by their names in it, into an archive; returns its path."""
    with lzma.open(archive, "wb", preset=3) as compressed, tarfile.open(fileobj=compressed, mode="w|") as tar:
        for name, path in files.items():
            tar.add(path, name)
    return archive


def groups(wheels: Sequence[Path], number: int) -> list[list[Path]]:
    """Returns the wheels in groups that take about as long to unpack, side by side."""
    shared: list[list[Path]] = [[] for _ in range(number)]
    for wheel in sorted(wheels, key=lambda each: -each.stat().st_size):
        min(shared, key=lambda group: sum(each.stat().st_size for each in group)).append(wheel)
    return [group for group in shared if group]


def split(archive: Path, out: Path) -> dict[str, dict[str, int | str]]:
    """Cuts a file into parts; returns their sizes and hashes by name."""
    parts: dict[str, dict[str, int | str]] = {}
    with open(archive, "rb") as file:
        while content := file.read(PART):
            name = f"part.{len(parts):02}"
            (out / name).write_bytes(content)
            parts[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return parts


def project(archive: Path) -> None:
    """Writes the files of the working tree that git does not ignore."""
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    with gzip.open(archive, "wb", compresslevel=6) as compressed, tarfile.open(fileobj=compressed, mode="w|") as tar:
        for name in sorted(set(listed)):
            if name and (ROOT / name).exists():
                tar.add(ROOT / name, name, recursive=False)


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout


# ---- the bundle ----------------------------------------------------------------------------------------------------


def make(out: Path, python: str, has: Sequence[str], artifacts: Sequence[Path], fetch: Fetch = fetch) -> None:
    """Writes a bundle, in the place of an earlier one. Raises UnusableError."""
    if out.exists() and not (out / MANIFEST).exists():
        raise UnusableError(f"--out {out}: is there already, and is no bundle")
    with open(ROOT / "pyproject.toml", "rb") as file:
        roots = [*tomllib.load(file)["project"]["dependencies"], *STEPS_NEED]
    held = {f"artifacts/{number}": each.path for number, each in enumerate(folders(artifacts))}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as scratch, replacing(out) as unfinished:
        unfinished.mkdir()
        parts, wheels = wheels_and_more(Path(scratch), unfinished, roots, python, has, held, fetch)
        project(unfinished / "project.tar.gz")
        (unfinished / "start.sh").write_text(START)
        (unfinished / "start.sh").chmod(0o755)
        manifest = {
            "python": python,
            "commit": git("describe", "--always", "--dirty").strip(),
            "has": list(has),
            "wheels": wheels,
            "artifacts": [str(path) for path in held.values()],
            "parts": parts,
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def wheels_and_more(
    scratch: Path, out: Path, roots: Sequence[str], python: str, has: Sequence[str], held: dict[str, Path], fetch: Fetch
) -> tuple[dict[str, dict[str, int | str]], list[str]]:
    """Writes the parts into `out`; returns them, and the names of the wheels in them."""
    brought, plain, archives = (scratch / name for name in ("brought", "plain", "archives"))
    for folder in (brought, plain, archives):
        folder.mkdir()
    collect(roots, has, python, brought, fetch)
    wheels = [stored(wheel, plain) for wheel in sorted(brought.glob("*.whl"))]
    jobs = {f"wheels-{n}": {f"wheels/{each.name}": each for each in group} for n, group in enumerate(groups(wheels, 4))}
    package = kernel_package()
    jobs["cache"] = {f"cache/maxwhisper/kernels/{package.name}": package}
    if held:
        jobs["artifacts"] = held
    with ThreadPoolExecutor() as threads:  # lzma lets others run meanwhile
        done = list(threads.map(packed, (archives / f"{name}.tar.xz" for name in jobs), jobs.values()))
    with tarfile.open(scratch / "all.tar", "w") as tar:
        for archive in done:
            tar.add(archive, archive.name)
    return split(scratch / "all.tar", out), [wheel.name for wheel in wheels]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.gpu_run.bundle", description=__doc__)
    add = parser.add_argument
    add("--python", default="3.12", help="version of the Python that is there (default: 3.12)")
    add("--has", default="torch", help="packages that are there, and are not brought, comma-separated (default: torch)")
    add("--artifacts", type=Path, action="append", help="folders with artifacts in them (default: build/artifacts)")
    add("--out", type=Path, default=Path("build", "gpu-bundle"), help="default: build/gpu-bundle")
    given = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", given.python):
        parser.error(f"argument --python: must be a version such as 3.12, not '{given.python}'")
    has = [name for name in given.has.split(",") if name]
    try:
        make(given.out, given.python, has, given.artifacts or [Path("build", "artifacts")])
    except UnusableError as error:
        parser.exit(1, f"gpu-bundle: {error}\n")
    print(f"{given.out}: {sum(file.stat().st_size for file in given.out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
