"""What a process has to do with MAX: threads and forks."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from maxwhisper import audio, load_model, log_mel_spectrogram
from maxwhisper.compiled import Network
from maxwhisper.engine.folders import one_at_a_time
from maxwhisper.errors import DeviceError
from maxwhisper.whisper import Whisper
from reference.fixtures import NANO

SILENCE = np.zeros(16000, np.float32)
MEL = torch.zeros(80, 3000)  # PyTorch itself would make it with threads that a child has not


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decoder.alignment", "log_mel"])
def test_what_two_threads_need_is_compiled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(NANO)
    both, calls, load = threading.Barrier(2), [], Network._load
    model.network.executables.pop(name, None)

    def counted(*arguments: object) -> object:
        calls.append(arguments[0])
        return load(*arguments)

    monkeypatch.setattr(Network, "_load", counted)

    def use() -> object:
        both.wait()
        return model.network[name]

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(use) for _ in range(2))
    assert first.result() is second.result() and len(calls) == 1


def test_a_spectrogram_without_a_model_is_compiled_once_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device a program has its tensors on by default, and however many of its threads come at once."""
    waveform, both, calls = torch.rand(16000), threading.Barrier(2), []
    expected, weights = log_mel_spectrogram(waveform), audio.log_mel_weights

    def counted(n_mels: int) -> dict[str, torch.Tensor]:
        calls.append(n_mels)
        return weights(n_mels)

    monkeypatch.setattr(audio, "log_mel_weights", counted)
    audio.compiled_spectrogram.cache_clear()

    def use() -> torch.Tensor:
        both.wait()
        with torch.device("meta"):
            return log_mel_spectrogram(waveform)

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(use) for _ in range(2))
    assert first.result().equal(expected) and second.result().equal(expected) and calls == [80]


@pytest.mark.parametrize(("what", "waits"), [("this", True), ("something else", False)])
def test_processes_do_the_same_one_after_the_other(what: str, waits: bool) -> None:
    """They lock files, which threads of one process do too if each opens its own."""
    entered = threading.Event()

    def enter() -> None:
        with one_at_a_time(what):
            entered.set()

    with ThreadPoolExecutor(1) as pool, one_at_a_time("this"):
        done = pool.submit(enter)
        assert entered.wait(0.2 if waits else 10) != waits
    assert entered.is_set() and done.result() is None


# ---- children ----------------------------------------------------------------------------------------------------


def test_children_have_the_environment_of_their_parent() -> None:
    """MAX sets some for those that are given none: by PYTHONEXECUTABLE they took another Python for their own."""
    load_model(NANO).transcribe(SILENCE, language="en")
    program = "import json, os, sys; print(json.dumps([sys.executable, sys.prefix, dict(os.environ)]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    executable, prefix, environment = json.loads(done.stdout)
    assert (executable, prefix) == (sys.executable, sys.prefix)
    ours = ("PYTHON", "MOJO", "MODULAR")
    of = lambda names: {name: value for name, value in names.items() if name.startswith(ours)}  # noqa: E731
    assert of(environment) == of(os.environ)


# ---- forks ---------------------------------------------------------------------------------------------------------


def in_child(use: Callable[[], object], seconds: float = 20) -> str:
    """Returns what a forked child says of a use: the message of its DeviceError."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            use()
            message = "no error"
        except DeviceError as error:
            message = str(error)
        except BaseException as error:
            message = repr(error)
        os.write(writing, message.encode())
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], seconds)
    message = os.read(reading, 4096).decode() if ready else "it hangs"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return message


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.transcribe(SILENCE, language="en"),
        lambda model: model.decode(MEL, language="en", fp16=False),
        lambda model: model.encoder(MEL[None]),
        lambda model: list(model.transcribe_many([SILENCE, SILENCE], 2))[0][1],
        lambda model: load_model(NANO),
        lambda model: log_mel_spectrogram(np.zeros(4_800_000, np.float32)),
    ],
    ids=["transcribe", "decode", "encoder", "transcribe_many", "load_model", "log_mel_spectrogram"],
)
def test_a_forked_process_says_what_to_do(use: Callable[[Whisper], object]) -> None:
    model = load_model(NANO)
    model.transcribe(SILENCE, language="en")

    def used() -> None:
        if isinstance(result := use(model), Exception):
            raise result

    message = in_child(used)
    assert "was forked from one" in message and "load the model after the fork" in message and "'spawn'" in message


LOAD_AFTER_FORK = """
import os, sys, threading, time
import maxwhisper

if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(maxwhisper.load_model(sys.argv[1]).transcribe(sys.argv[2])["text"], flush=True)

from max.dtype import DType
from max.graph import DeviceRef, TensorType
from maxwhisper.engine.program import Artifact, Program
from maxwhisper.network.model import GELU

inputs = {"x": TensorType(DType.float32, ["n"], DeviceRef.CPU())}
Artifact("gelu", [Program("gelu", "", GELU(), lambda gelu, x: [gelu(x)], inputs)], "cpu")
threading.Thread(target=lambda: time.sleep(0.05) or os.write(1, b"has run"), daemon=True).start()
"""


@pytest.fixture(scope="module")
def forked() -> "subprocess.CompletedProcess[str]":
    """Returns what a forked process says, which transcribes, then compiles a graph, and ends."""
    command = [sys.executable, "-c", LOAD_AFTER_FORK, NANO, NANO.parent / "clips" / "english-1.wav"]
    return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)


def test_a_model_can_be_loaded_after_a_fork(forked: "subprocess.CompletedProcess[str]") -> None:
    assert forked.stdout.startswith(" Where is the young doctor"), forked.stderr


def test_a_thread_that_needs_python_when_the_process_ends_has_it_after_a_compilation(
    forked: "subprocess.CompletedProcess[str]",
) -> None:
    """One of MAX's does, or the process is aborted; here one of Python's, for MAX's is not so late every time."""
    assert forked.returncode == 0 and forked.stdout.endswith("has run"), forked.stderr
