"""What `growth` has measured, as a table and as a picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from maxwhisper.compare.engines import REFERENCE, SUBJECT
from maxwhisper.compare.plot import shown
from maxwhisper.compare.results import middle
from maxwhisper.compare.table import number

TITLES = {"minutes": "Audio length", "batch": "Batch", "size": "Model size", "threads": "Threads"}
HEADINGS = {"minutes": "minutes", "batch": "windows at once", "size": "model", "threads": "threads"}
"""By the field of `Point` that varies."""


@dataclass(frozen=True)
class Point:
    """What an engine is given: a recording of some minutes, or where these are None a batch of windows of 30 s.

    size: a key of `maxwhisper.compare.material.SIZES`.
    """

    size: str
    threads: int
    batch: int = 1
    minutes: int | None = None


@dataclass
class Cost:
    """An engine at a point, one entry for each round. seconds: of the recording or the batch. peak_bytes: resident
    memory of the process, loading included. error: why it failed, in one line."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table. axis: the field of the point that varies. costs: by the name of the engine."""

    axis: str
    point: Point
    costs: dict[str, Cost]

    @property
    def value(self) -> int | str:
        return getattr(self.point, self.axis)

    def seconds(self, engine: str) -> float | None:
        """Returns the median seconds of a recording, or of a window of a batch; None where nothing was measured."""
        found = middle(self.costs[engine].seconds)
        return found / self.point.batch if found is not None else None

    def peak_bytes(self, engine: str) -> float | None:
        """Returns the median of the peaks; None where nothing was measured."""
        return middle(self.costs[engine].peak_bytes)


@dataclass(frozen=True)
class Growth:
    """All that was measured. tokens: of every window of 30 s. versions: of each engine's packages."""

    tokens: int
    base: Point
    machine: dict[str, Any]
    versions: dict[str, dict[str, str | None]]
    rows: list[Row]

    @property
    def axes(self) -> list[str]:
        return list(dict.fromkeys(row.axis for row in self.rows))

    @property
    def failures(self) -> list[str]:
        """Returns a line for each engine that failed at a point."""
        return [
            f"{engine}, {HEADINGS[row.axis]} {row.value}: failed: {cost.error}"
            for row in self.rows
            for engine, cost in row.costs.items()
            if cost.error
        ]

    def of(self, axis: str) -> list[Row]:
        return [row for row in self.rows if row.axis == axis]


# ---- table ---------------------------------------------------------------------------------------------------------


def markdown(growth: Growth) -> str:
    """Returns a table for each axis, what failed, and what was measured how."""
    lines = [line for axis in growth.axes for line in (*table(axis, growth.of(axis)), "")]
    failures = [*growth.failures, ""] if growth.failures else []
    return "\n".join([*lines, *failures, *notes(growth), ""])


def table(axis: str, rows: Sequence[Row]) -> Iterator[str]:
    measured_in = "s" if axis == "minutes" else "ms per window"
    yield f"{TITLES[axis]}:"
    yield ""
    yield (
        f"| {HEADINGS[axis]} | {SUBJECT} {measured_in} | {REFERENCE} {measured_in} | ratio"
        f" | {SUBJECT} peak MB | {REFERENCE} peak MB | ratio | rounds |"
    )
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        digits, factor = (2, 1.0) if axis == "minutes" else (0, 1e3)
        seconds = compared([row.seconds(engine) for engine in (SUBJECT, REFERENCE)], digits, factor)
        memory = compared([row.peak_bytes(engine) for engine in (SUBJECT, REFERENCE)], 0, 1e-6)
        rounds = max(len(cost.seconds) for cost in row.costs.values())
        yield f"| {row.value} | {' | '.join([*seconds, *memory])} | {rounds} |"


def compared(values: Sequence[float | None], digits: int, factor: float) -> list[str]:
    """Returns both engines' figures and the ratio of the first to the second; a dash where nothing was measured."""
    ours, theirs = values
    ratio = ours / theirs if ours is not None and theirs else None
    return [number(ours, digits, factor), number(theirs, digits, factor), number(ratio, 2)]


def notes(growth: Growth) -> list[str]:
    base, machine = growth.base, growth.machine
    packages = {f"{name} {found}" for each in growth.versions.values() for name, found in each.items()}
    return [
        f"Random weights, float32 arithmetic, greedy, {growth.tokens} tokens for every 30 s of audio; {base.size}, one"
        f" window at once and {base.threads} threads where these do not vary. Ratio: {SUBJECT}'s over {REFERENCE}'s.",
        "",
        "Audio length: from samples to tokens, the spectrogram by each engine itself, windows one after the other."
        " The others: encoder and tokens of windows of 30 s, whose spectrograms were made before. Each round in a"
        " process of its own, engines in turn, timed after a first call; medians. Peak: resident memory of that"
        " process, loading included.",
        "",
        f"{machine['processor']}, {machine['cpus']} CPUs, Python {machine['python']}; {', '.join(sorted(packages))}.",
    ]


# ---- picture -------------------------------------------------------------------------------------------------------


def plot(growth: Growth, path: Path) -> None:
    """Writes a picture: time above memory, a column for each axis."""
    figure = Figure(figsize=(1 + 3.6 * len(growth.axes), 6.5), layout="constrained")
    panels = figure.subplots(2, len(growth.axes), squeeze=False)
    for (above, below), axis in zip(panels.T, growth.axes, strict=True):
        rows = growth.of(axis)
        above.set_yscale("log")  # before anything is drawn: it may be nothing
        draw(above, rows, [[shown(row.seconds(engine), 1) for row in rows] for engine in (SUBJECT, REFERENCE)])
        draw(below, rows, [[shown(row.peak_bytes(engine), 1e-6) for row in rows] for engine in (SUBJECT, REFERENCE)])
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("")
        below.set_ylim(bottom=0)
        above.set_title(f"{TITLES[axis]}: {'s' if axis == 'minutes' else 's per window'}")
        below.set_title("peak memory, MB")
        below.set_xlabel(HEADINGS[axis])
    panels[0][0].legend()
    figure.savefig(path, format="png", dpi=120)


def draw(axes: Axes, rows: Sequence[Row], lines: Sequence[Sequence[float]]) -> None:
    values = [row.value for row in rows]
    numeric = [value for value in values if isinstance(value, int)]
    positions = numeric or list(range(len(values)))
    for engine, line in zip((SUBJECT, REFERENCE), lines, strict=True):
        axes.plot(positions, line, marker="o", label=engine)
    if numeric:
        axes.set_xscale("log")
    axes.set_xticks(positions, [str(value) for value in values])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
