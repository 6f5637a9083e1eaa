"""Devices, precision, and the sessions that compile for them."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from max.driver import CPU, Accelerator, Device, accelerator_count, is_virtual_device_mode, set_virtual_cpu_target
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef

from ..errors import DeviceError, OptionError
from ..names import GPU
from .cuda import preload
from .instructions import virtual_cpu
from .process import find_place_for_max_cache, refuse_after_fork

TORCH_DTYPE: dict[DType, torch.dtype] = {
    DType[name]: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int64", "int8", "uint8", "bool")
}


@dataclass(frozen=True)
class Policy:
    """Where the network runs and in what precision.

    device: the MAX device of weights and arithmetic.
    storage: dtype in which matrices stay in memory; OpenAI's checkpoints are float16, which float32 holds exactly.
    compute: dtype of activations and of arithmetic.

    Vectors (biases, layer norms) and positional tables are stored in float32 under every policy, and layer norm and
    softmax compute in float32, as OpenAI's model does at any precision.
    """

    device: DeviceRef
    storage: DType
    compute: DType

    @property
    def own_kernels(self) -> bool:
        """Tells whether kernels of our own compute, as on a CPU, or else MAX's."""
        return self.device.is_cpu()


def find_device(name: str) -> Device:
    """Returns the MAX device called "cpu", or one of the names in GPU.

    Raises DeviceError when there is no such device, or as `refuse_after_fork` does, OptionError for any other name.
    """
    refuse_after_fork()
    if name == "cpu":
        return CPU()
    if name not in GPU:
        raise OptionError(f"device '{name}' is not known: expected cpu, {', '.join(GPU[:-1])} or {GPU[-1]}")
    if accelerator_count() == 0:
        raise DeviceError(f"device '{name}' was asked for, but MAX finds no GPU on this machine")
    if not is_virtual_device_mode():
        preload()  # before a graph that opens them
    return Accelerator()


def gpu_found() -> bool:
    """Returns whether MAX and PyTorch both find a GPU, as whole transcripts need."""
    return accelerator_count() > 0 and torch.cuda.is_available()


def device_named(name: str) -> str:
    """Returns "gpu" for each of its names, and for "auto" where there is one, else "cpu"; any other name as it is."""
    if name == "auto":
        return "gpu" if gpu_found() else "cpu"
    return "gpu" if name in GPU else name


class Session(InferenceSession):
    """MAX's session of a device.

    has_executed: whether it has executed a graph. MAX 26.7 starts a thread that logs with the first of a process.
    launching: held by the thread that has a GPU compute: what another launched while it captures would be captured too.
    """

    has_executed = False

    def __init__(self, devices: Sequence[Device]):
        """Compiles for and executes on these devices."""
        super().__init__(devices=list(devices))
        on_cpu = all(device.is_host for device in devices)
        self.launching: AbstractContextManager[Any] = nullcontext() if on_cpu else threading.Lock()


@cache
def session(device: str) -> Session:
    """Returns the one session of a device; it compiles for the CPU that the environment names, or for this one."""
    find_place_for_max_cache()
    if target := virtual_cpu():
        set_virtual_cpu_target(target)
    return Session(devices=[find_device(device)])
