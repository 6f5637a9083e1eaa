"""Is MAX as accurate as PyTorch in the same dtype? Budget and verdict; the measures are in measures.py.

Three computations of one block from the same inputs and weights: the *oracle*, PyTorch Whisper in float64; the *peer*,
PyTorch Whisper in the dtype under test; the *subject*, MAX in that dtype. The peer's own error is the yardstick:

    error(subject) <= K * max(error(peer), error to expect)

The relative L2's is below 1 whatever the peer's, for that is the error of zeros, and of twice the right values.

The error to expect is for inputs on which the peer is exact or lucky. It is that of an implementation that rounds as
little as any right one. A rounding errs by 0.42 u in the root mean square (`ROUNDING`). Errors of either sign add up
with the root of their number (N. Higham, T. Mary, "A new approach to probabilistic rounding error analysis", 2019).
So m values in a row that a block rounds to the dtype err by 0.42 u * sqrt(m). Added in pairs, the least that any order
can do, n terms are rounded log2(n) times in a row. Sums are of float32 whatever the dtype, so the block's longest errs
by 0.42 u32 * sqrt(log2(n)). To expect is the larger of the two: in float32 the last addition of a sum is the rounding
of its value, and must not count twice.

Logits of one position can be little more than one number, for the vectors of most tokens are alike. In one number
errors do not average out, and PyTorch is often lucky. So there each of the m values in a row counts as such a sum:
0.42 u32 * sqrt(m * log2(n)). The same holds for a chain, in which the errors of all blocks before add up.

A measure that is the maximum over n positions, channels or values has n chances of a large error, so there it is larger
by what the maximum of n normal numbers is. In a mean over n positions the errors of rounded values cancel out but for
one part in the root of n. Those of sums need not. A single value may be the one that was rounded worst, and a single
position one whose values cancel out: these may be as far off as rounding explains.

K is one number for the whole project: the factor between the most and the least that right ways to add err by. The most
are as many running sums as a vector register has lanes, 16. For the sums of this network (n from 64 to 5120) they stay
within four times of pairs. That also covers polynomials for exp and erf; a wrong block is off by orders of magnitude.
`python -m reference.tightness` says how small an error the judge finds.

Rounding explains u * sqrt(m) + u32 * sqrt(n), which is one running sum's without lanes. Where the peer errs by more
than K times that, it is no yardstick.

What is rounded inside a block reaches its output amplified by the block's *condition* on its inputs: how many times
larger the oracle's answer to one rounding of the inputs is than that rounding. It is about 1 nearly everywhere, and
large where softmax has to decide between keys whose scores are large and nearly equal; there one PyTorch result, which
may be right by luck, says little of what the dtype can give. It costs further runs of the oracle, so it is found where
a comparison would fail without. What is amplified is often the rounding of few values, in which errors do not average
out, so the budget grows by condition - 1 times what rounding explains.

A single value may be far worse conditioned than the whole, such as the logarithm of a band of noise in which hardly
anything is left. How far either side may be off there, the largest error, has a condition of its own.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .diagnosis import Diagnosis, diagnose
from .measures import (
    CONDITIONED,
    ROUNDING,
    SMALLEST,
    UNIT_ROUNDOFF,
    WELL_CONDITIONED,
    Allowance,
    Condition,
    Measure,
    Norms,
    measure_logits,
    measure_values,
    norms,
    rows,
    severity,
)
from .measures import K as K

DRAWS = 4
"""How many roundings of the inputs a condition is found from."""
MAP_SHAPE = (48, 96)
"""Most rows and columns of a map of errors."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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

    @property
    def torch_device(self) -> torch.device:
        """Returns PyTorch's name for the device."""
        return torch.device("cpu" if self.device == "cpu" else "cuda")

    def __str__(self) -> str:
        model = f"{self.size}, {dtype_name(self.dtype)}, {self.device}"
        return f"{self.block}, layer {self.layer}, {model}, {self.inputs}, seed {self.seed}"


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
    diagnoses: the mistakes that explain the errors, the best explanation first.
    """

    output: int
    worst: tuple[int, ...]
    oracle: float
    peer: float
    subject: float
    errors: Tensor = field(repr=False, compare=False)
    diagnoses: tuple[Diagnosis, ...]

    def __str__(self) -> str:
        values = f"MAX {self.subject:.9g}, PyTorch {self.peer:.9g}, float64 {self.oracle:.9g}"
        lines = [f"  output {self.output}, worst at {list(self.worst)}: {values}"]
        return "\n".join(lines + [f"  looks like: {diagnosis}" for diagnosis in self.diagnoses])


@dataclass(frozen=True)
class Judgement:
    """The verdict on one comparison.

    defects: what made a comparison of values impossible. condition: of the block on the inputs, where it was found.
    explanations: of the outputs, where somebody asked.
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
        """Returns how many pairs of measures were compared."""
        return len(self.measures)

    @property
    def passed(self) -> bool:
        return self.pairs > 0 and not self.defects and all(measure.passed for _, measure in self.measures)

    @property
    def worst(self) -> Measure:
        """Returns the measure that comes nearest to its budget, or exceeds it most, a NaN before all others."""
        return max((measure for _, measure in self.measures), key=lambda measure: severity(measure.used))

    @property
    def relative_l2(self) -> Measure:
        """Returns the relative L2 of the output that comes nearest to its budget in it."""
        return max((output["relative L2"] for output in self.outputs), key=lambda measure: severity(measure.used))

    @property
    def used(self) -> float:
        """Returns the largest share of a budget that the subject uses, infinite where values could not be compared."""
        return severity(self.worst.used) if self.pairs and not self.defects else math.inf

    @property
    def ratio(self) -> float:
        """Returns MAX's relative L2 over PyTorch's; NaN where nothing was compared."""
        return self.relative_l2.ratio if self.pairs else math.nan

    @property
    def bad_yardstick(self) -> list[str]:
        """Says where PyTorch errs by more than rounding explains, so that its error measures nothing."""
        dtype = dtype_name(self.comparison.dtype)
        return [
            f"the yardstick is bad: PyTorch is {m.peer:.3g} off in {m.name} of output {output.index}, "
            f"and rounding in {dtype} explains {m.ceiling:.3g}"
            for output, m in self.measures
            if not m.sound
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        yield str(self.comparison)
        yield from (f"  {defect}" for defect in self.defects)
        yield from (f"  {reason}" for reason in self.bad_yardstick)
        if not self.pairs:
            yield "  nothing was compared"
        if self.condition > 1:
            yield f"  one rounding of the inputs changes the oracle {self.condition:.3g} times as much"
        for output in self.outputs:
            yield f"  output {output.index} {list(output.shape)}"
            for m in output.measures:
                verdict = "ok" if m.passed else "FAILED" if m.sound else "BAD YARDSTICK"
                yield f"    {m.name:22} MAX {m.subject:.3e}  PyTorch {m.peer:.3e}  budget {m.budget:.3e}  {verdict}"
        yield from map(str, self.explanations)


@torch.no_grad()
def judge(
    comparison: Comparison,
    oracle: list[Tensor],
    peer: list[Tensor],
    subject: list[Tensor],
    *,
    longest_reduction: int,
    roundings: int = 1,
    n_vocab: int | None = None,
    condition: Condition = WELL_CONDITIONED,
    chained: bool = False,
) -> Judgement:
    """Compares all outputs of a block, subject and peer each with the oracle.

    Returns a verdict whatever it is given, a comparison's dtype being one of UNIT_ROUNDOFF; what cannot be compared is
    named among its defects.

    longest_reduction: the most terms that any one value inside the block is summed from.
    roundings: how many values in a row the block rounds to the dtype, each made from the one before.
    n_vocab: length of the last axis of an output that holds logits, which are then measured as probabilities too.
    condition: of the block on these inputs, where it was found.
    chained: whether the peer was fed what its own blocks before made, so that its error has no ceiling.
    """
    defects: list[str] = []
    outputs: list[Output] = []
    if not len(oracle) == len(peer) == len(subject):
        defects.append(f"number of outputs: oracle {len(oracle)}, peer {len(peer)}, subject {len(subject)}")
    u, u32, smallest = UNIT_ROUNDOFF[comparison.dtype], UNIT_ROUNDOFF[torch.float32], SMALLEST[comparison.dtype]
    values = u * math.sqrt(roundings)
    pairs, running = (u32 * math.sqrt(n) for n in (math.log2(longest_reduction), longest_reduction))
    allowed = Allowance(ROUNDING * values, ROUNDING * pairs, values + running, condition, ceilings=not chained)
    one_number = replace(allowed, sums=allowed.sums * math.sqrt(roundings))
    for index, (right, theirs, ours) in enumerate(zip(oracle, peer, subject, strict=False)):
        found = output_defects(right, theirs, ours)
        if not found:
            theirs, ours = theirs.double(), ours.double()
            size, peer_error, subject_error = norms(right, smallest), norms(theirs - right), norms(ours - right)
            found = not_finite(oracle=size, peer=peer_error, subject=subject_error)
        if found:
            defects += [f"output {index}: {defect}" for defect in found]
            continue
        logits = right.shape[-1:] == (n_vocab,)
        measures = measure_values(size, peer_error, subject_error, one_number if chained or logits else allowed)
        if logits:
            measures += measure_logits(right, theirs, ours, size, peer_error, one_number.budget())
        outputs.append(Output(index, tuple(right.shape), tuple(measures)))
    return Judgement(comparison, tuple(outputs), tuple(defects), condition.whole)


def judge_by_condition(verdict: Callable[..., Judgement], find: Callable[[], Condition]) -> Judgement:
    """Returns a verdict, which is given a `condition` where it would not pass without: to find one takes a while."""
    first = verdict()
    return first if first.passed or first.defects else verdict(condition=find())


def output_defects(oracle: Tensor, peer: Tensor, subject: Tensor) -> list[str]:
    """Says what makes a comparison of values meaningless."""
    if oracle.dtype != torch.float64:
        return [f"the oracle is {oracle.dtype}, not torch.float64"]
    if not oracle.shape == peer.shape == subject.shape:
        return [f"shape: oracle {list(oracle.shape)}, peer {list(peer.shape)}, subject {list(subject.shape)}"]
    if subject.dtype != peer.dtype or not peer.is_floating_point():
        return [f"dtype: peer {peer.dtype}, subject {subject.dtype}"]
    return [] if oracle.numel() else ["empty"]


def not_finite(**found: Norms) -> list[str]:
    """Says where there is a NaN or an infinity: the squares of such a position do not add up to a number."""
    return [
        f"{name} has values that are not finite, at {int((~norms.positions.isfinite()).sum())} positions"
        for name, norms in found.items()
        if not math.isfinite(norms.norm)
    ]


def condition(
    oracle: Callable[[dict[str, Tensor]], list[Tensor]], inputs: Mapping[str, Tensor], roundoff: float, seed: int = 0
) -> Condition:
    """Returns how many times larger the oracle's answer to a rounding of its inputs is than that rounding.

    oracle: from float64 inputs to outputs. roundoff: the most that rounding changes a value by, relative to it. It is
    the largest of any output in DRAWS draws, for what one draw meets is a matter of luck.
    """
    generator = torch.Generator().manual_seed(seed)
    right, found = oracle(dict(inputs)), WELL_CONDITIONED
    for _ in range(DRAWS):
        rounded = {name: perturbed(x, roundoff, generator) for name, x in inputs.items()}
        for before, after in zip(right, oracle(rounded), strict=True):
            error, size = norms(after - before), norms(before)
            times = (measure(error, size) / roundoff for measure in CONDITIONED)
            found = Condition(*map(max, found, times))
    return found


def perturbed(x: Tensor, roundoff: float, generator: torch.Generator) -> Tensor:
    """Returns x with every value as far off as a rounding leaves it, by up to the relative `roundoff`; as it is where
    it holds integers."""
    if not x.is_floating_point():
        return x
    errors = torch.rand(x.shape, dtype=torch.float64, generator=generator).to(x.device) * 2 - 1
    return x + roundoff * errors * x  # not x * (1 + ...), which is x in the dtype that has this roundoff


def explain(
    oracle: list[Tensor], peer: list[Tensor], subject: list[Tensor], inside: Mapping[str, list[Tensor]] | None = None
) -> tuple[Explanation, ...]:
    """Explains every output whose shapes agree. inside: the oracle's with mistakes made in it, by their names."""
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
    return Explanation(index, worst, right, theirs, mine, errors, diagnose(oracle, ours, inside))
