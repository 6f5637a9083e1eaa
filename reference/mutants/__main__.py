"""`python -m reference.mutants`: tries mutants, and prints what became of them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from maxwhisper.cli.option_types import above_zero

from ..fixtures import ROOT
from .controller import Trials
from .report import enough, report
from .tree import all_mutants, plant, sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries a sample of mutants and returns 1 if too many stay green or are seen in the wrong place."""
    parser = argparse.ArgumentParser(prog="python -m reference.mutants", description=__doc__)
    evenly = "how many, as evenly from the components as can be"
    parser.add_argument("--number", type=above_zero, default=100, help=evenly)
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("--only", default="", help="those of files whose name has this in it")
    parser.add_argument("--tree", type=Path, default=ROOT / "build" / "mutants", help="where the mutated sources go")
    asked = parser.parse_args(arguments)
    asked.tree = asked.tree.absolute()  # tests run inside it
    if not (mutants := [mutant for mutant in all_mutants() if asked.only in mutant.file]):
        parser.error(f"--only {asked.only}: no file that is mutated has this in its name")
    chosen = sample(mutants, asked.number, asked.seed)
    in_python = [mutant for mutant in chosen if not mutant.in_kernel]
    plant(in_python, asked.tree)
    trials = Trials(asked.tree, in_python, asked.tree / f"outcomes-{asked.seed}.jsonl")
    trials.run()
    trials.try_kernels([mutant for mutant in chosen if mutant.in_kernel])
    tried = [mutant for mutant in chosen if mutant.number in trials.found]
    print("\n".join(report(tried, trials.found)))
    return 0 if enough(tried, trials.found) else 1


if __name__ == "__main__":
    sys.exit(main())
