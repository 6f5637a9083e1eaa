"""python -m reference: the isolated parity check of every block of a checkpoint in float32, one line each."""

import argparse
import logging
import sys

import torch

from maxwhisper.blocks import BLOCKS
from maxwhisper.runtime import COMPILE_LOG

from .activations import FIXTURES, KINDS
from .suite import Suite, trained


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reference", description=__doc__)
    parser.add_argument("--checkpoint", default=FIXTURES / "nano.pt", help="path or name (default: %(default)s)")
    suite = Suite(trained(parser.parse_args().checkpoint), torch.float32)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print("relative L2 to float64, worst output, layer and inputs of each block; MAX and PyTorch both in float32\n")
    print(f"{'block':38}{'MAX':>11}{'PyTorch':>11}{'ratio':>8}  verdict")
    passed = True
    for block in BLOCKS.values():
        judgements = [suite.judge(comparison) for comparison in suite.comparisons(block, KINDS)]
        worst = max((j.relative_l2 for j in judgements if j.pairs), key=lambda measure: measure.used)
        verdict = all(judgement.passed for judgement in judgements)
        passed &= verdict
        figures = f"{worst.subject:11.2e}{worst.peer:11.2e}{worst.ratio:8.2f}"
        print(f"{block.name:38}{figures}  {'ok' if verdict else 'FAILED'}", flush=True)
    graphs, seconds = sum(r.graphs for r in COMPILE_LOG), sum(r.seconds for r in COMPILE_LOG)
    print(f"\n{graphs} graphs compiled in {seconds:.1f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
