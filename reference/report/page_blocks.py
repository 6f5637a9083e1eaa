"""The page's sections on blocks by themselves: ratios, maps of errors, and the list of all comparisons."""

import math
from collections.abc import Sequence

from ..judge import Explanation, Judgement, K, dtype_name
from ..results import Run
from .attempts import Attempts
from .figures import BlockFigures, block_figures, dtypes_of, fixed, scientific, worst_first
from .markup import Html, element, folded, html, mark, none_of, table_of

MAPS = 6
"""How many maps of errors are shown."""
LISTED = 500
"""How many comparisons are listed; the worst, all others are in report.json."""


# ---- blocks --------------------------------------------------------------------------------------------------------


def block_section(run: Run, attempts: Attempts) -> Html:
    figures, dtypes = block_figures(run), dtypes_of(run)
    if not figures:
        return none_of("comparisons of blocks on their own")
    dtypes = [dtype for dtype in dtypes if any(dtype in of for of in figures.values())]
    explained = element(
        "p",
        "Error against PyTorch Whisper in float64, relative L2: a ratio below 1 says that MAX is the more accurate of "
        f"the two. Used is the largest share of its budget, {K:g} times PyTorch's error or the one to expect, "
        "that any measure took; above 1 the block fails. Over all sizes, layers and inputs.",
    )
    ratios = attempts.chart(lambda charts: charts.ratios(figures, dtypes))
    chart = element("div", ratios, class_="scroll chart", tabindex=0)
    columns = ("median", "largest", "used")
    above = element("tr", element("th", ""), *(element("th", dtype, colspan=3, class_="group") for dtype in dtypes))
    header_row = element(
        "tr", element("th", "block"), *(element("th", c, class_="number") for _ in dtypes for c in columns)
    )
    rows = [
        element("tr", element("th", element("code", block), scope="row"), *block_cells(of, dtypes))
        for block, of in figures.items()
    ]
    whole = element("table", element("thead", above, header_row), element("tbody", *rows))
    return html(explained, chart, element("div", whole, class_="scroll", tabindex=0))


def block_cells(of: dict[str, BlockFigures], dtypes: Sequence[str]) -> list[Html]:
    cells = []
    for dtype in dtypes:
        if dtype not in of:
            cells.append(element("td", "", colspan=3))
            continue
        each = of[dtype]
        cells += [ratio_cell(each.median), ratio_cell(each.worst), used_cell(each.used)]
    return cells


def ratio_cell(value: float) -> Html:
    """Returns a cell that is tinted by how far from 1 the ratio is, fully at 8 or 1/8."""
    tint = min(1.0, abs(math.log2(value)) / 3) if 0 < value < math.inf else 1.0
    side = "nearer" if value < 1 else "farther"
    return element("td", fixed(value), class_=f"number tint {side}", style=f"--tint:{tint:.2f}")


def used_cell(value: float) -> Html:
    """Returns a bar as long as the share; the whole cell where it is over budget."""
    length = min(1.0, value) if value >= 0 else 1.0
    failed = "" if value <= 1 else " over"
    return element("td", fixed(value), class_=f"number bar{failed}", style=f"--share:{length:.2f}")


# ---- maps of errors ------------------------------------------------------------------------------------------------


def map_section(run: Run, attempts: Attempts) -> Html:
    found = worst_maps(run.judgements)
    if not found:
        return element("p", "Maps are made of comparisons that fail; this run has none.", class_="quiet")
    explained = element(
        "p",
        "Absolute error of MAX over the RMS of the oracle, the largest of each cell; red where it is not finite. "
        "One comparison of each block and dtype, the worst.",
    )
    maps = [map_figure(*each, f"map-{n}", attempts) for n, each in enumerate(found[:MAPS])]
    return html(explained, element("div", *maps, class_="maps"))


def worst_maps(judgements: Sequence[Judgement]) -> list[tuple[Judgement, Explanation]]:
    """Returns of each block and dtype the worst comparison that was explained, and its worst output."""
    found: dict[tuple[str, str], tuple[Judgement, Explanation]] = {}
    for judgement in worst_first([judgement for judgement in judgements if judgement.explanations]):
        explanation = max(judgement.explanations, key=lambda e: float(e.errors.nan_to_num(math.inf).max()))
        found.setdefault((judgement.comparison.block, dtype_name(judgement.comparison.dtype)), (judgement, explanation))
    return list(found.values())


def map_figure(judgement: Judgement, explanation: Explanation, name: str, attempts: Attempts) -> Html:
    e = explanation
    shape = next((output.shape for output in judgement.outputs if output.index == e.output), None)
    chart = attempts.chart(lambda charts: charts.error_map(name, e.errors, shape))
    values = f"MAX {e.subject:.6g}, PyTorch {e.peer:.6g}, float64 {e.oracle:.6g}"
    return element(
        "figure",
        element("figcaption", judgement.comparison),
        chart,
        element("p", f"Output {e.output}, worst at {list(e.worst)}: {values}", class_="quiet"),
        *(element("p", f"Looks like: {diagnosis}", class_="quiet") for diagnosis in e.diagnoses[:2]),
    )


# ---- all comparisons -------------------------------------------------------------------------------------------------


def comparison_section(run: Run) -> Html:
    if not run.judgements:
        return none_of("comparisons of blocks on their own")
    ordered = worst_first(run.judgements)
    listed = table_of([comparison_row(judgement) for judgement in ordered[:LISTED]], "comparisons")
    left = len(ordered) - LISTED
    more = element("p", f"{left} more, all nearer to right than these, are in report.json.", class_="quiet")
    title = f"{len(ordered)} comparisons, the worst first (errors: relative L2)"
    return folded(title, listed, more if left > 0 else "")


def comparison_row(judgement: Judgement) -> dict[str, object]:
    c, l2 = judgement.comparison, judgement.relative_l2 if judgement.pairs else None
    return {
        "block": element("code", c.block),
        "layer": c.layer,
        "size": c.size,
        "dtype": dtype_name(c.dtype),
        "inputs": c.inputs if not c.seed else f"{c.inputs}, seed {c.seed}",
        "MAX": scientific(l2.subject) if l2 else "",
        "PyTorch": scientific(l2.peer) if l2 else "",
        "ratio": fixed(judgement.ratio),
        "used": used_cell(judgement.used),
        "nearest measure": judgement.worst.name if judgement.pairs else "not comparable",
        "verdict": mark(judgement.passed),
    }
