"""The project's sources with mutants in them, as a checkout of their own."""

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from mojo.run import subprocess_run_mojo

from ..fixtures import ROOT
from . import mojo_sources, python_sources
from .mutant import ALWAYS, COMPONENTS, NOT_MUTATED, Choose, Mutant, component_of
from .switch import ADDRESS, REACHED

LINKED = ("reference", "tests", "fixtures", "conftest.py", "pyproject.toml")
KERNEL_SWITCH = f'''"""Which mutant is in force: see reference/mutants/switch.py."""

from std.memory import Pointer


@no_inline  # a call for every place, not a copy: it is compiled hundreds of times
def mutated(number: Int) -> Bool:
    var reached = Pointer[UInt8, MutAnyOrigin](unsafe_from_address={REACHED})
    if reached[unsafe_offset=number] == 0:  # or else threads would write one cache line all the time
        reached[unsafe_offset=number] = 1
    return Pointer[Int64, MutAnyOrigin](unsafe_from_address={ADDRESS})[unsafe_offset=0] == Int64(number)
'''


def sources() -> Iterator[tuple[str, Callable[[str, str, Choose], str]]]:
    """Yields every file of a component, as below maxwhisper/, and what puts mutants into it."""
    package = ROOT / "maxwhisper"
    patterns = [pattern for _, _, patterns in COMPONENTS for pattern in patterns.split()]
    files = sorted({path.relative_to(package).as_posix() for pattern in patterns for path in package.glob(pattern)})
    for file in files:
        if file not in NOT_MUTATED:
            yield file, mojo_sources.instrumented if file.endswith(".mojo") else python_sources.instrumented


def all_mutants() -> list[Mutant]:
    """Returns every mutant there is, numbered from 1 on."""
    found: list[Mutant] = []

    def note(file: str, line: int, operator: str, before: str, after: str) -> None:
        found.append(Mutant(len(found) + 1, file, line, operator, before, after, line in unrolled))

    for file, instrumented in sources():
        text = (ROOT / "maxwhisper" / file).read_text()
        unrolled = mojo_sources.unrolled(text) if file.endswith(".mojo") else set()
        instrumented(text, file, note)
    return found


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


def plant(mutants: Sequence[Mutant], tree: Path) -> list[Mutant]:
    """Writes the checkout with the mutants in it, without those that the compiler refuses, and returns the others.

    A single mutant that is to be alone is planted without a switch. Raises RuntimeError with the compiler's words if
    kernels do not compile for another reason.
    """
    tree.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        if not (tree / name).exists():
            (tree / name).symlink_to(ROOT / name)
    left = list(mutants)
    kernels = tree / "maxwhisper" / "kernels"
    while left:
        write(left, tree)
        if not (errors := errors_in(kernels)):
            break
        places = re.findall(r"(\S+\.mojo):(\d+):\d+: error:", errors)
        refused = {number for file, line in places for number in mutants_at(Path(file), int(line))}
        if not refused and not left[0].alone:
            raise RuntimeError(f"{kernels} does not compile:\n{errors}")
        left = [mutant for mutant in left if mutant.number not in refused and not mutant.alone]
    return left


def write(mutants: Sequence[Mutant], tree: Path) -> None:
    shutil.rmtree(tree / "maxwhisper", ignore_errors=True)
    shutil.copytree(ROOT / "maxwhisper", tree / "maxwhisper", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "maxwhisper" / "kernels" / "mutation.mojo").write_text(KERNEL_SWITCH)
    with (tree / "maxwhisper" / "__init__.py").open("a") as init:  # kernels read its memory, in whichever process
        init.write("\nfrom reference.mutants import switch as _switch\n")
    wanted = {mutant.number: ALWAYS if mutant.alone else mutant.number for mutant in mutants}
    number = 0

    def choose(*_: object) -> int | None:
        nonlocal number
        number += 1
        return wanted.get(number)

    for file, instrumented in sources():
        path = tree / "maxwhisper" / file
        path.write_text(instrumented(path.read_text(), file, choose))


def errors_in(kernels: Path) -> str:
    """Returns what the compiler says of kernels that it refuses, nothing of others."""
    arguments = ["precompile", str(kernels), "-o", str(kernels.parents[1] / "kernels.mojoc")]
    compiled = subprocess_run_mojo(arguments, capture_output=True, text=True)
    return compiled.stderr if compiled.returncode else ""


def mutants_at(file: Path, line: int) -> set[int]:
    """Returns the mutant that a line of a mutated kernel belongs to, or all of the statement around it."""
    lines = file.read_text().split("\n")
    for near in (lines[line - 1], *lines[line : line + 2], *lines[max(0, line - 3) : line - 1][::-1]):
        if found := re.search(r"mutated\((\d+)\)", near):
            return {int(found[1])}
    return set()
