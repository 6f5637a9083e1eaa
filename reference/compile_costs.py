"""What compiling costs, cold: by module, and by kernel compiled alone.

    python -m reference.compile_costs [--size fixture] [--dtype float32]      prints two tables; takes some minutes

MAX writes a module as Mojo and compiles that. A module costs what it costs in a process of its own with empty caches,
tracing and our precompiled kernels not counted. A kernel costs what the compiler takes for its lines alone, beyond what
it takes for a module without any. Seconds are of processor time, on all cores together.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from max.dtype import DType
from max.graph import DeviceRef, TensorType

from maxwhisper.compiled import DECODING, programs_of
from maxwhisper.decoding.rules import NoWeights
from maxwhisper.engine.kernel_library import kernel_library
from maxwhisper.engine.program import Artifact, Program
from maxwhisper.engine.session import session

from .judge import dtype_name
from .kernel_diff.elf import EXECUTABLE, Elf
from .measures import DTYPES
from .models import FIXTURE, SIZES, load
from .suite import Suite

ADDITION = "an addition"
"""The module that shows what MAX takes for any."""


def modules(suite: Suite) -> list[str]:
    """Returns what is compiled for a model, by unit; where it transcribes, what that takes besides."""
    return [ADDITION, *suite.subject.units, *((DECODING, "alignment") if suite.subject.transcribes else ())]


def programs(suite: Suite, module: str) -> list[Program]:
    if module == ADDITION:
        x = TensorType(DType.float32, [31], DeviceRef.CPU())
        return [Program("addition", "", NoWeights(), lambda _, x: [x + x], {"x": x})]
    subject = suite.subject
    return subject.programs(module) if module in subject.units else programs_of(module, suite.dims, suite.policy)


def numbered(programs: Sequence[Program]) -> list[Program]:
    """Returns the programs with short names: MAX calls the files that it writes by those of all graphs of a module."""
    return [replace(program, name=str(number)) for number, program in enumerate(programs)]


# ---- the module as Mojo --------------------------------------------------------------------------------------------


@dataclass
class Emitted:
    """What MAX writes of a module: imports, functions that call kernels or do without, kernels by name, and types."""

    imports: str
    callers: list[str]
    kernels: dict[str, str]
    types: str

    @classmethod
    def of(cls, text: str) -> "Emitted":
        functions, *types = re.split(r"(?m)^(?=from |(?:@fieldwise_init\n)?(?:struct|trait) )", text, maxsplit=1)
        imports, *functions = re.split(r"(?m)^(?=# FusionInfo:)", functions)
        named = {name_of(function): function for function in functions}
        kernels = {name: function for name, function in named.items() if not name.endswith("_async")}
        callers = [function for name, function in named.items() if name not in kernels]
        return cls(imports, callers, kernels, "".join(types))

    def alone(self, kernel: str) -> str:
        """Returns the lines of a kernel and of what calls it."""
        callers = [caller for caller in self.callers if f" {kernel}(" in caller]
        return "".join([self.imports, *callers, self.kernels[kernel], self.types])

    @property
    def primitives(self) -> int:
        """Returns how many functions call no kernel: they compute shapes, and hand on memory."""
        return sum(not any(f" {kernel}(" in caller for kernel in self.kernels) for caller in self.callers)


def name_of(function: str) -> str:
    found = re.search(r"(?m)^def (\w+)\(", function)
    assert found, function[:200]
    return found[1]


def kind(kernel: str) -> str:
    """Returns the name without what tells instantiations apart: a hash, and a number."""
    return re.sub(r"(_[0-9a-f]{16})?(_\d+)?$", "", kernel.removeprefix("__"))


# ---- what it costs -------------------------------------------------------------------------------------------------


def timed(command: Sequence[str], **environment: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Returns the processor time of a command, and what it printed."""

    def now() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = now()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return now() - before, done


def built(text: str) -> tuple[float, int]:
    """Returns the processor time that the compiler takes for a module, and the bytes of its instructions."""
    (package,) = (Path(path).resolve() for path in kernel_library().library_paths())
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "module.mojo"), Path(folder, "module.o")
        source.write_text(text)
        command = ["mojo", "build", "--emit", "object", str(source), "-I", str(package.parent), "-o", str(target)]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        seconds, done = timed(command, MODULAR_CACHE_DIR=folder, PATH=path)
        done.check_returncode()
        sections = Elf(target.read_bytes()).sections
        return seconds, sum(section.size for section in sections if section.flags & EXECUTABLE)


def compile_alone(suite: Suite, module: str) -> tuple[float, Emitted]:
    """Returns the processor time that a process with empty caches takes to compile a module, and what MAX wrote."""
    command = [sys.executable, "-m", "reference.compile_costs", "--only", module]
    command += ["--size", suite.model.size, "--dtype", dtype_name(suite.dtype)]
    with tempfile.TemporaryDirectory() as folder:
        _, done = timed(command, MODULAR_CACHE_DIR=str(Path(folder, "cache")))
        done.check_returncode()
        written = Path(folder, "written")
        # It ends by an error, as it is told to, once MAX has written the module.
        timed(command, MODULAR_CACHE_DIR=str(Path(folder, "other")), MODULAR_DEBUG=f"pre-jit,ir-output-dir={written}")
        (source,) = written.glob("*.mojo")
        return json.loads(done.stdout.splitlines()[-1]), Emitted.of(source.read_text())


@dataclass
class Kind:
    """Kernels that differ in shapes and in what is computed with their results."""

    modules: set[str] = field(default_factory=set)
    number: int = 0
    source: str = ""


def report(suite: Suite) -> None:
    """Prints the tables."""
    kinds: dict[str, Kind] = {}
    fixed = 0.0
    print("| module | graphs | kernels | primitives | s | beyond an addition |\n|---|---|---|---|---|---|")
    for module in modules(suite):
        seconds, emitted = compile_alone(suite, module)
        fixed = fixed or seconds
        n_graph, n_kernel = len(programs(suite, module)), len(emitted.kernels)
        print(f"| {module} | {n_graph} | {n_kernel} | {emitted.primitives} | {seconds:.0f} | {seconds - fixed:.0f} |")
        for kernel in emitted.kernels:
            of_kind = kinds.setdefault(kind(kernel), Kind())
            of_kind.modules.add(module)
            of_kind.number += 1
            of_kind.source = of_kind.source or emitted.alone(kernel)
    empty = statistics.median(built('@export\ndef nothing() abi("Mojo"):\n    pass\n')[0] for _ in range(3))
    print(f"\nThe compiler takes {empty:.1f} s for a module without a kernel.\n")
    print("| kernel | instantiations | modules | s alone | KB of code |\n|---|---|---|---|---|")
    for name, found in sorted(kinds.items()):
        seconds, size = built(found.source)
        print(f"| {name} | {found.number} | {len(found.modules)} | {seconds - empty:.1f} | {size / 1024:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.compile_costs", description=__doc__)
    parser.add_argument("--size", default=FIXTURE, choices=(FIXTURE, *SIZES))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--only", metavar="MODULE", help="compile this module here, and print its processor time")
    options = parser.parse_args()
    suite = Suite(load(options.size), DTYPES[options.dtype])
    if not options.only:
        report(suite)
        return
    traced = numbered(programs(suite, options.only))
    session("cpu")
    kernel_library()
    before = resource.getrusage(resource.RUSAGE_SELF)
    Artifact(options.only, traced, "cpu")
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


if __name__ == "__main__":
    main()
