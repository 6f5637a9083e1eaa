"""python -m reference: the isolated parity check of every block of a checkpoint in float32, one line each."""

import argparse
import logging
import sys

import torch

from maxwhisper.errors import MaxWhisperError
from maxwhisper.network.blocks import BLOCKS, Block

from .activations import END, KINDS
from .compile_log import CompileRecord, compilations
from .fixtures import NANO
from .measures import severity
from .models import CHECKPOINT, trained
from .precompile import WhenCompiling, precompiler, suite_job
from .suite import Suite

N_FIRST = 8
"""How many of the blocks that are not of the network take as long to compile as the others."""


class Halves:
    """The suite twice, each for about half of the blocks, so that two processes compile at the same time."""

    def __init__(self, checkpoint: str):
        model = trained(checkpoint, CHECKPOINT)
        names = [name for name, block in BLOCKS.items() if block.unit != "network"]
        first, last = (Suite(model, torch.float32, only=frozenset(some)) for some in (names[:N_FIRST], names[N_FIRST:]))
        self.suites = first, last
        self.job = suite_job(CHECKPOINT, torch.float32, last.only)
        self.precompiler = precompiler([self.job], str(checkpoint), "cpu")
        if not first.subject.kept("parts"):
            logging.getLogger("maxwhisper").addHandler(WhenCompiling(self.precompiler))

    def of(self, block: Block) -> Suite:
        """Returns the one for a block, when what it computes with has been compiled, or can be."""
        first, last = self.suites
        if block.name not in last.only:
            return first
        self.precompiler.wait(self.job, "the other half of the blocks")
        return last


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reference", description=__doc__)
    parser.add_argument("--checkpoint", default=NANO, help="path or name (default: %(default)s)")
    checkpoint = parser.parse_args().checkpoint
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    compiled: list[CompileRecord] = []
    try:
        with compilations(compiled.append):
            passed = print_verdicts(Halves(checkpoint))
    except MaxWhisperError as error:
        print(f"python -m reference: {error}", file=sys.stderr)
        return 1
    graphs, seconds = sum(r.graphs for r in compiled), sum(r.seconds for r in compiled)
    print(f"\n{graphs} graphs compiled in {seconds:.1f} s")
    return 0 if passed else 1


def print_verdicts(suites: Halves) -> bool:
    """Prints a line for every block; tells whether all passed."""
    print("relative L2 to float64, worst output, layer and inputs of each block; MAX and PyTorch both in float32\n")
    print(f"{'block':38}{'MAX':>11}{'PyTorch':>11}{'ratio':>8}  verdict")
    passed = True
    for block in BLOCKS.values():
        suite = suites.of(block)
        # `pytest tests/parity` compares a text to the end too, and has work cut for other numbers of threads.
        comparisons = list(suite.comparisons(block, [kind for kind in KINDS if kind != END]))
        judgements = [suite.judge(each, suite.executable(block, each.layer)) for each in comparisons]
        measures = [judgement.relative_l2 for judgement in judgements if judgement.pairs]
        worst = max(measures, key=lambda measure: severity(measure.used), default=None)
        verdict = all(judgement.passed for judgement in judgements)
        passed &= verdict
        figures = (
            f"{worst.subject:11.2e}{worst.peer:11.2e}{worst.ratio:8.2f}" if worst else f"{'-':>11}{'-':>11}{'-':>8}"
        )
        print(f"{block.name:38}{figures}  {'ok' if verdict else 'FAILED'}", flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main())
