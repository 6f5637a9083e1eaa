"""The figures of a run that page and summary show: who failed, which block is worst, what the faults came to."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from maxwhisper.network.blocks import BLOCKS

from ..activations import is_step
from ..chain import STEP, Chain
from ..faults import FaultResult, outcome
from ..judge import Comparison, Judgement, dtype_name, severity
from ..measures import DTYPES
from ..results import Run

# ---- numbers -------------------------------------------------------------------------------------------------------


def scientific(x: float) -> str:
    """Formats an error: three digits, and 0 where there is none."""
    if not math.isfinite(x):
        return not_finite(x)
    return "0" if x == 0 else f"{x:.2e}"


def fixed(x: float) -> str:
    """Formats a ratio or a share."""
    if not math.isfinite(x):
        return not_finite(x)
    return f"{x:.2f}" if abs(x) < 100 else f"{x:.1e}"


def not_finite(x: float) -> str:
    return "NaN" if math.isnan(x) else "∞" if x > 0 else "−∞"


def share(part: int, whole: int, what: str) -> str:
    return f"{part} of {whole} {what}"


# ---- the conclusion ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conclusion:
    """Whether a run passed, and why in one line."""

    passed: bool
    reason: str

    @property
    def word(self) -> str:
        return "PASSED" if self.passed else "FAILED"


def conclusion(run: Run) -> Conclusion:
    """Concludes from the failures of the comparisons and of pytest: a test that compares nothing can fail too."""
    if not run.compared:
        return Conclusion(False, "; ".join(["nothing was compared", *run.lost]))
    if failed := list(what_failed(run)):
        return Conclusion(False, "; ".join(failed))
    held = "; ".join(what_held(run))
    if run.exit_status:
        return Conclusion(
            False, f"pytest ended with status {run.exit_status}: something beside the comparisons failed ({held})"
        )
    return Conclusion(True, held)


def what_failed(run: Run) -> Iterator[str]:
    if failed := [judgement for judgement in run.judgements if not judgement.passed]:
        worst = f"worst {worst_first(failed)[0].comparison}"
        yield f"{share(len(failed), len(run.judgements), 'comparisons')} failed, {worst}"
    if diverging := [chain for chain in run.chains if not chain.passed]:
        yield f"{share(len(diverging), len(run.chains), 'chains')} diverged, the first at {divergence(diverging[0])}"
    if missed := sum(not fault.accepted for fault in run.faults):
        yield f"{share(missed, len(run.faults), 'faults')} not caught in the right block"
    if different := sum(not transcript.equal for transcript in run.transcripts):
        yield f"{share(different, len(run.transcripts), 'transcripts')} differ from PyTorch Whisper's"
    yield from run.lost


def what_held(run: Run) -> Iterator[str]:
    if run.judgements:
        yield f"{len(run.judgements)} comparisons within budget"
    if run.chains:
        yield f"{len(run.chains)} chains without divergence"
    if run.faults:
        below = sum(not fault.caught for fault in run.faults)
        rest = f", {below} below the budget" if below else ""
        yield f"{share(len(run.faults) - below, len(run.faults), 'faults')} caught in the right block{rest}"
    if run.transcripts:
        yield f"{len(run.transcripts)} transcripts equal to PyTorch Whisper's"
    if run.held:
        yield f"{len(run.held)} tests passed that leave no verdict"


def divergence(chain: Chain) -> str:
    return chain.first_divergence or ("nothing: no submodule was judged" if not chain.judgements else "none")


# ---- comparisons ---------------------------------------------------------------------------------------------------


def worst_first(judgements: Sequence[Judgement]) -> list[Judgement]:
    return sorted(judgements, key=lambda judgement: (judgement.passed, -judgement.used))


@dataclass(frozen=True)
class BlockFigures:
    """All comparisons of a block in one dtype, over layers, sizes and inputs: ratios MAX/PyTorch of relative L2, and
    the share of its budget that the nearest measure used."""

    n: int
    failed: int
    best: float
    median: float
    worst: float
    used: float


def block_figures(run: Run) -> dict[str, dict[str, BlockFigures]]:
    """Returns figures by block and dtype; the block first that is nearest to a budget or exceeds it most."""
    grouped: dict[str, dict[str, list[Judgement]]] = {}
    for judgement in run.judgements:
        of = grouped.setdefault(judgement.comparison.block, {})
        of.setdefault(dtype_name(judgement.comparison.dtype), []).append(judgement)
    figures = {block: {d: figures_of(found) for d, found in of.items()} for block, of in grouped.items()}
    return dict(sorted(figures.items(), key=lambda item: -max(each.used for each in item[1].values())))


def figures_of(judgements: Sequence[Judgement]) -> BlockFigures:
    ratios = sorted((judgement.ratio for judgement in judgements), key=severity)
    return BlockFigures(
        n=len(judgements),
        failed=sum(not judgement.passed for judgement in judgements),
        best=ratios[0],
        median=median(map(severity, ratios)),
        worst=ratios[-1],
        used=max(judgement.used for judgement in judgements),
    )


def dtypes_of(run: Run) -> list[str]:
    """Returns the dtypes that were compared or in which faults were tried, the most precise first."""
    order = list(DTYPES)
    found = [judgement.comparison.dtype for judgement in run.judgements] + [fault.dtype for fault in run.faults]
    return sorted({dtype_name(dtype) for dtype in found}, key=lambda name: order.index(name) if name in order else 9)


# ---- chains --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A submodule in the chain: its name, its error and PyTorch's, and its budget."""

    position: int
    name: str
    subject: float
    peer: float
    budget: float
    passed: bool


def chained_points(chain: Chain) -> list[Point]:
    """Returns the relative L2 of every submodule that could be compared, in the order of computing."""
    found = ((i, name, j, j.relative_l2) for i, (name, j) in enumerate(chain.judgements.items()) if j.pairs)
    return [Point(i, name, m.subject, m.peer, m.budget, j.passed) for i, name, j, m in found]


def isolated_points(run: Run, chain: Chain) -> list[Point]:
    """Returns the relative L2 of blocks that stand at a submodule of the chain, on its inputs, size and dtype."""
    points = []
    positions = {name: (i, j.comparison.dtype) for i, (name, j) in enumerate(chain.judgements.items())}
    for judgement in run.judgements:
        c = judgement.comparison
        position, dtype = positions.get(chain_name(c), (None, None))
        kind = c.inputs.partition(".")[0]  # without a decoder's position in the text
        same = c.size == chain.comparison.size and c.dtype == dtype and kind == chain.comparison.inputs
        if same and position is not None and judgement.pairs:
            measure = judgement.relative_l2
            name = f"{c.block}, layer {c.layer}, {c.inputs}"
            points.append(Point(position, name, measure.subject, measure.peer, measure.budget, judgement.passed))
    return sorted(points, key=lambda point: point.position)


def chain_name(comparison: Comparison) -> str:
    """Returns the name in a chain of what a block computes: the block's own for a part that is no submodule, otherwise
    its path in the PyTorch model."""
    if comparison.block not in BLOCKS:
        return comparison.block
    block = BLOCKS[comparison.block]
    if block.name in ("encoder.stem", "decoder.embedding"):
        return block.name
    path = block.path.format(audio_layer=comparison.layer, text_layer=comparison.layer)
    return STEP + path if is_step(block) else path


def worst_chains_first(chains: Sequence[Chain]) -> list[Chain]:
    def used(chain: Chain) -> float:
        return max((judgement.used for judgement in chain.judgements.values()), default=math.inf)

    return sorted(chains, key=lambda chain: (chain.passed, -used(chain)))


# ---- faults --------------------------------------------------------------------------------------------------------


def largest_effect(fault: FaultResult) -> tuple[str, float, float] | None:
    """Returns the inputs on which the fault stands out most from PyTorch's rounding, its effect and that rounding."""
    kinds = [name for name in fault.rounding if name in fault.effect]
    if not kinds:
        return None
    most = max(kinds, key=lambda name: severity(fault.effect[name] / (fault.rounding[name] or 1e-300)))
    return most, fault.effect[most], fault.rounding[most]


# ---- failures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A failure: one line, and all that is known."""

    title: str
    text: str


def failures(run: Run) -> list[Failure]:
    """Returns comparisons that failed, the worst first; then chains, faults and transcripts."""
    found = [Failure(str(j.comparison), str(j)) for j in worst_first(run.judgements) if not j.passed]
    found += [
        Failure(f"{chain.comparison}: first divergence {divergence(chain)}", str(chain))
        for chain in run.chains
        if not chain.passed
    ]
    found += [
        Failure(f"fault {outcome(fault)}: {fault.fault.name}, {dtype_name(fault.dtype)}", str(fault))
        for fault in run.faults
        if not fault.accepted
    ]
    found += [
        Failure(
            f"transcript of {t.clip}, {t.decoding}",
            f"{t.clip}, {t.decoding}: {t.n_compared} compared\n{t.difference or 'differs'}",
        )
        for t in run.transcripts
        if not t.equal
    ]
    return found
