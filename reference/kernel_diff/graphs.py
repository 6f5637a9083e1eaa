"""What a folder of artifacts has a GPU do, graph by graph."""

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maxwhisper.engine.artifacts import MANIFEST
from maxwhisper.errors import ArtifactError

from .kernels import SPLIT_REDUCER, Code, Kernel, Launch
from .mef import Graph, Mef, Operation

CACHE = re.compile(r'!mgp\.tensor<((\d+|\?)x){4}\w+, <"gpu", 0>>')
"""The type of what a step reads keys or values from: a tensor on the GPU of rows, tokens, heads and channels."""
HAS_BUFFER = "mgp.tensor.extract.buffer"
"""The operation that gives the memory of a tensor."""
WORDS = re.compile(r"(?:mo\.|custom__)[\w.]+")
VIEWS = {"mo.static.reshape", "mo.static.broadcast_to"}
COPIES = {"mo.transpose", "mo.concat", "mo.slice", "mo.cast"}
"""What changes no value, or only its dtype, in MAX's words; by VIEWS alone nothing is copied."""
ON_THE_HOST = ("mgp.", "index.", "pop.", "kgen.", "shapeof(")
"""How the names of operations begin that launch nothing."""


@dataclass(frozen=True, order=True)
class Name:
    """The name of a graph: what it compiles with, its block, its dtype, and the model's dimensions."""

    block: str
    dtype: str
    unit: str
    dims: tuple[tuple[str, int], ...]
    storage: str


@dataclass(frozen=True)
class Compiled:
    """A graph as it is compiled: its operations that launch something on a GPU."""

    graph: Graph
    launches: list[tuple[Operation, Launch]]

    @cached_property
    def kernels(self) -> Counter[Kernel]:
        """Returns every kernel, with the number of operations that may launch it."""
        return Counter(kernel for _, launch in self.launches for kernel in launch.kernels)

    @cached_property
    def n_launch(self) -> int:
        """Counts the kernels that an execution launches at least: one for each operation not fused with another."""
        return sum(max(1, len(fused(operation.summary))) for operation, _ in self.launches)

    @cached_property
    def flags(self) -> Counter[str]:
        """Returns what a review must see, with the number of operations or kernels."""
        found: Counter[str] = Counter()
        found["TF32 kernel"] = sum(kernel.tf32 for kernel in self.kernels)
        found["cuBLAS in TF32"] = sum(launch.tf32 for _, launch in self.launches)
        found["split reducer"] = sum(SPLIT_REDUCER in kernel.name for kernel in self.kernels)
        found["copy of a cache"] = self._copies()
        return +found

    @cached_property
    def host(self) -> Counter[str]:
        """Returns digests of the code that launches."""
        return Counter(launch.host for _, launch in self.launches)

    def _copies(self) -> int:
        """Returns how many parts of operations that take a cache copy something. What, MAX does not say."""
        caches = {value for value in range(self.graph.inputs) if CACHE.fullmatch(self.graph.types[value])}
        for operation in self.graph.operations:
            if operation.summary == HAS_BUFFER and caches & {*operation.takes}:
                caches |= {*operation.gives}
        taking = [(operation, launch) for operation, launch in self.launches if caches & {*operation.takes}]
        return sum(launch.copies + sum(map(only_copies, fused(operation.summary))) for operation, launch in taking)


def only_copies(part: str) -> bool:
    """Tells whether a part of an operation copies values, and computes nothing with them."""
    words = set(WORDS.findall(part))
    return bool(words & COPIES) and words <= COPIES | VIEWS


def fused(summary: str) -> list[str]:
    """Returns those of an operation's parts, in MAX's words, that compute something on the GPU.

    >>> fused("Sequence(index.constant, Epilogue(mo.matmul, mo.add, operandIndices=[0]), mo.cast)")
    ['Epilogue(mo.matmul, mo.add, operandIndices=[0])', 'mo.cast']
    """
    parts, depth, inner = [""], 0, summary
    if summary.startswith("Sequence("):
        inner = summary.removeprefix("Sequence(").removesuffix(")")
    for character in inner:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if not part.strip().startswith(ON_THE_HOST)]


def read(folder: Path) -> dict[Name, Compiled]:
    """Returns the graphs of a folder of artifacts that launch something on a GPU.

    Raises ArtifactError for a folder or a file that cannot be read, by its name.
    """
    path = folder / MANIFEST
    try:
        entries = json.loads(path.read_text())["artifacts"]
        return dict(each for entry in entries for each in _read(folder / entry["file"], entry))
    except OSError as error:
        raise ArtifactError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: is no manifest of artifacts") from error


def _read(path: Path, entry: dict[str, Any]) -> Iterator[tuple[Name, Compiled]]:
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
        raise ArtifactError(f"{path}: sha256 is {found}, expected {entry['sha256']}")
    dims = tuple(sorted(entry["dims"].items()))
    for graph in compiled(content, path):
        if graph.launches:
            name = Name(graph.graph.name, entry["compute"], entry["unit"], dims, entry["storage"])
            yield name, graph


def compiled(content: bytes, path: Path) -> list[Compiled]:
    """Returns the graphs of an artifact. Raises ArtifactError, with the path, for what is none of MAX 26.7."""
    try:
        mef = Mef(content)
        code = {number: Code(image) for number, image in mef.objects.items()}
        return [Compiled(graph, list(_launches(graph, code))) for graph in mef.graphs]
    except (struct.error, ArithmeticError, LookupError, ValueError) as error:
        raise ArtifactError(f"{path}: is no artifact of MAX 26.7: {error}") from error


def _launches(graph: Graph, code: dict[int, Code]) -> Iterator[tuple[Operation, Launch]]:
    for operation in graph.operations:
        if launch := code[operation.module].launch(operation.function):
            yield operation, launch
