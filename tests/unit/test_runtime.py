"""What runs in a process beside its graphs."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from max.dtype import DType
from max.graph import DeviceRef, TensorType

from maxwhisper.engine.program import Artifact, Executable, Program
from maxwhisper.engine.surroundings import PR_GET_TIMERSLACK, long_timer_slack, one_torch_thread
from maxwhisper.network.model import GELU
from maxwhisper.whisper import Whisper, load_model
from reference.fixtures import NANO

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="timer slack is Linux's")
TASKS = Path("/proc/self/task")


def wakeups() -> dict[str, int]:
    """Returns how often each thread of this process has waited and gone on."""
    found = {}
    for task in TASKS.iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # of a thread that has ended since
            [line] = [line for line in (task / "status").read_text().splitlines() if line.startswith("voluntary")]
            found[task.name] = int(line.split()[1])
    return found


@on_linux
def test_no_thread_wakes_all_the_time_once_a_graph_has_run() -> None:
    inputs = {"x": TensorType(DType.float32, ["n"], DeviceRef.CPU())}
    program = Program("gelu", "", GELU(), lambda gelu, x: [gelu(x)], inputs)
    Artifact("gelu", [program], "cpu").init({})["gelu"](x=torch.ones(3))
    before = wakeups()
    time.sleep(0.5)
    after = wakeups()
    busiest = max(after[name] - before.get(name, 0) for name in after)
    assert busiest < 250, f"a thread woke {busiest} times in half a second"  # MAX's logger asks for 5,000


def test_a_graph_takes_its_inputs_by_name_alone() -> None:
    graph: Any = Executable("encoder", Mock(), {}, ["mel"], Mock())
    with pytest.raises(TypeError, match=r"encoder: inputs missing: \['mel'\], not known: \['x'\]"):
        graph(x=torch.ones(3))
    with pytest.raises(TypeError, match="positional"):
        graph(torch.ones(3))


def timer_slack() -> int:
    """Returns the timer slack of the calling thread, in nanoseconds."""
    return ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK)


@on_linux
def test_timer_slack_is_inherited_and_given_back() -> None:
    before = timer_slack()
    with long_timer_slack(0.25), ThreadPoolExecutor(1) as pool:
        assert pool.submit(timer_slack).result() == timer_slack() == 250_000_000
    assert timer_slack() == before < 250_000_000


@pytest.fixture
def two_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_torch_threads")
def test_pytorch_has_its_threads_back() -> None:
    with pytest.raises(ZeroDivisionError), one_torch_thread():
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(one_torch_thread().__enter__).result()
        _ = 1 / 0
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


@pytest.mark.usefixtures("two_torch_threads")
@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.encoder(torch.zeros(1, 80, 3000)),
        lambda model: model.decode(torch.zeros(80, 3000), language="en", sample_len=2, fp16=False),
        lambda model: model.transcribe(np.zeros(16000, np.float32), language="en", sample_len=2),
    ],
    ids=["encoder", "decode", "transcribe"],
)
def test_no_thread_of_pytorch_waits_while_a_graph_runs(
    use: Callable[[Whisper], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, call = [], Executable.__call__

    def counted(self: Executable, **inputs: torch.Tensor) -> list[torch.Tensor]:
        seen.append(torch.get_num_threads())
        return call(self, **inputs)

    model = load_model(NANO)
    monkeypatch.setattr(Executable, "__call__", counted)
    use(model)
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
