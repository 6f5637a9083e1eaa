"""Is MAX as accurate as PyTorch in the same dtype? Measures, budget and verdict.

Three computations of one block from the same inputs and weights: the *oracle*, PyTorch Whisper in float64; the *peer*,
PyTorch Whisper in the dtype under test; the *subject*, MAX in that dtype. The peer's own error is the yardstick:

    error(subject) <= K * error(peer) + floor

K is one number for the whole project. Two right implementations sum in different orders and approximate exp and erf by
different polynomials, so their errors differ by a small factor in either direction; a wrong one is off by orders of
magnitude. The factor allowed is that between the two usual ways to sum n numbers: pairwise, whose error grows with
log2(n), and blocked into as many running sums as a vector register has lanes, which for the reductions of this network
(n from 64 to 5120) stays within four times of it. What the choice is worth shows in a report: how far right models
stay below the budget, and how far wrong ones exceed it.

The floor is for inputs on which the peer happens to be exact or nearly so. Rounding errors of either sign add up with
the root of their number (N. Higham, T. Mary, "A new approach to probabilistic rounding error analysis", 2019): those of
the m values in a row that a block rounds to the dtype, u * sqrt(m), and those of a running sum in float32 as long as
the block's longest reduction, u32 * sqrt(length). Both implementations accumulate in float32 whatever the dtype. A
measure that is the maximum over n positions, channels or values has n chances of a large error, so its floor is larger
by what the maximum of n normal numbers is to be expected. Where a measure is the mean over n positions, the errors of
rounded values cancel out but for one part in the root of n. Those of running sums need not.

What is rounded inside a block reaches its output amplified by the block's *condition* on its inputs: how many times
larger the oracle's answer to one rounding of the inputs is than that rounding. It is about 1 nearly everywhere, and
large where softmax has to decide between keys whose scores are large and nearly equal; there one PyTorch result, which
may be right by luck, says little of what the dtype can give. It costs further runs of the oracle, so it is found where
a comparison would fail without, and then multiplies the floor.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .causes import Cause, likely_causes

K = 4.0
UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.float16, torch.bfloat16)}
DRAWS = 4
"""How many roundings of the inputs a condition is found from."""
POSITIONS_AT_A_TIME = 4
"""Of which KL divergences are computed."""
MAP_SHAPE = (48, 96)
"""Most rows and columns of a map of errors."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def severity(x: float) -> float:
    """To sort by: a NaN is as bad as it gets."""
    return math.inf if math.isnan(x) else x


@dataclass(frozen=True)
class Comparison:
    """What is compared: a block of a model, in one layer and dtype, on one device, on one set of inputs.

    inputs: a kind of `reference.activations.KINDS`; for a decoder's step followed by ".first" or ".late", its place in
    the text.
    """

    size: str
    dtype: torch.dtype
    block: str
    layer: int
    inputs: str
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        model = f"{self.size}, {dtype_name(self.dtype)}, {self.device}"
        return f"{self.block}, layer {self.layer}, {model}, {self.inputs}, seed {self.seed}"


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

    @property
    def used(self) -> float:
        """Share of the budget that the subject uses; above 1 it fails."""
        if self.budget == 0:
            return 0.0 if self.subject == 0 else math.inf
        return self.subject / self.budget


@dataclass(frozen=True)
class Output:
    """The verdict on one output of a block."""

    index: int
    shape: tuple[int, ...]
    measures: tuple[Measure, ...]

    def __getitem__(self, name: str) -> Measure:
        return next(measure for measure in self.measures if measure.name == name)


@dataclass(frozen=True)
class Explanation:
    """Where and how an output is wrong.

    worst: index of the largest error, and there the values of oracle, peer and subject.
    errors: absolute errors of the subject over the oracle's RMS, (position, channel), the largest of each cell where
    there are more than MAP_SHAPE.
    causes: the mistakes that explain the errors, the best explanation first.
    """

    output: int
    worst: tuple[int, ...]
    oracle: float
    peer: float
    subject: float
    errors: Tensor = field(repr=False, compare=False)
    causes: tuple[Cause, ...]

    def __str__(self) -> str:
        values = f"MAX {self.subject:.9g}, PyTorch {self.peer:.9g}, float64 {self.oracle:.9g}"
        lines = [f"  output {self.output}, worst at {list(self.worst)}: {values}"]
        return "\n".join(lines + [f"  looks like: {cause}" for cause in self.causes])


@dataclass(frozen=True)
class Judgement:
    """The verdict on one comparison.

    defects: what made a comparison of values impossible. condition: by which the floor was multiplied. explanations: of
    the outputs, where somebody asked.
    """

    comparison: Comparison
    outputs: tuple[Output, ...]
    defects: tuple[str, ...]
    condition: float = 1.0
    explanations: tuple[Explanation, ...] = ()
    recalled: bool = False

    @property
    def measures(self) -> list[tuple[Output, Measure]]:
        return [(output, measure) for output in self.outputs for measure in output.measures]

    @property
    def pairs(self) -> int:
        """How many pairs of measures were compared."""
        return len(self.measures)

    @property
    def passed(self) -> bool:
        return self.pairs > 0 and not self.defects and all(measure.passed for _, measure in self.measures)

    @property
    def worst(self) -> Measure:
        """The measure that comes nearest to its budget, or exceeds it most."""
        return max((measure for _, measure in self.measures), key=lambda measure: severity(measure.used))

    @property
    def relative_l2(self) -> Measure:
        """The relative L2 of the output that comes nearest to its budget in it."""
        return max((output["relative L2"] for output in self.outputs), key=lambda measure: severity(measure.used))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        yield str(self.comparison)
        yield from (f"  {defect}" for defect in self.defects)
        if not self.pairs:
            yield "  nothing was compared"
        if self.condition > 1:
            yield f"  one rounding of the inputs changes the oracle {self.condition:.3g} times as much"
        for output in self.outputs:
            yield f"  output {output.index} {list(output.shape)}"
            for m in output.measures:
                verdict = "ok" if m.passed else "FAILED"
                yield f"    {m.name:22} MAX {m.subject:.3e}  PyTorch {m.peer:.3e}  budget {m.budget:.3e}  {verdict}"
        yield from map(str, self.explanations)


@dataclass(frozen=True)
class Norms:
    """Squared norms of a tensor's positions (rows of its last axis) and channels, the channels' means, and its largest
    absolute value."""

    positions: Tensor
    channels: Tensor
    means: Tensor
    largest: float

    @property
    def norm(self) -> float:
        return float(self.positions.sum().sqrt())

    @property
    def rms(self) -> float:
        return math.sqrt(float(self.positions.mean()) / len(self.channels))


def judge(
    comparison: Comparison,
    oracle: list[Tensor],
    peer: list[Tensor],
    subject: list[Tensor],
    *,
    longest_reduction: int,
    roundings: int = 1,
    n_vocab: int | None = None,
    condition: float = 1.0,
) -> Judgement:
    """Compares all outputs of a block, subject and peer each with the oracle.

    longest_reduction: the most terms that any one value inside the block is summed from.
    roundings: how many values in a row the block rounds to the dtype, each made from the one before.
    n_vocab: length of the last axis of an output that holds logits, which are then measured as probabilities too.
    condition: of the block on these inputs, where it was found.
    """
    defects: list[str] = []
    outputs: list[Output] = []
    if not len(oracle) == len(peer) == len(subject):
        defects.append(f"number of outputs: oracle {len(oracle)}, peer {len(peer)}, subject {len(subject)}")
    u, u32 = UNIT_ROUNDOFF[comparison.dtype], UNIT_ROUNDOFF[torch.float32]
    values, sums = condition * u * math.sqrt(roundings), condition * u32 * math.sqrt(longest_reduction)
    for index, (right, theirs, ours) in enumerate(zip(oracle, peer, subject, strict=False)):
        found = output_defects(right, theirs, ours)
        if not found:
            theirs, ours = theirs.double(), ours.double()
            size, peer_error, subject_error = norms(right), norms(theirs - right), norms(ours - right)
            found = not_finite(oracle=size, peer=peer_error, subject=subject_error)
        if found:
            defects += [f"output {index}: {defect}" for defect in found]
            continue
        measures = measure_values(size, peer_error, subject_error, values, sums)
        if right.shape[-1] == n_vocab:
            measures += measure_logits(right, theirs, ours, size, peer_error, values + sums)
        outputs.append(Output(index, tuple(right.shape), tuple(measures)))
    return Judgement(comparison, tuple(outputs), tuple(defects), condition)


def output_defects(oracle: Tensor, peer: Tensor, subject: Tensor) -> list[str]:
    """What makes a comparison of values meaningless."""
    if oracle.dtype != torch.float64:
        return [f"the oracle is {oracle.dtype}, not torch.float64"]
    if not oracle.shape == peer.shape == subject.shape:
        return [f"shape: oracle {list(oracle.shape)}, peer {list(peer.shape)}, subject {list(subject.shape)}"]
    if subject.dtype != peer.dtype:
        return [f"dtype: peer {peer.dtype}, subject {subject.dtype}"]
    return [] if oracle.numel() else ["empty"]


def not_finite(**found: Norms) -> list[str]:
    """Where there is a NaN or an infinity, the squares of its position do not add up to a number."""
    return [
        f"{name} has values that are not finite, at {int((~norms.positions.isfinite()).sum())} positions"
        for name, norms in found.items()
        if not math.isfinite(norms.norm)
    ]


def condition(
    oracle: Callable[[dict[str, Tensor]], list[Tensor]], inputs: Mapping[str, Tensor], unit: float, seed: int = 0
) -> float:
    """How many times larger the oracle's answer to a rounding of its inputs is than that rounding, at least 1.

    oracle: from float64 inputs to outputs. unit: the relative size of the rounding, up or down at random in each value.
    The largest relative L2 of any output in DRAWS draws, for what one draw meets is a matter of luck.
    """
    generator = torch.Generator().manual_seed(seed)
    right, found = oracle(dict(inputs)), 1.0
    for _ in range(DRAWS):
        rounded = {name: roughly(x, unit, generator) for name, x in inputs.items()}
        for before, after in zip(right, oracle(rounded), strict=True):
            found = max(found, relative_l2(norms(after - before), norms(before)) / unit)
    return found


def roughly(x: Tensor, unit: float, generator: torch.Generator) -> Tensor:
    """x with every value larger or smaller by the relative `unit`; as it is where it holds integers."""
    if not x.is_floating_point():
        return x
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
    return x * (1 + unit * signs)


def explain(
    oracle: list[Tensor], peer: list[Tensor], subject: list[Tensor], inside: Mapping[str, list[Tensor]] | None = None
) -> tuple[Explanation, ...]:
    """Of every output whose shapes agree. inside: the oracle's outputs with mistakes made inside it, by their names."""
    threes = enumerate(zip(oracle, peer, subject, strict=False))
    return tuple(
        explain_output(index, *three, {name: outputs[index] for name, outputs in (inside or {}).items()})
        for index, three in threes
        if three[0].shape == three[2].shape
    )


def explain_output(
    index: int, oracle: Tensor, peer: Tensor, subject: Tensor, inside: Mapping[str, Tensor]
) -> Explanation:
    ours = subject.double()
    error = (ours - oracle).abs()
    flat = int(error.argmax())
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    shape = [min(most, n) for most, n in zip(MAP_SHAPE, rows(error).shape, strict=True)]
    errors = torch.nn.functional.adaptive_max_pool2d(rows(error).float()[None], shape)[0] / (norms(oracle).rms or 1)
    right, theirs, mine = (float(x.reshape(-1)[flat]) for x in (oracle, peer, subject))
    return Explanation(index, worst, right, theirs, mine, errors, likely_causes(oracle, ours, inside))


# ---- measures ------------------------------------------------------------------------------------------------------


def rows(x: Tensor) -> Tensor:
    """(position, channel): a position is a row of the last axis."""
    return x.reshape(-1, x.shape[-1])


def norms(x: Tensor) -> Norms:
    square = rows(x).square()
    return Norms(square.sum(1), square.sum(0), rows(x).mean(0), float(square.max().sqrt()))


def over(error: float, size: float) -> float:
    """The error relative to a size; where there is nothing to be relative to, itself."""
    return error / size if size else error


def relative_l2(error: Norms, oracle: Norms) -> float:
    """Norm of the error over norm of the oracle."""
    return over(error.norm, oracle.norm)


def worst_position(error: Norms, oracle: Norms) -> float:
    """The largest relative L2 over any one position."""
    size = torch.where(oracle.positions == 0, torch.ones_like(oracle.positions), oracle.positions)
    return float((error.positions / size).max().sqrt())


def worst_channel(error: Norms, oracle: Norms) -> float:
    """The largest RMS error of any one channel, over the RMS of the oracle."""
    return over(math.sqrt(float(error.channels.max()) / len(error.positions)), oracle.rms)


def worst_mean(error: Norms, oracle: Norms) -> float:
    """The largest mean error of any one channel, over the RMS of the oracle: what is wrong in the same way at every
    position remains, and roundings cancel out."""
    return over(float(error.means.abs().max()), oracle.rms)


def largest_error(error: Norms, oracle: Norms) -> float:
    """The largest absolute error, over the RMS of the oracle."""
    return over(error.largest, oracle.rms)


def measure_values(oracle: Norms, peer: Norms, subject: Norms, values: float, sums: float) -> list[Measure]:
    """Of the errors of peer and subject. values, sums: the floor's shares for rounded values and for running sums."""
    n_position, n_channel, floor = len(oracle.positions), len(oracle.channels), values + sums
    # A rounding error is relative to its own value, so a channel's follows that channel, and the largest error the
    # largest value where that is further out than the largest of so many normal errors.
    of_channels = expected_maximum(n_channel) * worst_channel(oracle, oracle)
    measures = []
    for name, measure, least in (
        ("relative L2", relative_l2, floor),
        ("worst position", worst_position, floor * expected_maximum(n_position)),
        ("worst channel", worst_channel, floor * of_channels),
        # Sums of nearly the same terms are rounded in nearly the same way at every position.
        ("worst channel's mean", worst_mean, (values / math.sqrt(n_position) + sums) * of_channels),
        (
            "largest error / RMS",
            largest_error,
            floor * max(expected_maximum(n_position * n_channel), largest_error(oracle, oracle)),
        ),
    ):
        theirs, ours = measure(peer, oracle), measure(subject, oracle)
        measures.append(Measure(name, ours, theirs, K * theirs + least))
    return measures


def expected_maximum(n: int) -> float:
    """The largest of n standard normal numbers to expect, asymptotically; at least 1."""
    return max(1.0, math.sqrt(2 * math.log(n)))


def kl_divergences(right: Tensor, *others: Tensor) -> list[Tensor]:
    """KL divergence of the probabilities of others at every position, all (position, token); computed for a few
    positions at a time, which then stay in the processor's cache."""
    found: list[list[Tensor]] = [[] for _ in others]
    for first in range(0, len(right), POSITIONS_AT_A_TIME):
        some = slice(first, first + POSITIONS_AT_A_TIME)
        exact = right[some].log_softmax(-1)
        probability = exact.exp()
        for logits, of_this in zip(others, found, strict=True):
            of_this.append((probability * (exact - logits[some].log_softmax(-1))).sum(-1).clamp(min=0))
    return [torch.cat(each) for each in found]


def measure_logits(
    oracle: Tensor, peer: Tensor, subject: Tensor, size: Norms, peer_error: Norms, floor: float
) -> list[Measure]:
    """As probabilities over the vocabulary.

    KL divergence grows with the square of an error e of the logits, at most as e**2 / 2, so its budget is that of its
    root. Where two tokens' logits are nearer than twice the error of each, either may be the first choice.
    """
    their_kl, our_kl = kl_divergences(rows(oracle), rows(peer), rows(subject))
    measures = []
    for name, of in (("KL mean", Tensor.mean), ("KL max", Tensor.max)):
        budget = (K * float(of(their_kl)) ** 0.5 + floor * size.rms / 2**0.5) ** 2
        measures.append(Measure(name, float(of(our_kl)), float(of(their_kl)), budget))
    error = K * largest_error(peer_error, size) + floor * largest_error(size, size)
    top = rows(oracle).topk(2)
    close = float(((top.values[:, 0] - top.values[:, 1]) <= 2 * error * (size.rms or 1)).double().mean())
    chosen = [rows(logits).argmax(-1, keepdim=True) for logits in (subject, peer)]
    ours, theirs = (over(float((top.values[:, :1] - rows(oracle).gather(1, c)).max()), size.rms) for c in chosen)
    differ, they_differ = (float((c != top.indices[:, :1]).double().mean()) for c in chosen)
    return [
        *measures,
        Measure("top-1 margin", ours, theirs, 2 * error),
        Measure("top-1 disagreement", differ, they_differ, close),
    ]
