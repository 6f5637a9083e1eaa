"""summary.md: what a CI job shows of a run, in fewer than LINES lines."""

import re
from collections.abc import Mapping, Sequence
from html import escape

from ..faults import fault_totals
from ..results import Run
from .figures import BlockFigures, block_figures, conclusion, divergence, dtypes_of, failures, fixed, share

LINES = 60
FAILURES, DIVERGENCES = 10, 4
SHOWN_IN_HEADING = ("processor", "GPU", "max", "torch")


def summary(run: Run, machine: dict[str, str]) -> str:
    found = conclusion(run)
    lines = [f"## Parity: {found.word.lower()}", "", f"**{found.word}**: {escaped(found.reason)}.", ""]
    lines += [f"- {escaped(line)}" for line in total_lines(run, machine)]
    lines += failure_lines(run)
    room = LINES - 1 - len(lines)
    return "\n".join(lines + block_table(block_figures(run), dtypes_of(run), room)) + "\n"


def escaped(text: str) -> str:
    """Returns one line in which nothing is Markdown or HTML."""
    return re.sub(r"[\\`*_\[\]|]", r"\\\g<0>", escape(" ".join(text.split()), quote=False))


def total_lines(run: Run, machine: dict[str, str]) -> list[str]:
    graphs = f"{run.graphs_compiled} graphs in {len(run.compiled)} artifacts"
    compiled = f"{graphs} compiled in {run.compile_seconds:.1f} s"
    lines = [
        f"{run.pairs:,} pairs compared in {run.compare_seconds:.1f} s{run.recalled_note}; {compiled}",
        ", ".join(f"{name} {machine[name]}" for name in SHOWN_IN_HEADING if name in machine),
    ]
    for dtype, t in fault_totals(run.faults).items():
        lines.append(
            f"faults, {dtype}: {share(t.caught, t.n, 'caught')}, {t.right_block} in the right block; {t.below} below "
            f"PyTorch's rounding, {t.between} between that and the budget; {t.missed} missed"
        )
    if run.transcripts:
        equal = sum(transcript.equal for transcript in run.transcripts)
        lines.append(f"transcripts, float32: {share(equal, len(run.transcripts), 'equal')}")
    return lines + chain_lines(run)


def chain_lines(run: Run) -> list[str]:
    if not run.chains:
        return []
    diverging = [chain for chain in run.chains if not chain.passed]
    lines = [f"chains: {share(len(run.chains) - len(diverging), len(run.chains), 'without divergence')}"]
    lines += [f"first divergence {divergence(chain)}: {chain.comparison}" for chain in diverging[:DIVERGENCES]]
    left = len(diverging) - DIVERGENCES
    return lines + ([f"{left} more chains diverge"] if left > 0 else [])


def failure_lines(run: Run) -> list[str]:
    found = failures(run)
    if not found:
        return []
    lines = [f"{number}. {escaped(failure.title)}" for number, failure in enumerate(found[:FAILURES], 1)]
    more = ["", f"{len(found) - FAILURES} more in report.html."] if len(found) > FAILURES else []
    return ["", "### Failures", "", *lines, *more]


def block_table(figures: Mapping[str, Mapping[str, BlockFigures]], dtypes: Sequence[str], room: int) -> list[str]:
    """Returns a table of the worst blocks, as many as there is room for."""
    if not figures:
        return []
    lines = ["", "Largest error of MAX / error of PyTorch, and the share of its budget used at most:", ""]
    lines += [row("block", dtypes), row("---", ["---:"] * len(dtypes))]
    rows = [row(escaped(block), [cell(of.get(dtype)) for dtype in dtypes]) for block, of in figures.items()]
    room -= len(lines)
    if len(rows) > room:
        rows = [*rows[: room - 2], "", f"{len(rows) - room + 2} more blocks, all farther from their budgets."]
    return lines + rows


def row(first: str, rest: Sequence[str]) -> str:
    return f"| {' | '.join([first, *rest])} |"


def cell(figures: BlockFigures | None) -> str:
    if figures is None:
        return ""
    failed = f" **{figures.failed} failed**" if figures.failed else ""
    return f"{fixed(figures.worst)}, {fixed(figures.used)}{failed}"
