"""What executing a graph leaves running in a process."""

import ctypes
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from max.dtype import DType
from max.graph import DeviceRef, TensorType

from maxwhisper.model import GELU
from maxwhisper.runtime import PR_GET_TIMERSLACK, Artifact, Program, long_timer_slack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")
TASKS = Path("/proc/self/task")


def wakeups() -> dict[str, int]:
    """How often each thread of this process has waited and gone on."""
    lines = {task.name: (task / "status").read_text().splitlines() for task in TASKS.iterdir()}
    return {name: int(line.split()[1]) for name in lines for line in lines[name] if line.startswith("voluntary")}


def test_no_thread_wakes_all_the_time_once_a_graph_has_run() -> None:
    inputs = {"x": TensorType(DType.float32, ["n"], DeviceRef.CPU())}
    program = Program("gelu", "", GELU(), lambda gelu, x: [gelu(x)], inputs)
    Artifact("gelu", [program], "cpu").init({})["gelu"](torch.ones(3))
    before = wakeups()
    time.sleep(0.5)
    after = wakeups()
    busiest = max(after[name] - before.get(name, 0) for name in after)
    assert busiest < 250, f"a thread woke {busiest} times in half a second"  # MAX's logger asks for 5,000


def timer_slack() -> int:
    """That of the calling thread, in nanoseconds."""
    return ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK)


def test_timer_slack_is_inherited_and_given_back() -> None:
    before = timer_slack()
    with long_timer_slack(0.25), ThreadPoolExecutor(1) as pool:
        assert pool.submit(timer_slack).result() == timer_slack() == 250_000_000
    assert timer_slack() == before < 250_000_000
