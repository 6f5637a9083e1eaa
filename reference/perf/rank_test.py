"""Whether a block has become slower: a rank test over interleaved rounds, and a factor."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

P = 0.002
"""Two samples of one distribution are told apart by chance in this share of cases, in half of them as a slowdown. The
threshold of asv."""
FACTOR = 1.10
"""The slowdown that matters; a significant one below it passes."""


@dataclass(frozen=True)
class RankTest:
    """A block's medians in seconds, ratio of head to base, and p of the two-sided Mann-Whitney test."""

    block: str
    base: float
    head: float
    p: float

    @property
    def ratio(self) -> float:
        return self.head / self.base

    @property
    def significant(self) -> bool:
        return self.p < P

    @property
    def failed(self) -> bool:
        return self.significant and self.ratio > FACTOR

    def __str__(self) -> str:
        if self.failed:
            return "FAILED: slower"
        return "ok, faster" if self.significant and self.ratio < 1 / FACTOR else "ok"


def rank_test(block: str, base: Sequence[float], head: Sequence[float]) -> RankTest:
    """Judges rounds of base and head, each in seconds per call. Raises ValueError where there are none of one."""
    if not base or not head:
        raise ValueError(f"{block}: no rounds of {'head' if base else 'base'}")
    from scipy.stats import mannwhitneyu  # whose import takes a second of processor time

    return RankTest(block, median(base), median(head), float(mannwhitneyu(base, head).pvalue))
