"""python -m reference.soak: the suite's comparisons over and over on fresh random inputs; a false alarm fails.

A right subject must pass every time. There are two: MAX, and PyTorch itself in the subject's place, with other kernels
than the peer's where there are any (oneDNN switched off).
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from maxwhisper.cli.option_types import above_zero
from maxwhisper.network.blocks import BLOCKS

from .activations import RANDOM
from .blocks import TWINS
from .judge import Comparison, Judgement, dtype_name
from .measures import DTYPES
from .models import FIXTURE, SIZES, load
from .suite import Suite


def pytorch_in_the_subjects_place(suite: Suite, comparison: Comparison) -> Callable[..., list[Tensor]]:
    """Returns what stands in for the block on MAX."""

    def run(**inputs: Tensor) -> list[Tensor]:
        with torch.backends.mkldnn.flags(enabled=suite.dtype != torch.float32):
            return TWINS[comparison.block](suite.peer, comparison.layer, **inputs)

    return run


def repetition(suite: Suite, seed: int) -> Iterator[tuple[str, Judgement]]:
    """Judges every comparison on the random inputs of a seed, with each of the two subjects."""
    for block in BLOCKS.values():
        for comparison in suite.comparisons(block, [RANDOM], seed):
            yield "MAX", suite.judge(comparison)
            yield "PyTorch", suite.judge(comparison, pytorch_in_the_subjects_place(suite, comparison))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reference.soak", description=__doc__)
    parser.add_argument("--repetitions", type=above_zero, default=100, help="default: %(default)s")
    sizes = [FIXTURE, *SIZES]
    parser.add_argument("--size", nargs="+", choices=sizes, default=sizes[:2], help="default: fixture tiny")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    alarms = 0
    for size in options.size:
        model = load(size)
        for dtype in options.dtype:
            alarms += soak(Suite(model, DTYPES[dtype]), options.repetitions)
    return 1 if alarms else 0


def soak(suite: Suite, repetitions: int) -> int:
    """Prints every false alarm and where each subject came nearest to its budget; returns how many alarms."""
    alarms, judged = 0, 0
    nearest: dict[str, Judgement] = {}
    for seed in range(1, repetitions + 1):
        for subject, judgement in repetition(suite, seed):
            judged += 1
            if judgement.pairs and (subject not in nearest or judgement.worst.used > nearest[subject].worst.used):
                nearest[subject] = judgement
            if not judgement.passed:
                alarms += 1
                print(f"{subject} in the subject's place: {judgement}", flush=True)
    print(f"{suite.model.size}, {dtype_name(suite.dtype)}: {alarms} alarms in {judged} comparisons", flush=True)
    for subject, judgement in nearest.items():
        worst = judgement.worst
        print(f"  {subject} used {worst.used:.2f} of a budget, {worst.name}: {judgement.comparison}", flush=True)
    return alarms


if __name__ == "__main__":
    sys.exit(main())
