"""How long a step may take, and that it takes no longer."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE = 10.0
"""Seconds, at most a quarter of its limit, that a command has to write what it has found, once it is interrupted."""
PATIENCE = 5.0
"""Seconds that processes have to end once they are killed."""
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2)."""


def share(left: float, weights: Sequence[float], least: float) -> float | None:
    """Returns the seconds that the first of some steps may take of those left: its share by weight, at least `least`.

    None where there are not as many left. What a step does not use is there for all behind it.
    """
    if left < least:
        return None
    return max(least, left * weights[0] / sum(weights))


def run(
    command: Sequence[str], limit: float, log: Path, env: Mapping[str, str], cwd: Path, output: Path | None = None
) -> int | None:
    """Returns the status of a command, below 0 for a signal, or None where it had to be ended at its limit of seconds.

    Shortly before that it is interrupted, as by Ctrl-C, so that it may write what it has. No process that it has
    started is left. log: a file that gets what it prints, but for what goes into `output`. Call `adopt_orphans` before.
    """
    grace = min(GRACE, limit / 4)
    with open(log, "ab") as printed, open(output or os.devnull, "ab") as into:
        printed.write(f"$ {' '.join(command)}\n".encode())
        printed.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=into if output else printed,
                stderr=printed,
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            printed.write(f"{command[0]}: cannot be started: {error.strerror}\n".encode())
            return 127
        status: int | None = None
        try:
            status = process.wait(limit - grace)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            end(process)
        for file in (printed, into):
            file.flush()
            with suppress(OSError):  # of the null device
                os.fsync(file.fileno())
    return status


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command, its process group, and what it has left behind in other groups and sessions.

    What does not end by SIGKILL, as in a driver that hangs, is given up after PATIENCE.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        process.poll()
        if not (left := children()):  # the children of those that have ended are among them
            return
        for child in left:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)


def adopt_orphans() -> None:
    """Has processes become this one's children when their parent ends, so that `end` finds them.

    From here on Ctrl-C is not ignored, as where a shell has started this in the background: commands inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """Returns the ids of this process's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it may have ended
                # pid (name, which may hold anything) state parent
                parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                if int(parent) == os.getpid():
                    found.append(int(entry.name))
    return found
