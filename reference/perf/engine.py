"""The near end of reference/perf/worker.py: an engine in a process of its own."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from maxwhisper.compare.process import EngineError, RequestProcess, awake
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


class Worker(RequestProcess):
    """A process that times the blocks of a source tree; close it, or use it in a with statement.

    takes: by block of that tree, its inputs: names, dtypes and dimensions.
    Raises WorkerError where the tree does not start.
    """

    def __init__(self, setting: Setting, tree: Path = ROOT, name: str = "this tree"):
        self.name = name
        arguments = ["-P", str(WORKER), setting.size, setting.dtype, setting.device]
        for option in ("checkpoint", "artifacts"):
            if value := getattr(setting, option):
                path = Path(value)
                arguments += [f"--{option}", str(path.resolve()) if path.exists() else value]  # else a model's name
        # A session of its own: Ctrl-C is for the parent to act on, which closes its workers.
        env = {**os.environ, "PYTHONPATH": str(tree)}
        super().__init__(arguments, cwd=tree, env=env, start_new_session=True)
        try:
            ready = self.answer()["result"]
            if Path(ready["tree"]).resolve() != tree.resolve():
                raise WorkerError(f"{name}: maxwhisper was imported from {ready['tree']}, expected from {tree}")
        except BaseException:
            self.close()
            raise
        self.takes: dict[str, list[str]] = ready["takes"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """Returns what the worker's method `do` returns for the arguments. Raises WorkerError for what it raises."""
        with awake(self.process):
            return super().ask(do, **arguments)["result"]

    def answer(self) -> dict[str, Any]:
        """Returns the next answer. Raises WorkerError for one that is an error, and where the process ends."""
        try:
            return super().answer()
        except EngineError as error:
            raise WorkerError(f"{self.name}: {error}") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
