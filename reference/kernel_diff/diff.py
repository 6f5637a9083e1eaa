"""How the kernels of two revisions differ, by graph, and the same in Markdown."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from maxwhisper.network.blocks import BLOCKS

from .graphs import Compiled, Name
from .kernels import Kernel

DECODING_TESTS = ("steps", "transcript")
"""Words of `pytest -k` for what is decoded by graphs that are no blocks."""


@dataclass(frozen=True, order=True)
class Change:
    """A kernel that is in one of two revisions alone, or in both with another code; sizes are in bytes."""

    name: str
    base: int | None
    head: int | None

    @property
    def kind(self) -> str:
        return "added" if self.base is None else "gone" if self.head is None else "changed"


@dataclass(frozen=True)
class Difference:
    """A graph of two revisions; None where only the other one has it.

    changes: of its kernels, each with the number of operations that may launch it. launched_alike: whether the code on
    the CPU that launches them is the same.
    """

    name: Name
    base: Compiled | None
    head: Compiled | None
    changes: Counter[Change]
    launched_alike: bool

    @property
    def same(self) -> bool:
        return not self.changes and self.launched_alike

    def number(self, kind: str) -> int:
        return sum(change.kind == kind for change in self.changes)


@dataclass(frozen=True)
class Report:
    """The differences of all graphs, in the order of their names."""

    differences: Sequence[Difference]

    @property
    def changed(self) -> list[Difference]:
        return [each for each in self.differences if not each.same]

    @property
    def selection(self) -> str:
        """Returns what `pytest -k` takes to test the changed blocks alone; empty if none is."""
        blocks = [each.name.block.removesuffix(" with intermediates") for each in self.changed if each.head]
        words = [word for block in blocks for word in ([block] if block in BLOCKS else DECODING_TESTS)]
        return " or ".join(dict.fromkeys(words))

    def markdown(self) -> str:
        """Returns the report."""
        lines = ["### Compiled code for the GPU", "", self._summary(), ""]
        if self.selection:
            lines += ["Only these need time on a GPU:", "", "```", f'make gpu-parity K="{self.selection}"', "```", ""]
        return "\n".join([*lines, *self._graphs(), "", *self._kernels()]).rstrip() + "\n"

    def _summary(self) -> str:
        kinds = Counter(change.kind for change in {change for each in self.changed for change in each.changes})
        kernels = ", ".join(f"{kinds[kind]} {kind}" for kind in ("added", "gone", "changed"))
        return f"{len(self.changed)} of {len(self.differences)} graphs differ; kernels: {kernels}."

    def _graphs(self) -> Iterator[str]:
        yield "| graph | dtype | launches at least | kernels | added | gone | changed | to see |"
        yield "|---|---|---:|---:|---:|---:|---:|---|"
        several = len({each.name.dims for each in self.differences if len(each.name.dims) > 1}) > 1
        for each in self.differences:
            numbers = " | ".join(str(each.number(kind) or "") for kind in ("added", "gone", "changed"))
            launches = arrow(each, lambda graph: graph.n_launch)
            kernels = arrow(each, lambda graph: len(graph.kernels))
            width = dict(each.name.dims).get("n_text_state")
            size = f", {width} wide" if several and width is not None else ""
            name = f"{each.name.block} ({each.name.unit}{size}) | {each.name.dtype}"
            yield f"| {name} | {launches} | {kernels} | {numbers} | {seen(each)} |"

    def _kernels(self) -> Iterator[str]:
        """Yields every change once, with the graphs that it is in."""
        graphs = defaultdict(list)
        for each in self.changed:
            for change, number in each.changes.items():
                times = f" x{number}" if number > 1 else ""
                graphs[change].append(f"{each.name.block}{times}")
        if not graphs:
            return
        yield "| kernel | | bytes in base | in head | graphs |"
        yield "|---|---|---:|---:|---|"
        for change in sorted(graphs, key=lambda each: (each.kind, each.name, each.base or 0, each.head or 0)):
            base, head = ("" if size is None else str(size) for size in (change.base, change.head))
            names = ", ".join(dict.fromkeys(graphs[change]))
            yield f"| `{change.name}` | {change.kind} | {base} | {head} | {names} |"


def compare(base: Mapping[Name, Compiled], head: Mapping[Name, Compiled]) -> Report:
    """Compares the graphs of two revisions."""
    return Report([difference(name, base.get(name), head.get(name)) for name in sorted({*base, *head})])


def difference(name: Name, base: Compiled | None, head: Compiled | None) -> Difference:
    """Compares a graph of two revisions; one of them may lack it."""
    before, after = (each.kernels if each else Counter() for each in (base, head))
    hosts = [each.host if each else Counter() for each in (base, head)]
    return Difference(name, base, head, changes(before, after), hosts[0] == hosts[1])


def changes(base: Counter[Kernel], head: Counter[Kernel]) -> Counter[Change]:
    """Returns how kernels differ. One that is gone and one that is added are one that has changed, if their names are
    the same."""
    found: Counter[Change] = Counter()
    gone, added = (by_name((one - other).elements()) for one, other in ((base, head), (head, base)))
    for name in {*gone, *added}:
        sizes = ([kernel.size for kernel in each.get(name, [])] for each in (gone, added))
        found.update(Change(name, *pair) for pair in zip_longest(*sizes))
    return found


def by_name(kernels: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    """Returns kernels by name, the smallest first."""
    found = defaultdict(list)
    for kernel in kernels:
        found[kernel.name].append(kernel)
    return {name: sorted(each, key=lambda kernel: (kernel.size, kernel.digest)) for name, each in found.items()}


def arrow(each: Difference, number: Callable[[Compiled], int]) -> str:
    """Returns a number of base and of head, once if they are the same."""
    numbers = [str(number(graph)) if graph else "none" for graph in (each.base, each.head)]
    return " → ".join(dict.fromkeys(numbers))


def seen(each: Difference) -> str:
    """Returns what a review must see of a graph: in bold what base had less of."""
    before, after = (graph.flags if graph else Counter() for graph in (each.base, each.head))
    flags = []
    for flag in before | after:
        text = f"{flag}: " + " → ".join(dict.fromkeys(str(number[flag]) for number in (before, after)))
        flags.append(f"**{text}**" if after[flag] > before[flag] else text)
    if not each.base or not each.head:
        flags.insert(0, "new" if each.head else "no longer there")
    elif not each.changes and not each.launched_alike:
        flags.insert(0, "launched otherwise")
    return ", ".join(flags)
