"""Compiling ahead: a second process fills MAX's compile cache with what this one will need later.

MAX compiles one artifact at a time in a process, on little more than one core. While the first model is compiled and
compared here, the other process compiles the next ones, and this one then finds them in the cache.

    python -m reference.ahead SIZE:DTYPE ... [--checkpoint PATH] [--device cpu]
"""

import argparse
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

import torch

from .judge import dtype_name
from .suite import DTYPES, Suite, load


class CompileAhead(logging.Handler):
    """The other process, for models by (size, dtype) in the order in which they will be needed.

    As a handler of the logger "maxwhisper" it starts when a compilation of this process is announced, which is when it
    takes longer than one from the cache: where the cache is full there is nothing to be done ahead.
    """

    def __init__(self, models: Sequence[tuple[str, torch.dtype]], checkpoint: str | None, device: str):
        super().__init__(logging.INFO)
        names = [f"{size}:{dtype_name(dtype)}" for size, dtype in models]
        self.command = [sys.executable, "-m", "reference.ahead", *names, "--device", device]
        if checkpoint:
            self.command += ["--checkpoint", checkpoint]
        self.ready = {model: threading.Event() for model in models}
        self.process: subprocess.Popen[str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.process is None and record.getMessage().startswith("compiling"):
            # MAX changes the C library's environment of this process in ways that would mislead a child's Python.
            environment = dict(os.environ)
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
            )
            threading.Thread(target=self._listen, args=(list(self.ready),), daemon=True).start()

    def _listen(self, models: list[tuple[str, torch.dtype]]) -> None:
        assert self.process is not None and self.process.stdout is not None
        for model, _ in zip(models, self.process.stdout, strict=False):
            self.ready[model].set()
        for event in self.ready.values():  # should the process have failed, this one compiles for itself
            event.set()

    def wait(self, size: str, dtype: torch.dtype) -> None:
        """Until the model is compiled, if that is the other process's task."""
        event = self.ready.get((size, dtype))
        if self.process and event:
            event.wait()

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reference.ahead", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="SIZE:DTYPE")
    parser.add_argument("--checkpoint")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for name in options.models:
        size, _, dtype = name.partition(":")
        suite = Suite(load(size, options.checkpoint), DTYPES[dtype], options.device)
        for unit in suite.units:
            suite.artifact(unit)
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
