"""The worker process of an engine, as the process that compares sees it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..children import python_path
from .engines import Spec, Task

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class EngineError(Exception):
    """An engine failed; the message is one line."""


class RequestProcess:
    """A process of Python that answers requests, each of them and each answer a line of JSON."""

    def __init__(self, arguments: Sequence[str], **options: Any):
        """Starts the process; options are those of `subprocess.Popen`."""
        self.messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed by close()
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
            **options,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer to a request; raises EngineError if it is an error, or the process ends."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Returns the next answer; raises EngineError as `ask`."""
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise EngineError(f"its process ended with status {self.process.wait()}: {self.last_message()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def last_message(self) -> str:
        self.messages.seek(0)
        lines = [line.strip() for line in self.messages if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.messages.close()


class Worker(RequestProcess):
    """The process of an engine; the first request is "load" or "prepare"."""

    def __init__(self, spec: Spec, folder: Path, task: Task):
        self.spec = spec
        arguments = ["-P", "-m", "maxwhisper.compare.worker", spec.name, str(folder), json.dumps(asdict(task))]
        super().__init__(arguments, env=environment(task.threads))
        if task.threads < len(cpus := available_cpus()):
            # Also for engines, MAX among them, that are told no number of threads.
            os.sched_setaffinity(self.process.pid, cpus[: task.threads])


@contextmanager
def awake(process: subprocess.Popen[str]) -> Iterator[None]:
    """Lets a process run, and stops it afterwards where the system can: what an engine's threads do while it is not its
    turn would take time from the engine whose turn it is."""
    if not hasattr(signal, "SIGSTOP"):
        yield
        return
    process.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGSTOP)


def available_cpus() -> list[int]:
    """Returns the CPUs this process may run on; none where the system does not tell, and cannot hold it to some."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def environment(threads: int) -> Mapping[str, str]:
    """Returns what keeps an engine from looking for models on the network, from reporting on its use, and from taking
    more threads than given; with -P it finds the packages of this process, and no file of the folder in their place."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet["CI"] = "true"  # what keeps OpenVINO's converter from reporting
    packages = {"PYTHONPATH": python_path()}
    return {**os.environ, **quiet, **packages, **dict.fromkeys(THREADS, str(threads))}
