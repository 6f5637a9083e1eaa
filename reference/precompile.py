"""Precompiling: other processes fill MAX's compile cache with what this one will need later.

MAX compiles one artifact at a time in a process, on little more than one core. While the first model is compiled and
compared here, the other processes compile the next ones, and this one then finds them in the cache.

    python -m reference.precompile JOB ... [--checkpoint PATH] [--device cpu]

A job is a suite's model as SIZE:DTYPE, or some blocks of it as SIZE:DTYPE:BLOCK,...; or "transcribing": what
transcribes with the checkpoint, or else the fixture.
"""

import argparse
import logging
from collections.abc import Iterable, Sequence

import torch

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compiled import policy_of, programs_of, units_on
from maxwhisper.engine.precompile import Precompiler
from maxwhisper.engine.program import Artifact
from maxwhisper.network.blocks import BLOCKS

from .fixtures import NANO
from .judge import dtype_name
from .measures import DTYPES
from .models import load
from .suite import Suite

TRANSCRIBING = "transcribing"


def suite_job(size: str, dtype: torch.dtype, only: Iterable[str] = ()) -> str:
    return ":".join([size, dtype_name(dtype), *filter(None, [",".join(sorted(only))])])


class WhenCompiling(logging.Handler):
    """Starts another process when a compilation of this one is announced, as a handler of the logger "maxwhisper".

    That is when it takes longer than one from the cache: where the cache is full there is nothing to precompile.
    """

    def __init__(self, precompiler: Precompiler):
        super().__init__(logging.INFO)
        self.precompiler = precompiler

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("compiling"):
            self.precompiler.start()


def precompiler(jobs: Sequence[str], checkpoint: str | None, device: str) -> Precompiler:
    """Returns the process that does some jobs, in the order in which they will be needed."""
    return Precompiler(
        "reference.precompile", jobs, "--device", device, *(("--checkpoint", checkpoint) if checkpoint else ())
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reference.precompile", description=__doc__)
    parser.add_argument("jobs", nargs="+", metavar="JOB")
    parser.add_argument("--checkpoint")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for job in options.jobs:
        if job == TRANSCRIBING:
            checkpoint = load_checkpoint(options.checkpoint or NANO)
            policy = policy_of(checkpoint.tensors, options.device, "float32")
            for unit in units_on(options.device):
                Artifact(unit, programs_of(unit, checkpoint.dims, policy), options.device)
        else:
            size, dtype, *only = job.split(":")
            names = frozenset(",".join(only).split(",")) - {""}
            suite = Suite(load(size, options.checkpoint), DTYPES[dtype], options.device, only=names)
            units = {suite.subject.unit(BLOCKS[name]) for name in names} or suite.subject.units
            for unit in sorted(units, reverse=True):  # "parts", while who waits compiles "network"
                suite.subject.artifact(unit)
        print(job, flush=True)


if __name__ == "__main__":
    main()
