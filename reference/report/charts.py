"""Charts as SVG to stand inside the page, in whose colours they are drawn, light or dark.

matplotlib draws in the stand-in colours below; `inline` replaces each by the page's CSS variable. The same run gives
the same bytes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from ..chain import STEP
from .figures import BlockFigures, Point, fixed, scientific
from .markup import Html

INK, GRID, PAPER, MAX, PYTORCH, BAD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
DTYPE_COLOURS = ("#070707", "#080808", "#090909")
VARIABLES = {
    INK: "var(--quiet)",
    GRID: "var(--line)",
    PAPER: "var(--paper)",
    MAX: "var(--max)",
    PYTORCH: "var(--pytorch)",
    BAD: "var(--bad)",
    **{colour: f"var(--dtype-{number})" for number, colour in enumerate(DTYPE_COLOURS)},
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GRID),
    **dict.fromkeys(("svg.fonttype", "axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
}
NOT_FINITE = "#e5484d"
"""In a map of errors, where colours are those of a picture and not of the page."""
XLINK = "{http://www.w3.org/1999/xlink}href"


# ---- from matplotlib to the page -----------------------------------------------------------------------------------


def inline(figure: Figure, name: str, label: str, tips: Mapping[str, Sequence[str]] | None = None) -> Html:
    """Returns the figure as an SVG element.

    name: unlike any other chart's on the page, as clip paths and markers are referred to by ids made from it. label:
    what a screen reader says. tips: by the gid of a line with markers, what to say when the pointer is over each.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for gid, lines in (tips or {}).items():
        add_tips(root, gid, lines)
    adapt(root)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Html(ElementTree.tostring(root, encoding="unicode"))


def add_tips(root: ElementTree.Element, gid: str, tips: Sequence[str]) -> None:
    """Puts a title on every marker; on none where matplotlib drew another number of them."""
    group = next((each for each in root.iter() if each.get("id") == gid), None)
    markers = [] if group is None else [each for each in group.iter() if each.tag.endswith("}use")]
    if len(markers) == len(tips):
        for marker, tip in zip(markers, tips, strict=True):
            ElementTree.SubElement(marker, "title").text = tip


def adapt(root: ElementTree.Element) -> None:
    """Takes away what is for a file of its own: namespaces, metadata, style sheets that would reach the whole page, and
    ids that nothing refers to."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    referred = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    for each in root.iter():
        each.tag = each.tag.rpartition("}")[2]
        if XLINK in each.attrib:
            each.set("href", each.attrib.pop(XLINK))
        if each.get("id") not in referred:
            each.attrib.pop("id", None)
        if "style" in each.attrib:
            each.set("style", re.sub("#0[1-9]0[1-9]0[1-9]", lambda found: VARIABLES[found[0]], each.attrib["style"]))


def escaped(text: str) -> str:
    """Returns text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


# ---- the error along the network -----------------------------------------------------------------------------------


LABELS = 28
"""How many names there is room for along a chart's axis."""
ISOLATED, CHAINED = {"ls": "", "mfc": PAPER, "ms": 4.5}, {"lw": 1.2, "ms": 2.6}
SERIES: dict[str, dict[str, Any]] = {
    "isolated-pytorch": {"label": "PyTorch, isolated", "marker": "s", "mec": PYTORCH, **ISOLATED},
    "isolated-max": {"label": "MAX, isolated", "marker": "o", "mec": MAX, **ISOLATED},
    "chained-pytorch": {"label": "PyTorch, chained", "marker": "s", "color": PYTORCH, **CHAINED},
    "chained-max": {"label": "MAX, chained", "marker": "o", "color": MAX, **CHAINED},
}


def along_the_network(
    name: str, names: Sequence[str], chained: Sequence[Point], isolated: Sequence[Point], first_divergence: str | None
) -> Html:
    """Draws the relative L2 of MAX and PyTorch over the chain's submodules in the order of computing; an error of zero,
    which a log axis has not, at its foot."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(11, 4)
        tips: dict[str, list[str]] = {}
        for gid in SERIES:
            points = isolated if gid.startswith("isolated") else chained
            errors = [point.peer if gid.endswith("pytorch") else point.subject for point in points]
            draw_errors(axes, gid, points, errors, tips)
        positions, budgets = [point.position for point in chained], [point.budget for point in chained]
        style: dict[str, Any] = {"where": "mid", "color": INK, "lw": 0.8, "ls": (0, (2, 2))}
        axes.step(positions, budgets, label="budget of MAX, chained", **style)
        if first_divergence in names:
            label = escaped(f"first divergence: {first_divergence}")
            axes.axvline(names.index(first_divergence), color=BAD, lw=1, label=label)
        network_axis(axes, names)
        axes.set_yscale("log")
        axes.set_ylabel("relative L2 to float64")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8.5, handlelength=1.6, columnspacing=1.4)
        label = f"Error along {len(names)} submodules, MAX and PyTorch, chained and isolated"
        return inline(figure, name, label, tips)


def draw_errors(
    axes: Axes, gid: str, points: Sequence[Point], errors: Sequence[float], tips: dict[str, list[str]]
) -> None:
    """Draws a series, which breaks off where the error is zero or not finite; zeros as marks at the axis' foot."""
    drawable = [0 < error < math.inf for error in errors]
    values = [error if there else math.nan for error, there in zip(errors, drawable, strict=True)]
    axes.plot([point.position for point in points], values, gid=gid, **SERIES[gid])
    tips[gid] = [tip(point) for point, there in zip(points, drawable, strict=True) if there]
    zeros = [point for point, error in zip(points, errors, strict=True) if error == 0]
    style = {**SERIES[gid], "ls": "", "label": None, "clip_on": False, "transform": axes.get_xaxis_transform()}
    axes.plot([point.position for point in zeros], [0] * len(zeros), gid=f"{gid}-zero", **style)
    tips[f"{gid}-zero"] = [tip(point) for point in zeros]


def tip(point: Point) -> str:
    figures = f"MAX {scientific(point.subject)}, PyTorch {scientific(point.peer)}, budget {scientific(point.budget)}"
    return f"{point.name}\n{figures}{'' if point.passed else ', FAILED'}"


def network_axis(axes: Axes, names: Sequence[str]) -> None:
    """Draws a line where a layer or an end of the network begins, and its name if there is room for it."""
    groups = [escaped(part_of(name)) for name in names]
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    named = with_room(starts, len(names))
    axes.set_xticks(starts, [groups[i] if i in named else "" for i in starts], rotation=30, ha="right")
    for label in axes.get_xticklabels():
        label.set_rotation_mode("anchor")
    axes.set_xlim(-0.8, max(len(names) - 0.2, 0.8))
    axes.grid(True)
    axes.set_axisbelow(True)


def with_room(starts: Sequence[int], n: int) -> set[int]:
    """Returns the starts whose names do not run into each other along `n` submodules, the longest parts first."""
    lengths = {start: end - start for start, end in zip(starts, [*starts[1:], n], strict=True)}
    named: set[int] = set()
    for start in sorted(starts, key=lambda start: -lengths[start]):
        if all(abs(start - other) >= n / LABELS for other in named):
            named.add(start)
    return named


def part_of(name: str) -> str:
    """Returns what a submodule stands in: "encoder.blocks.0.attn.query" in "encoder 0"."""
    step = STEP if name.startswith(STEP) else ""
    parts = name.removeprefix(STEP).split(".")
    if len(parts) > 2 and parts[1] == "blocks":
        return f"{step}{parts[0]} {parts[2]}"
    if parts[0] not in ("encoder", "decoder"):
        return name
    at_start = any(word in name for word in ("conv", "stem", "embedding"))
    return f"{step}{parts[0]}, {'in' if at_start else 'out'}"


# ---- the ratio of every block --------------------------------------------------------------------------------------


WIDEST = 32.0
"""The largest ratio on the chart's axis; a larger one ends in an arrow there, and stands in the table."""


def ratios(figures: Mapping[str, Mapping[str, BlockFigures]], dtypes: Sequence[str]) -> Html:
    """Draws a line from the smallest to the largest ratio of each block, one per dtype, with a mark at the median."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(11, 1.1 + 0.3 * len(figures))
        tips = {
            f"ratio-{dtype}": draw_ratios(axes, figures, dtype, number, len(dtypes))
            for number, dtype in enumerate(dtypes)
        }
        axes.axvline(1, color=INK, lw=1)
        axes.set_yticks(range(len(figures)), [escaped(block) for block in figures])
        axes.set_ylim(len(figures) - 0.5, -0.5)
        axes.set_xscale("log", base=2)
        lowest, highest = axes.get_xlim()
        axes.set_xlim(max(min(lowest, 0.5), 1 / WIDEST), min(max(highest, 2), WIDEST))
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=16))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        axes.set_xlabel(
            "error of MAX / error of PyTorch (relative L2, smallest, median, largest); left of 1 MAX is nearer"
        )
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0)
        if any(legend_entries := axes.get_legend_handles_labels()[1]):
            figure.legend(loc="outside upper left", ncols=len(legend_entries), fontsize=8.5)
        return inline(figure, "ratios", "Ratio of MAX's error to PyTorch's for every block and dtype", tips)


def draw_ratios(
    axes: Axes, figures: Mapping[str, Mapping[str, BlockFigures]], dtype: str, number: int, n_dtype: int
) -> list[str]:
    """Draws one dtype's lines, its `number` of `n_dtype` beside each other within a block's row, and returns the tips
    of its marks. What is not finite or zero has no room on the axis and is left to the table."""
    colour, marker = DTYPE_COLOURS[number % 3], "os^"[number % 3]
    shift = (number - (n_dtype - 1) / 2) * 0.22
    of_dtype = [(i, of[dtype]) for i, of in enumerate(figures.values()) if dtype in of]
    rows = [(i, each) for i, each in of_dtype if 0 < each.median < math.inf]
    for i, each in rows:
        ends = [x for x in (each.best, each.median, each.worst) if 0 < x < math.inf]
        axes.plot([min(ends), max(ends)], [i + shift] * 2, color=colour, lw=1.6, alpha=0.55)
        if not each.worst <= WIDEST:
            axes.plot(WIDEST, i + shift, ">", color=colour, ms=5, clip_on=False)
    medians = [each.median for _, each in rows]
    axes.plot(medians, [i + shift for i, _ in rows], marker, color=colour, ms=4.5, gid=f"ratio-{dtype}", label=dtype)
    names = list(figures)
    return [
        f"{names[i]}, {dtype}, {e.n} comparisons\nratio {fixed(e.best)} to {fixed(e.worst)}, median {fixed(e.median)}"
        for i, e in rows
    ]


# ---- where in an output the errors are -----------------------------------------------------------------------------


def error_map(name: str, errors: torch.Tensor, shape: tuple[int, ...] | None) -> Html:
    """Draws a map of errors (row, column) over the RMS of the oracle, of an output of the shape (..., channel). None
    where the shape is not known: the axes then count the map's own cells."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(5.4, 3.1)
        found = errors[errors.isfinite() & (errors > 0)]
        highest = float(found.max()) if found.numel() else 1.0
        lowest = max(float(found.min()) if found.numel() else 0.1, highest * 1e-6)
        lowest = lowest if lowest < highest else highest / 10
        colours = matplotlib.colormaps["viridis"].with_extremes(bad=NOT_FINITE, under="#440154")
        n_position, n_channel = (math.prod(shape[:-1]), shape[-1]) if shape else errors.shape
        extent = (-0.5, n_channel - 0.5, n_position - 0.5, -0.5)
        norm = LogNorm(lowest, highest)
        # Zeros are not to be taken for values that are missing.
        shown = errors.double().masked_fill(errors == 0, lowest / 2).numpy()
        axes.imshow(shown, norm=norm, cmap=colours, extent=extent, aspect="auto", interpolation="none")
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)  # one picture for 256 rectangles
        bar.outline.set_visible(False)
        axes.set_xlabel("channel" if shape else "channel, in cells")
        axes.set_ylabel("position" if shape else "position, in cells")
        return inline(figure, name, "Map of errors over position and channel")
