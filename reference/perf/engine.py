"""The near end of reference/perf/worker.py: an engine in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from maxwhisper.compare.process import awake
from maxwhisper.errors import MaxWhisperError

from ..fixtures import ROOT

WORKER = Path(__file__).with_name("worker.py")
ENGINES = ("MAX", "PyTorch")


class WorkerError(MaxWhisperError):
    """A timing process that did not start, ended early, or could not do what it was asked; the message names its tree
    and the last line that it printed."""


@dataclass(frozen=True)
class Setting:
    """What is timed. size, dtype, device, checkpoint, artifacts: as the suite's options have them."""

    size: str
    dtype: str
    device: str
    checkpoint: str | None = None
    artifacts: str | None = None

    def __str__(self) -> str:
        return f"{self.size}, {self.dtype}, {self.device}"


class Worker:
    """A process that times the blocks of a source tree; close it, or use it in a with statement.

    takes: by block of that tree, its inputs: names, dtypes and dimensions.
    Raises WorkerError where the tree does not start.
    """

    def __init__(self, setting: Setting, tree: Path = ROOT, name: str = "this tree"):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, close() closes it
        options = [setting.size, setting.dtype, setting.device]
        for option in ("checkpoint", "artifacts"):
            if value := getattr(setting, option):
                options += [f"--{option}", value]
        # A session of its own: Ctrl-C is for the parent to act on, which closes its workers.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            start_new_session=True,
        )
        try:
            ready = self._reply()
            if Path(ready["tree"]).resolve() != tree.resolve():
                raise WorkerError(f"{name}: maxwhisper was imported from {ready['tree']}, expected from {tree}")
        except BaseException:
            self.close()
            raise
        self.takes: dict[str, list[str]] = ready["takes"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """What the worker's method `do` returns for the arguments. Raises WorkerError for what it raises."""
        assert self.process.stdin is not None
        with awake(self.process):
            try:
                self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                raise WorkerError(self._ended()) from None
            return self._reply()

    def _reply(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(self._ended())
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}")
        return reply["result"]

    def _ended(self) -> str:
        status = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().rpartition("\n")[2]
        return f"{self.name}: the timing process ended with status {status}: {last or 'it printed nothing'}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
