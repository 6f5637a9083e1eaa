"""Compiling ahead: other processes fill MAX's compile cache with what this one will need later.

MAX compiles one artifact at a time in a process, on little more than one core. While the first model is compiled and
compared here, the other processes compile the next ones, and this one then finds them in the cache.

    python -m reference.ahead JOB ... [--checkpoint PATH] [--device cpu]

A job is a suite's model as SIZE:DTYPE, or "transcribing": what transcribes with the checkpoint, or else the fixture.
"""

import argparse
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence

import torch

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.runtime import Artifact
from maxwhisper.whisper import policy_of, programs_of, units_on

from .activations import FIXTURES
from .judge import dtype_name
from .suite import DTYPES, Suite, load

TRANSCRIBING = "transcribing"


def suite_job(size: str, dtype: torch.dtype) -> str:
    return f"{size}:{dtype_name(dtype)}"


class CompileAhead(logging.Handler):
    """One other process, for jobs in the order in which they will be needed.

    As a handler of the logger "maxwhisper" it starts when a compilation of this process is announced, which is when it
    takes longer than one from the cache: where the cache is full there is nothing to be done ahead.
    """

    def __init__(self, jobs: Sequence[str], checkpoint: str | None, device: str):
        super().__init__(logging.INFO)
        self.command = [sys.executable, "-m", "reference.ahead", *jobs, "--device", device]
        if checkpoint:
            self.command += ["--checkpoint", checkpoint]
        self.ready = {job: threading.Event() for job in jobs}
        self.process: subprocess.Popen[str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.process is None and record.getMessage().startswith("compiling"):
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._listen, args=(list(self.ready),), daemon=True).start()

    def _listen(self, jobs: list[str]) -> None:
        assert self.process is not None and self.process.stdout is not None
        for job, _ in zip(jobs, self.process.stdout, strict=False):
            self.ready[job].set()
        for event in self.ready.values():  # should the process have failed, this one compiles for itself
            event.set()

    def wait(self, job: str) -> None:
        """Until the job is done, if it is the other process's."""
        event = self.ready.get(job)
        if self.process and event:
            event.wait()

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reference.ahead", description=__doc__)
    parser.add_argument("jobs", nargs="+", metavar="JOB")
    parser.add_argument("--checkpoint")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for job in options.jobs:
        if job == TRANSCRIBING:
            checkpoint = load_checkpoint(options.checkpoint or FIXTURES / "nano.pt")
            policy = policy_of(checkpoint.tensors, options.device, "float32")
            for unit in units_on(options.device):
                Artifact(unit, programs_of(unit, checkpoint.dims, policy), options.device)
        else:
            size, _, dtype = job.partition(":")
            suite = Suite(load(size, options.checkpoint), DTYPES[dtype], options.device)
            for unit in suite.units:
                suite.artifact(unit)
        print(job, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
