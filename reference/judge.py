"""Is MAX as accurate as PyTorch in the same dtype? Measures, budget and verdict.

Three computations of one block from the same inputs and weights: the *oracle*, PyTorch Whisper in float64; the *peer*,
PyTorch Whisper in the dtype under test; the *subject*, MAX in that dtype. The peer's own error is the yardstick:

    error(subject) <= K * error(peer) + floor

K is one number for the whole project. Two right implementations sum in different orders and approximate exp and erf by
different polynomials, so their errors differ by a small factor in either direction; a wrong one is off by orders of
magnitude. The factor allowed is that between the two usual ways to sum n numbers: pairwise, whose error grows with
log2(n), and blocked into as many running sums as a vector register has lanes, which for the reductions of this network
(n from 64 to 5120) stays within four times of it.

The floor is for blocks in which the peer happens to be exact or nearly so: the unit roundoff u of the dtype times the
square root of the length of the block's longest reduction, which is how rounding errors of either sign add up
(N. Higham, T. Mary, "A new approach to probabilistic rounding error analysis", 2019).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

K = 4.0
UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16, torch.float32)}


@dataclass(frozen=True)
class Measure:
    """One way to measure error, for peer and subject, and the budget it leaves the subject."""

    name: str
    subject: float
    peer: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.subject <= self.budget  # not for a NaN

    @property
    def ratio(self) -> float:
        """subject / peer: below 1, MAX is more accurate than PyTorch. 1 when neither errs."""
        if self.peer == 0:
            return 1.0 if self.subject == 0 else math.inf
        return self.subject / self.peer


@dataclass(frozen=True)
class Judgement:
    """The verdict on one block, in one layer, on one set of inputs."""

    block: str
    size: str
    layer: int
    dtype: torch.dtype
    inputs: str
    measures: tuple[Measure, ...]
    defects: tuple[str, ...]
    pairs: int

    @property
    def passed(self) -> bool:
        return self.pairs > 0 and not self.defects and all(measure.passed for measure in self.measures)

    @property
    def worst(self) -> Measure:
        """The measure that comes nearest to its budget, or exceeds it most."""
        return max(self.measures, key=lambda measure: measure.subject / measure.budget)

    def __str__(self) -> str:
        lines = [f"{self.block}, layer {self.layer}, {self.size}, {self.dtype}, inputs: {self.inputs}"]
        lines += [f"  {defect}" for defect in self.defects]
        if not self.pairs:
            lines.append("  nothing was compared")
        for m in self.measures:
            verdict = "ok" if m.passed else "FAILED"
            figures = f"MAX {m.subject:.3e}  PyTorch {m.peer:.3e}  budget {m.budget:.3e}"
            lines.append(f"  {m.name:32} {figures}  {verdict}")
        return "\n".join(lines)


def relative_l2(error: Tensor, oracle: Tensor) -> float:
    """Norm of the error over norm of the oracle; of the error alone where the oracle is zero."""
    return float(error.norm() / norm_or_one(oracle.norm()))


def worst_position(error: Tensor, oracle: Tensor) -> float:
    """The largest relative L2 over any one position, a position being a row of the last axis."""
    rows = oracle.reshape(-1, oracle.shape[-1]).norm(dim=1)
    return float((error.reshape(-1, error.shape[-1]).norm(dim=1) / norm_or_one(rows)).max())


def largest_absolute(error: Tensor, oracle: Tensor) -> float:
    """The largest absolute error over the root mean square of the oracle."""
    return float(error.abs().max() / norm_or_one(oracle.square().mean().sqrt()))


def norm_or_one(norm: Tensor) -> Tensor:
    return torch.where(norm == 0, torch.ones_like(norm), norm)


MEASURES = {
    "relative L2": relative_l2,
    "worst position": worst_position,
    "largest error / RMS": largest_absolute,
}


def judge(
    oracle: list[Tensor],
    peer: list[Tensor],
    subject: list[Tensor],
    *,
    block: str,
    size: str,
    layer: int,
    dtype: torch.dtype,
    inputs: str,
    longest_reduction: int,
) -> Judgement:
    """Compares all outputs of a block, subject and peer each with the oracle.

    longest_reduction: the most terms that any one value inside the block is summed from.
    """
    defects: list[str] = []
    measures: list[Measure] = []
    if not len(oracle) == len(peer) == len(subject):
        defects.append(f"number of outputs: oracle {len(oracle)}, peer {len(peer)}, subject {len(subject)}")
    floor = UNIT_ROUNDOFF[dtype] * math.sqrt(longest_reduction)
    for index, (right, theirs, ours) in enumerate(zip(oracle, peer, subject, strict=False)):
        found = output_defects(right, theirs, ours)
        defects += [f"output {index}: {defect}" for defect in found]
        if not found:
            measures += measure_output(index, right, theirs.double(), ours.double(), floor)
    return Judgement(block, size, layer, dtype, inputs, tuple(measures), tuple(defects), len(measures))


def output_defects(oracle: Tensor, peer: Tensor, subject: Tensor) -> list[str]:
    """What makes a comparison of values meaningless."""
    if oracle.dtype != torch.float64:
        return [f"the oracle is {oracle.dtype}, not torch.float64"]
    if not oracle.shape == peer.shape == subject.shape:
        return [f"shape: oracle {list(oracle.shape)}, peer {list(peer.shape)}, subject {list(subject.shape)}"]
    if subject.dtype != peer.dtype:
        return [f"dtype: peer {peer.dtype}, subject {subject.dtype}"]
    if oracle.numel() == 0:
        return ["empty"]
    return [
        f"{name} has {int((~value.isfinite()).sum())} values that are not finite"
        for name, value in (("oracle", oracle), ("peer", peer), ("subject", subject))
        if not value.isfinite().all()
    ]


def measure_output(index: int, oracle: Tensor, peer: Tensor, subject: Tensor, floor: float) -> list[Measure]:
    # A rounding error is relative to its own value, so the largest one to expect is either that of the largest value or
    # the maximum of as many normal errors as there are values, whichever is more.
    rms = norm_or_one(oracle.square().mean().sqrt())
    spread = max(float(oracle.abs().max() / rms), math.sqrt(2 * math.log(max(oracle.numel(), 2))))
    measures = []
    for name, measure in MEASURES.items():
        least = floor * (spread if measure is largest_absolute else 1)
        theirs, ours = measure(peer - oracle, oracle), measure(subject - oracle, oracle)
        measures.append(Measure(f"output {index}, {name}", ours, theirs, K * theirs + least))
    return measures
