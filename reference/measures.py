"""The ways to measure an error, and what each allows: the budget of the subject, the ceiling of the peer."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maxwhisper import names

K = 4.0
ROUNDING = 1 / math.sqrt(8 * math.log(2))
"""The RMS error of rounding normal numbers, relative to their RMS, in unit roundoffs u: it is even up to u times the
power of two below a number, whose mean square is that of the numbers over 8/3 ln 2."""
DTYPES = {name: getattr(torch, name) for name in names.DTYPES}
"""PyTorch's dtypes that blocks are compared in, by name, the most precise first."""
UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES.values()}
SMALLEST = {
    dtype: max(torch.finfo(dtype).smallest_normal, torch.finfo(torch.float32).smallest_normal / roundoff)
    for dtype, roundoff in UNIT_ROUNDOFF.items()
}
"""By dtype, the size below which an error is no longer relative to its value: what lies between subnormal numbers is
rounded to one of them, and sums in float32 may flush those of float32 to zero."""
POSITIONS_AT_A_TIME = 4
"""The outputs of which KL divergences are computed."""


def severity(x: float) -> float:
    """Returns what to sort by: a NaN is as bad as it gets."""
    return math.inf if math.isnan(x) else x


@dataclass(frozen=True)
class Measure:
    """One way to measure error, for peer and subject, the budget it leaves the subject, and how far the peer may be off
    to be a yardstick."""

    name: str
    subject: float
    peer: float
    budget: float
    ceiling: float = math.inf

    @property
    def passed(self) -> bool:
        return self.within and self.sound

    @property
    def within(self) -> bool:
        """Tells whether the subject stays in its budget."""
        return self.subject <= self.budget  # not for a NaN

    @property
    def sound(self) -> bool:
        """Tells whether the peer's own error is one of rounding."""
        return self.peer <= self.ceiling

    @property
    def ratio(self) -> float:
        """Returns subject / peer: below 1, MAX is more accurate than PyTorch. 1 when neither errs."""
        if self.peer == 0:
            return 1.0 if self.subject == 0 else math.inf
        return self.subject / self.peer

    @property
    def used(self) -> float:
        """Returns the share of the budget that the subject uses; above 1 it fails."""
        if self.budget == 0:
            return 0.0 if self.subject == 0 else math.inf
        return self.subject / self.budget


@dataclass(frozen=True)
class Norms:
    """Squared norms of a tensor's positions (rows of its last axis) and channels, the channels' means, and its largest
    absolute value. smallest: the size below which nothing is relative to the values."""

    positions: Tensor
    channels: Tensor
    means: Tensor
    largest: float
    smallest: float = 0.0

    @property
    def norm(self) -> float:
        return float(self.positions.sum().sqrt())

    @property
    def rms(self) -> float:
        return math.sqrt(float(self.positions.mean()) / len(self.channels))

    @property
    def size(self) -> float:
        """Returns what errors are relative to: the RMS, or 1 where all values are zero, about the size of what a layer
        norm hands on."""
        return max(self.rms, self.smallest) if self.rms else 1.0

    @property
    def position_sizes(self) -> Tensor:
        """Returns what errors at every position are relative to: its RMS, or where it is zero the size of the whole."""
        sizes = (self.positions / len(self.channels)).sqrt()
        return torch.where(sizes == 0, self.size, sizes.clamp(min=self.smallest))


class Condition(NamedTuple):
    """How many times larger an oracle's answer to one rounding of its inputs is than that rounding, at least 1.

    whole: in relative L2. largest: in the largest error over the RMS, which a single value decides, and with it what
    holds few others: channel, small_channel and mean, each in the measure of that name.
    """

    whole: float = 1.0
    largest: float = 1.0
    channel: float = 1.0
    small_channel: float = 1.0
    mean: float = 1.0


WELL_CONDITIONED = Condition()


@dataclass(frozen=True)
class Allowance:
    """How large errors of rounding are in a block, relative to its values.

    values, sums: the RMS error to expect of rounded values, and of sums. most: what rounding explains. condition: of
    the block on its inputs. ceilings: whether the peer's error is the block's own, so that there is a most for it.
    """

    values: float
    sums: float
    most: float
    condition: Condition = WELL_CONDITIONED
    ceilings: bool = True

    def budget(self, n_mean: int = 1, condition: float | None = None) -> float:
        """Returns the budget where the peer is exact, of a mean over so many, in which the errors of values cancel
        out. condition: of what is measured, if not of the whole."""
        times = self.condition.whole if condition is None else condition
        return K * max(self.values / math.sqrt(n_mean), self.sums) + (times - 1) * self.most

    def below(self, error_of_zeros: float) -> float:
        """Returns the largest error that is not yet that of zeros, which is that of twice the right values too;
        rounding is allowed where these are no larger."""
        return max(error_of_zeros - self.most, self.most)


def rows(x: Tensor) -> Tensor:
    """Reshapes values to (position, channel): a position is a row of the last axis."""
    return x.reshape(-1, x.shape[-1] if x.ndim else 1)


def norms(x: Tensor, smallest: float = 0.0) -> Norms:
    square = rows(x).square()
    return Norms(square.sum(1), square.sum(0), rows(x).mean(0), float(square.max().sqrt()), smallest)


def relative_l2(error: Norms, oracle: Norms) -> float:
    """Returns the RMS of the error over that of the oracle."""
    return error.rms / oracle.size


def worst_position(error: Norms, oracle: Norms) -> float:
    """Returns the largest relative L2 over any one position."""
    return float(((error.positions / len(error.channels)).sqrt() / oracle.position_sizes).max())


def worst_channel(error: Norms, oracle: Norms) -> float:
    """Returns the largest RMS error of any one channel, over the RMS of the oracle."""
    return math.sqrt(float(error.channels.max()) / len(error.positions)) / oracle.size


def worst_small_channel(error: Norms, oracle: Norms) -> float:
    """Returns the largest RMS error of any one channel of the half that is smallest in the oracle, over the RMS of that
    half: beside a channel a hundred times as large, the others hardly count for the RMS of the whole."""
    half = oracle.channels.argsort()[: (len(oracle.channels) + 1) // 2]
    size = math.sqrt(float(oracle.channels[half].mean()) / len(oracle.positions))
    largest = math.sqrt(float(error.channels[half].max()) / len(error.positions))
    return largest / (max(size, oracle.smallest) if size else oracle.size)


def worst_mean(error: Norms, oracle: Norms) -> float:
    """Returns the largest mean error of any one channel, over the RMS of the oracle: what is wrong in the same way at
    every position remains, and roundings cancel out."""
    return float(error.means.abs().max()) / oracle.size


def largest_error(error: Norms, oracle: Norms) -> float:
    """Returns the largest absolute error, over the RMS of the oracle."""
    return error.largest / oracle.size


CONDITIONED = (relative_l2, largest_error, worst_channel, worst_small_channel, worst_mean)
"""The measures that a `Condition` is of, in its order."""

VALUES = (
    "relative L2",
    "worst position",
    "worst channel",
    "worst small channel",
    "worst channel's mean",
    "largest error / RMS",
)
"""The measures of values, all of which grow with the error."""


def measure_values(oracle: Norms, peer: Norms, subject: Norms, allowed: Allowance) -> list[Measure]:
    """Returns the errors of peer and subject, with what each may be."""
    n_position, n_channel, least = len(oracle.positions), len(oracle.channels), allowed.budget()
    condition = allowed.condition
    most = condition.whole * allowed.most
    # A rounding error is relative to its own value, so a channel's follows that channel, and the largest error the
    # largest value where that is further out than the largest of so many normal errors.
    of_channels = expected_maximum(n_channel) * max(1.0, worst_channel(oracle, oracle))
    of_small = expected_maximum((n_channel + 1) // 2) * max(1.0, worst_small_channel(oracle, oracle))
    of_values = max(expected_maximum(n_position * n_channel), largest_error(oracle, oracle))
    # Where a single value amplifies its roundings most, it is luck which side has the worse one.
    of_worst = max(of_values, condition.largest / condition.whole)
    of_worst_channel = max(of_channels, condition.channel / condition.whole)
    channel = max(least * of_channels, allowed.budget(condition=condition.channel))
    small_channel = max(least * of_small, allowed.budget(condition=condition.small_channel))
    mean = max(allowed.budget(n_position) * of_channels, allowed.budget(n_position, condition.mean))
    measures = []
    for name, measure, exact, times in (
        ("relative L2", relative_l2, least, 1.0),
        # Relative to itself a position whose values cancel out is honestly as far off as rounding explains. One that
        # the peer has wrong shows in the largest error.
        ("worst position", worst_position, most * expected_maximum(n_position), None),
        ("worst channel", worst_channel, channel, of_worst_channel),
        # What comes from large channels may be in the peer's error too.
        ("worst small channel", worst_small_channel, small_channel, None),
        # Sums of nearly the same terms are rounded in nearly the same way at every position. A channel's mean error is
        # at most its RMS, for which the peer has a ceiling.
        ("worst channel's mean", worst_mean, mean, None),
        # A single value may be the one that was rounded worst, or whose roundings are amplified most.
        ("largest error / RMS", largest_error, most * of_worst, of_worst),
    ):
        theirs, ours = measure(peer, oracle), measure(subject, oracle)
        ceiling = K * times * most if times and allowed.ceilings else math.inf
        budget = max(K * theirs, exact)
        if measure is relative_l2:
            budget = min(budget, allowed.below(relative_l2(oracle, oracle)))
        measures.append(Measure(name, ours, theirs, budget, ceiling))
    return measures


def expected_maximum(n: int) -> float:
    """Returns the largest of n standard normal numbers to expect, asymptotically; at least 1."""
    return max(1.0, math.sqrt(2 * math.log(n)))


def kl_divergences(right: Tensor, *others: Tensor) -> list[Tensor]:
    """Returns the KL divergence of the probabilities of others at every position, all (position, token); computed for a
    few positions at a time, which then stay in the processor's cache."""
    found: list[list[Tensor]] = [[] for _ in others]
    for first in range(0, len(right), POSITIONS_AT_A_TIME):
        some = slice(first, first + POSITIONS_AT_A_TIME)
        exact = right[some].log_softmax(-1)
        probability = exact.exp()
        for logits, of_this in zip(others, found, strict=True):
            of_this.append((probability * (exact - logits[some].log_softmax(-1))).sum(-1).clamp(min=0))
    return [torch.cat(each) for each in found]


def measure_logits(
    oracle: Tensor, peer: Tensor, subject: Tensor, size: Norms, peer_error: Norms, least: float
) -> list[Measure]:
    """Measures outputs as probabilities over the vocabulary.

    KL divergence grows with the square of an error e of the logits, at most as e**2 / 2, so its budget is that of its
    root. Where two tokens' logits are nearer than twice the error of each, either may be the first choice.
    """
    their_kl, our_kl = kl_divergences(rows(oracle), rows(peer), rows(subject))
    measures = []
    for name, of in (("KL mean", Tensor.mean), ("KL max", Tensor.max)):
        budget = max(K * float(of(their_kl)) ** 0.5, least * size.size / 2**0.5) ** 2
        measures.append(Measure(name, float(of(our_kl)), float(of(their_kl)), budget))
    error = max(K * largest_error(peer_error, size), least * max(1.0, largest_error(size, size)))
    top = rows(oracle).topk(min(2, oracle.shape[-1]))
    close = float(((top.values[:, 0] - top.values[:, -1]) <= 2 * error * size.size).double().mean())
    chosen = [rows(logits).argmax(-1, keepdim=True) for logits in (subject, peer)]
    ours, theirs = (float((top.values[:, :1] - rows(oracle).gather(1, c)).max()) / size.size for c in chosen)
    differ, they_differ = (float((c != top.indices[:, :1]).double().mean()) for c in chosen)
    return [
        *measures,
        Measure("top-1 margin", ours, theirs, 2 * error),
        Measure("top-1 disagreement", differ, they_differ, close),
    ]
