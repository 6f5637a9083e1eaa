"""Another process compiles what this one needs next: MAX 26.7 compiles on little more than one core of a process."""

import atexit
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..children import python_path
from .process import announced

log = logging.getLogger("maxwhisper")

IDLE = "--idle"
"""Has a process `give_way`."""
OOM_SCORE = Path("/proc/self/oom_score_adj")
"""Where a process of Linux says how readily it is ended when memory runs out, up to 1000."""
MEMORY = 2**32
"""Bytes that must be free: a process that compiles takes up to half of that."""

MEMINFO = Path("/proc/meminfo")
"""Where Linux tells how much memory there is."""

CONTAINER = Path("/sys/fs/cgroup")
"""Where Linux tells the processes of a container its limits (cgroup v2)."""


class Precompiler:
    """Another process, once it is started: a module that does some jobs in their order, and prints each when it is
    done."""

    def __init__(self, module: str, jobs: Sequence[str], *options: str):
        self.jobs = list(jobs)
        self.command = ["-P", "-m", module, *jobs, *options]
        self.process: subprocess.Popen[str] | None = None
        self.done: set[str] = set()

    def start(self) -> None:
        """Starts it, unless it has been, there are no jobs, only one core, or too little memory, or the system lets no
        process start: then whoever asks does the jobs."""
        if self.process or not self.jobs or not has_room():
            return
        with suppress(OSError):
            self.process = started(self.command, stdout=subprocess.PIPE)
            atexit.register(self.stop)

    def wait(self, job: str, name: str) -> None:
        """Waits until the job is done, if it is one of those and the process has been started; should that fail,
        whoever asked does the job. name: what a person calls it."""
        if self.process is None or job not in self.jobs:
            return
        assert self.process.stdout is not None
        with announced(f"compiling {name} in another process: minutes the first time"):
            while job not in self.done and (line := self.process.stdout.readline()):
                self.done.add(line.strip())

    def stop(self) -> None:
        """Ends it, with what it has not done."""
        if self.process:
            self.process.terminate()
            self.process.wait()


def started(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Starts Python with arguments, in which it finds modules as this process does, whatever folder it is in. Raises
    OSError if the system lets no process start."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environ = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.Popen([sys.executable, *command], env=environ, text=True, **{**streams, **options})


def has_room() -> bool:
    """Tells whether a process can compile beside this one."""
    return has_python() and cores() > 1 and free_memory() >= MEMORY


def has_python() -> bool:
    """Tells whether `sys.executable` is Python: of a frozen program, or a server that embeds Python, it is itself."""
    return Path(sys.executable or "").name.lower().startswith("python") and not getattr(sys, "frozen", False)


def cores() -> int:
    """Returns how many cores this process may use."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota := limit("cpu.max"):
        return min(found, int(quota[0]) // int(quota[1]))
    return found


def free_memory() -> int:
    """Returns the bytes that can be had, those of files in memory among them, or as many as are wanted where the system
    does not say."""
    try:
        words = MEMINFO.read_text().split()
        free = int(words[words.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        free = MEMORY
    if most := limit("memory.max"):
        taken = limit("memory.stat")  # names and numbers in turn; pages of files can be had again
        return min(free, int(most[0]) - int(dict(zip(taken[::2], taken[1::2], strict=True)).get("anon", 0)))
    return free


def limit(name: str) -> list[str]:
    """Returns the words of a file of this container's limits, none where it sets no limit or is not there."""
    try:
        words = (CONTAINER / name).read_text().split()
    except OSError:
        return []
    return [] if words[:1] == ["max"] else words


@dataclass(frozen=True)
class Job:
    """A unit of a model, to be compiled for the CPU and kept in a cache.

    dims: of the model. storage, compute: dtypes, as in `Policy`. folder: of the cache.
    """

    unit: str
    dims: dict[str, int]
    storage: str
    compute: str
    folder: str

    def __str__(self) -> str:
        return json.dumps(asdict(self))


def give_way() -> None:
    """Has this process take what time no other wants, and be the first to end where memory runs out."""
    os.nice(19)
    with suppress(OSError):
        OOM_SCORE.write_text("1000")


def compile_in_background(jobs: Sequence[Job]) -> None:
    """Has a process do jobs for one cache with what time the machine has left. It goes on after this one has ended.
    Nothing is done where one is at it for this cache already, or where there is no room for it."""
    if not has_room():
        return
    folder = Path(jobs[0].folder)
    with suppress(OSError):  # then the next process is as fast as this one
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "in_background").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child holds it until it ends
            command = ["-P", "-m", "maxwhisper.precompile", IDLE, *map(str, jobs)]
            child = started(command, start_new_session=True, pass_fds=[lock.fileno()])
            threading.Thread(target=child.wait, daemon=True).start()  # or it would stay as a zombie
            log.info("graphs of the package are used; another process compiles this CPU's own, for about two minutes")
