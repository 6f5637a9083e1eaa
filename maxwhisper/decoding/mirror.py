"""Arrays on a device beside the same on the CPU, where one copy takes all of them there, and one back."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod

import torch
from max.driver import CPU, Buffer, Device
from max.dtype import DType
from torch import Tensor

from ..engine.program import buffer
from ..engine.session import TORCH_DTYPE

ALIGNMENT = 256
"""Bytes of which every array begins at a multiple, as one that is allocated alone."""

Shapes = Mapping[str, tuple[DType, Sequence[int]]]


class Mirror:
    """Arrays by name: those that are given to a device, those that it changes, and those that it finds.

    here: the first two kinds on the CPU, to be filled in. there: all on the device, in the same memory as long as this
    lives. All hold 0 at first.
    """

    def __init__(self, given: Shapes, changed: Shapes, found: Shapes, device: Device):
        """Makes room for arrays of some dtypes and shapes."""
        arrays = {**given, **changed, **found}
        sizes = [prod(shape) * dtype.size_in_bytes for dtype, shape in arrays.values()]
        starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        self.arrays, self.starts = arrays, dict(zip(arrays, starts, strict=False))
        self.first_back, self.end_there = starts[len(given)], starts[len(given) + len(changed)]
        self.memory = torch.zeros(starts[-1], dtype=torch.uint8, device="cpu")
        self.device_memory = Buffer(DType.uint8, [starts[-1]], device)
        self.device_memory.inplace_copy_from(buffer(self.memory))
        self.here = {name: self._tensor(name, self.memory) for name in (*given, *changed)}
        self.there = {name: self._buffer(name) for name in arrays}

    def put(self) -> None:
        """Copies what is `here` to the device."""
        self.device_memory[: self.end_there].inplace_copy_from(buffer(self.memory[: self.end_there]))
        if self.device_memory.device.is_host:  # which, unlike a GPU, may execute a graph before it has copied
            self.device_memory.device.synchronize()

    def get(self) -> dict[str, Tensor]:
        """Returns what the device has changed and found, once it has done so."""
        back = torch.from_dlpack(self.device_memory[self.first_back :].to(CPU())).clone()
        names = [name for name, start in self.starts.items() if start >= self.first_back]
        return {name: self._tensor(name, back, self.first_back) for name in names}

    def _tensor(self, name: str, memory: Tensor, first: int = 0) -> Tensor:
        dtype, shape = self.arrays[name]
        start = self.starts[name] - first
        return memory[start : start + prod(shape) * dtype.size_in_bytes].view(TORCH_DTYPE[dtype]).view(*shape)

    def _buffer(self, name: str) -> Buffer:
        dtype, shape = self.arrays[name]
        start = self.starts[name]
        return self.device_memory[start : start + prod(shape) * dtype.size_in_bytes].view(dtype, shape)
