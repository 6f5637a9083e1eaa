"""What keeps tests from holding cores and memory that they do not use, before PyTorch and MAX are imported."""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def times_nothing(arguments: Sequence[str]) -> bool:
    """Tells whether a command line rules out that benchmarks are timed; where that is not plain to see, they may be.
    Workers of pytest-xdist, which are given another command line, time nothing."""
    folders = [Path(argument.partition("::")[0]).parts[:2] for argument in arguments if argument.startswith("tests")]
    checks = bool(folders) and all(folder in (("tests", "parity"), ("tests", "unit")) for folder in folders)
    return checks or "--benchmark-disable" in arguments or "PYTEST_XDIST_WORKER" in os.environ


def keep_quiet() -> None:
    """Has PyTorch's threads sleep while they wait, and glibc keep memory.

    After an operation these threads keep their cores busy until the next one, so that MAX's threads and PyTorch's own
    stand in each other's way. Told to sleep, they compute the same in several times less processor time. OpenMP reads
    this once, when torch is imported. glibc gives large pieces of memory back as soon as they are freed, and the system
    clears each page that it hands out again.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if sys.platform == "linux":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, 2**31 - 1)


def keep_to_share() -> None:
    """Keeps a worker of pytest-xdist to its share of the cores, where there is one for each worker.

    MAX and PyTorch start a thread for every core that they see. Two workers whose threads wait for one another on the
    same two cores took half as much processor time again as two that have a core each.
    """
    worker = os.getenv("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if not worker or not hasattr(os, "sched_setaffinity"):
        return
    cores, n_worker = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if share := cores[int(worker) :: n_worker]:
        os.sched_setaffinity(0, share)
