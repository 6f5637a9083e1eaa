"""The project's sources with mutants in them, as a checkout of their own."""

import itertools
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from ..fixtures import ROOT
from . import mojo_sources, python_sources
from .mutant import COMPONENTS, Choose, Mutant, component_of, is_executed

LINKED = ("reference", "tests", "fixtures", "conftest.py", "pyproject.toml")


def sources() -> Iterator[tuple[str, Callable[[str, str, Choose], str]]]:
    """Yields every file of a component, as below maxwhisper/, and what puts mutants into it."""
    package = ROOT / "maxwhisper"
    patterns = [pattern for _, _, patterns in COMPONENTS for pattern in patterns.split()]
    files = sorted({path.relative_to(package).as_posix() for pattern in patterns for path in package.glob(pattern)})
    for file in files:
        if is_executed(file):
            yield file, mojo_sources.instrumented if file.endswith(".mojo") else python_sources.instrumented


def all_mutants() -> list[Mutant]:
    """Returns every mutant there is, numbered from 1 on."""
    found: list[Mutant] = []

    def note(file: str, line: int, operator: str, before: str, after: str) -> None:
        found.append(Mutant(len(found) + 1, file, line, operator, before, after))

    for file, instrumented in sources():
        instrumented((ROOT / "maxwhisper" / file).read_text(), file, note)
    return found


def sources_hash() -> str:
    """Returns a hash of what mutants are made of and tried with: our sources and their tests."""
    digest = sha256()
    for name in ("maxwhisper", "reference", "tests"):
        for path in sorted(each for each in (ROOT / name).rglob("*") if each.suffix in (".py", ".mojo")):
            digest.update(f"{path.relative_to(ROOT)} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def sample(mutants: Sequence[Mutant], number: int, seed: int) -> list[Mutant]:
    """Returns as many mutants as are asked for, as evenly from the components as these allow, by number.

    Each has its place in the queue by itself, so that a change elsewhere leaves the sample as it was.
    """

    def place(mutant: Mutant) -> bytes:
        return sha256(f"{seed} {mutant.file} {mutant.operator} {mutant.before} {mutant.after}".encode()).digest()

    by_component = defaultdict(list)
    for mutant in mutants:
        by_component[component_of(mutant.file)].append(mutant)
    shuffled = [sorted(of, key=place) for of in by_component.values()]
    chosen: list[Mutant] = []
    while len(chosen) < min(number, len(mutants)):
        for of in filter(None, shuffled):
            chosen.append(of.pop())
    return sorted(chosen[:number], key=lambda mutant: mutant.number)


def plant(mutants: Sequence[Mutant], tree: Path) -> None:
    """Writes the checkout with mutants in it: those of Python sources behind the switch, or one of a kernel."""
    tree.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        if not (tree / name).exists():
            (tree / name).symlink_to(ROOT / name)
    shutil.rmtree(tree / "maxwhisper", ignore_errors=True)
    shutil.copytree(ROOT / "maxwhisper", tree / "maxwhisper", ignore=shutil.ignore_patterns("__pycache__"))
    wanted = {mutant.number for mutant in mutants}
    numbers = itertools.count(1)

    def choose(*_: object) -> int | None:
        number = next(numbers)
        return number if number in wanted else None

    for file, instrumented in sources():
        path = tree / "maxwhisper" / file
        path.write_text(instrumented(path.read_text(), file, choose))


def compiles(tree: Path) -> bool:
    """Tells whether the compiler takes the kernels of a checkout, whose tests then find them compiled."""
    command = "from maxwhisper.engine.kernel_library import kernel_library; kernel_library()"
    environ = {**os.environ, "PYTHONPATH": str(tree)}
    run = subprocess.run([sys.executable, "-c", command], cwd=tree, env=environ, capture_output=True, text=True)
    if run.returncode and "does not compile" not in run.stderr:
        raise RuntimeError(f"{tree}: {run.stderr[-300:]}")
    return not run.returncode
