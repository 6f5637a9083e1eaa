"""What MAX 26.7 and PyTorch need of a process around them."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30
"""What Linux's prctl is told to do; man 2 prctl."""


@contextmanager
def long_timer_slack(seconds: float = 1.0) -> Iterator[None]:
    """Lets the kernel wake the threads that are started meanwhile by so much later than they ask, on Linux.

    MAX's logger looks for something to write every 100 microseconds for as long as the process lives. Each time it
    takes a core from one of the threads that compute, and the others wait for that one: a sixth of the time of tiny's
    encoder in bfloat16 on two cores. A thread inherits its timer slack from the one that starts it.
    """
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    before = libc.prctl(PR_GET_TIMERSLACK)
    libc.prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(round(seconds * 1e9)))
    try:
        yield
    finally:
        libc.prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(before))


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Has PyTorch put tensors on the CPU where nobody says where, whatever the program has set for the calling thread.

    PyTorch would then look at every call for the default, so this does nothing where it is the CPU already.
    """
    if torch.empty(0).device.type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Has PyTorch compute in the calling thread alone, for operations that are small beside the graphs around them.

    Threads that have helped it wait for more at full load, for milliseconds, on the cores that MAX computes on: tiny's
    encoder took a sixth longer behind a check of its input. OMP_WAIT_POLICY=passive would prevent that, but must be set
    before PyTorch is imported. A Python thread that is started meanwhile keeps the number.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
