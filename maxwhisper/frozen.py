"""openai-whisper's modules with the tensors that MAX has read as their parameters.

MAX has read them once. Who changes them, trains them or moves them is told so, here, instead of transcribing with what
they were.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .compiled import Network
from .errors import DeviceError, OptionError
from .hooks import has_hooks

log = logging.getLogger("maxwhisper")


class Unfilled(TorchFunctionMode):
    """Has modules made without values: to fill tensors of no memory, PyTorch would first import its compiler, which
    takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, torch.Tensor.normal_, torch.Tensor.triu_):
            return next(iter((*args, *kwargs.values())))
        return func(*args, **kwargs | ({"device": "cpu"} if func is torch.arange else {}))  # of which sines are made


@contextmanager
def without_memory() -> Iterator[None]:
    """Has modules that are made meanwhile have parameters of a shape alone."""
    with torch.device("meta"), Unfilled():
        yield


class Member(NamedTuple):
    """A tensor or a module as it was when MAX read the weights."""

    owner: nn.Module
    members: Mapping[str, Any]
    name: str
    value: torch.Tensor | nn.Module
    state: tuple[int, ...]


def state_of(value: torch.Tensor | nn.Module) -> tuple[int, ...]:
    """Returns what differs once a tensor has been written to, or has other memory."""
    if isinstance(value, nn.Module):
        return ()
    return 0 if value.is_inference() else value._version, value.data_ptr()


@cache
def in_pytorch(reason: str) -> None:
    """Says so once per reason."""
    log.warning("computed in PyTorch, not on MAX, and slower: %s", reason)


class Frozen(nn.Module):
    """A module whose weights stay as MAX has read them, and where it has read them."""

    network: Network
    members: Sequence[Member] = ()
    _device: torch.device

    @property
    def device(self) -> torch.device:
        """Says where its inputs and outputs are."""
        return self._device

    def hold(self, network: Network, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Takes these, in the names of its state dict, as parameters, in the memory that they are in."""
        self.network, self._device = network, device
        super().requires_grad_(False)
        super().load_state_dict(tensors, assign=True)
        self.inside = [module for module in self.modules() if module is not self]
        self.members = [
            Member(module, members, name, value, state_of(value))
            for module in self.modules()
            for members in (module._parameters, module._modules, module._buffers)
            for name, value in members.items()
            if value is not None
        ]

    def check_unchanged(self) -> None:
        """Raises OptionError if a weight, or a module inside, is not what MAX has read, or if weights are trained."""
        trained = torch.is_grad_enabled()
        for owner, members, name, value, state in self.members:
            if members.get(name) is not value or state and state_of(value) != state:
                raise OptionError(f"{self._path(owner, name)} was changed after loading; {READ_ONCE}")
            if trained and state and value.requires_grad:
                raise OptionError(f"{self._path(owner, name)} requires a gradient; {NO_TRAINING}")

    def _path(self, owner: nn.Module, name: str) -> str:
        path = next(path for path, module in self.named_modules() if module is owner)
        return f"{path}.{name}" if path else name

    def hooked(self) -> list[nn.Module]:
        """Returns the modules inside that have hooks, which MAX calls no more than the modules themselves."""
        return [module for module in self.inside if has_hooks(module)]

    def why_pytorch(self, x: torch.Tensor) -> str | None:
        """Says what only PyTorch can do with an input x, as it would be said to a user."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return "its operations are traced"
        if x.requires_grad and torch.is_grad_enabled():
            return "gradients are wanted"
        return HOOKS if self.hooked() else None

    def pytorch(self, reason: str) -> None:
        """Announces openai-whisper's own code; raises DeviceError where the weights are not on the device."""
        if self.device.type != "cpu":
            raise DeviceError(f"{reason}: only on the CPU, by load_model(..., device='cpu'); this model is on a GPU")
        in_pytorch(reason)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises OptionError: MAX would not read the new tensors."""
        raise OptionError(f"load_state_dict: {READ_ONCE}")

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Leaves the parameters as they are, which need no gradient; raises OptionError if they are to."""
        if requires_grad:
            raise OptionError(f"requires_grad_: {NO_TRAINING}")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Does what `to`, `half`, `float`, `cuda` and the like come to: nothing, if the model is there already."""
        now = torch.empty(0, dtype=self.network.dtype, device=self.device)
        try:
            then = fn(now)
        except (AssertionError, RuntimeError) as error:  # as PyTorch says that there is no such device
            raise DeviceError(f"{self._stays()}: {str(error).splitlines()[0]}") from error
        if then.device != now.device:
            raise DeviceError(f"{self._stays()}, not on {then.device}")
        if then.dtype != now.dtype:
            raise OptionError(
                f"arithmetic stays in {dtype_name(now)}, not {dtype_name(then)}: load_model(..., dtype='float32' or"
                " 'float16' or 'bfloat16')"
            )
        return self

    def _stays(self) -> str:
        return f"the model stays on {self.device.type}, where load_model(..., device=...) has put it"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Makes a model of its own, but for what nobody may change: the graphs and the weights."""
        self.check_unchanged()
        memo |= {id(member.value): member.value for member in self.members if member.state}
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __copy__(self) -> Any:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__} cannot be pickled by itself: pickle the model that it is part of")


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


HOOKS = "modules inside have hooks"
READ_ONCE = (
    "MAX has read the weights once: save {'dims': vars(model.dims), 'model_state_dict': ...} with torch.save,"
    " and give that file to load_model"
)
NO_TRAINING = "MAX does not train: fine-tune whisper.load_model(...), and give its checkpoint to load_model"
