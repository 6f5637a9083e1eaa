"""python -m reference.tightness: of every block, the smallest uniform error that fails, as a multiple of PyTorch's.

A subject that errs everywhere as PyTorch does, but f times as much, stands for a block that is wrong all over. "one" is
the f from which one of the block's comparisons fails, at some layer or moment of the text; "every", from which all do.
Above K it is where PyTorch errs by less than is to be expected. Where PyTorch is exact, f counts the dtype's roundings.
"""

import argparse
from collections.abc import Sequence

from torch import Tensor

from maxwhisper.network.blocks import BLOCKS, Block

from .activations import RANDOM
from .judge import Comparison
from .measures import DTYPES, ROUNDING, UNIT_ROUNDOFF, VALUES
from .models import FIXTURE, SIZES, load
from .suite import Suite
from .trial import Trial

KINDS = ("speech", RANDOM)


def trial_of_pytorch(suite: Suite, comparison: Comparison, factor: float = 1.0) -> Trial:
    """Returns a trial of a subject that errs `factor` times as much as PyTorch."""

    def run(**inputs: Tensor) -> list[Tensor]:
        pairs = zip(trial.oracle, trial.peer, strict=True)
        return [(right + factor * (theirs - right)).to(theirs.dtype) for right, theirs in pairs]

    trial = Trial(suite, comparison, suite.inputs(BLOCKS[comparison.block], comparison), run)
    return trial


def smallest_failing(suite: Suite, comparison: Comparison) -> float:
    """Returns the multiple of PyTorch's error from which a measure of values fails."""
    trial = trial_of_pytorch(suite, comparison)
    measures = [m for _, m in trial.judged(trial.condition).measures if m.name in VALUES]
    rounding = ROUNDING * UNIT_ROUNDOFF[comparison.dtype]
    exact = not any(m.peer for m in measures)
    return min(m.budget / (m.peer or rounding) for m in measures if m.peer or exact)


def tightness(suite: Suite, block: Block, kind: str) -> tuple[float, float]:
    """Returns the multiple from which one of a block's comparisons on a kind of inputs fails, and that for all."""
    found = [smallest_failing(suite, comparison) for comparison in suite.comparisons(block, [kind])]
    return min(found), max(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.tightness", description=__doc__)
    parser.add_argument("--size", choices=[FIXTURE, *SIZES], default=FIXTURE, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    options = parser.parse_args(arguments)
    suite = Suite(load(options.size), DTYPES[options.dtype])
    print(f"{'block':38}{'inputs':8}{'one':>8}{'every':>8}")
    for block in BLOCKS.values():
        for kind in KINDS:
            one, every = tightness(suite, block, kind)
            print(f"{block.name:38}{kind:8}{one:8.2f}{every:8.2f}", flush=True)


if __name__ == "__main__":
    main()
