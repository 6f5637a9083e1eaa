"""What a compilation is made of: the graphs as MAX is given them, and the kernels of ours that these call.

A change to anything else, or to a comment, changes no key.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from max.graph import Module as GraphModule

from .kernel_library import KERNELS, code, kernel_library
from .process import compiler
from .program import Program


def built_from(programs: Sequence[Program]) -> str:
    """Returns SHA-256 of the graphs, and of the sources of the kernels that they call."""
    text, weights = graphs_of(programs)
    sources = [f"{name}\n{code(KERNELS / name)}" for name in sources_of(set(re.findall(r'"(maxwhisper\.\w+)"', text)))]
    return hashlib.sha256("\n".join([text, weights, version("mojo-compiler"), *sources]).encode()).hexdigest()


def graphs_of(programs: Sequence[Program]) -> tuple[str, str]:
    """Returns the graphs as MAX is given them, and the weights that they take."""
    module = GraphModule()
    with compiler():
        weights = [program.trace(module) for program in programs]
        text = module._to_mlir_str()
        for library in kernel_library().library_paths():  # whose name would change with any kernel
            text = text.replace(str(library), KERNELS.name)
    return text, repr(weights)


def sources_of(operations: set[str]) -> list[str]:
    """Returns the files of KERNELS that register the operations, and those that these import, and so on, sorted."""
    sources = {path.name: path.read_text() for path in KERNELS.glob("*.mojo")}
    wanted = [name for name, text in sources.items() if operations & set(registered(text))]
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            wanted += [f"{other}.mojo" for other in re.findall(r"(?m)^from \.(\w+) import", sources[name])]
    return sorted(found)


def registered(source: str) -> Iterator[str]:
    """Gives the operations that a file of KERNELS registers."""
    yield from re.findall(r'(?m)^@extensibility\.register\("([\w.]+)"\)', source)
