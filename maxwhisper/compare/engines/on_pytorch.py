"""What engines have in common that take and return tensors of PyTorch."""

from typing import Any

import torch

from .base import Engine


class OnPyTorch(Engine):
    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.task.device == "gpu" else "cpu")

    def synchronize(self) -> None:
        if self.task.device == "gpu":
            torch.cuda.synchronize()

    def event(self) -> Any:
        if self.task.device == "cpu":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
