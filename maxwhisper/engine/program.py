"""Devices, precision, and graphs that compile once and are initialised once per layer.

Compiling is the expensive step of MAX (minutes for a network, the first time), initialising with weights the cheap one
(a tenth of a second). Most of a compilation does not depend on how many graphs it holds, so graphs that are used
together compile together, into one artifact. MAX keeps artifacts in its compile cache, under ``~/.cache/modular``
unless ``MODULAR_CACHE_DIR`` says otherwise; to find one there it needs the graphs, which `artifacts.Cache` does not.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from max.driver import Buffer
from max.dtype import DType
from max.engine import CompiledModel, Model
from max.graph import BufferType, Graph, TensorType, TensorValue, Value
from max.graph import Module as GraphModule
from max.nn.layer import Module

from ..errors import CheckpointError
from .folders import one_at_a_time
from .kernel_library import kernel_library
from .process import announced, compiler, refuse_after_fork, wait_at_exit
from .session import TORCH_DTYPE, Session, session
from .surroundings import long_timer_slack

log = logging.getLogger("maxwhisper.compiled")


@dataclass(frozen=True)
class Program:
    """One graph to compile: `function` called on `module`, and by their names on one value per entry of `inputs`.

    Each weight carries its name in the checkpoint: `path`, a dot, and its name in the module. Where the program stands
    for any layer, `path` has a placeholder for its number in braces.
    """

    name: str
    path: str
    module: Module
    function: Callable[..., Sequence[TensorValue]]
    inputs: Mapping[str, TensorType | BufferType]

    def trace(self, into: GraphModule) -> dict[str, DType]:
        """Adds the graph to `into` and returns its weights, by name."""
        path = f"{self.path}." if self.path else ""
        weights = {path + name: weight for name, weight in self.module.raw_state_dict().items()}
        dtypes = {name: weight.dtype for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.name = name
            vars(weight).pop("_mlir_value", None)  # MAX would take that of an earlier graph
        types = list(self.inputs.values())
        with Graph(self.name, input_types=types, module=into, kernel_library=kernel_library()) as graph:
            values = map(tensor_or_buffer, graph.inputs)
            graph.output(*self.function(self.module, **dict(zip(self.inputs, values, strict=True))))
        return dtypes


def signature(program: Program) -> list[Any]:
    """Returns what tells a graph apart from most others."""
    return [program.name, *((name, str(type)) for name, type in program.inputs.items())]


def tensor_or_buffer(value: Value[Any]) -> Any:
    """Returns an input of a graph as a tensor, or one that it may write into as a buffer."""
    return value.buffer if isinstance(value.type, BufferType) else value.tensor


def buffer(tensor: torch.Tensor | Buffer) -> Buffer:
    """Returns the tensor as MAX takes it: in the same memory if that is contiguous."""
    if isinstance(tensor, Buffer):
        return tensor
    return Buffer.from_dlpack((tensor.detach() if tensor.requires_grad else tensor).contiguous())


@dataclass(frozen=True)
class Executable:
    """A graph with its weights, called on torch tensors and returning torch tensors that share MAX's memory."""

    name: str
    model: Model
    weights: Mapping[str, torch.Tensor]  # MAX reads them in place, so they must live as long as the model
    inputs: Sequence[str]
    session: Session

    def __call__(self, **inputs: torch.Tensor | Buffer) -> list[torch.Tensor]:
        """Computes the outputs from all inputs, by their names.

        Raises TypeError where some are missing or not known, DeviceError in a forked process.
        """
        # MAX would convert tensors itself, but checks each against a protocol first, which a decoder's step feels.
        return [torch.from_dlpack(output) for output in self.execute(*map(buffer, self.in_order(inputs)))]

    def in_order(self, named: Mapping[str, Any]) -> list[Any]:
        """Returns inputs that are given by name as the graph takes them; raises TypeError as a call."""
        if named.keys() != set(self.inputs):
            missing, unknown = sorted(set(self.inputs) - named.keys()), sorted(named.keys() - set(self.inputs))
            raise TypeError(f"{self.name}: inputs missing: {missing}, not known: {unknown}")
        return [named[name] for name in self.inputs]

    def execute(self, *inputs: Buffer) -> list[Buffer]:
        """Computes on MAX's own buffers; a GPU may go on afterwards. Raises DeviceError in a forked process.

        inputs: as `in_order` gives them, once for the many executions of a loop on the same memory.
        """
        refuse_after_fork()
        if self.session.has_executed:
            with self.session.launching:
                return self.model.execute(*inputs)
        with long_timer_slack():
            outputs = self.model.execute(*inputs)
        self.session.has_executed = True
        return outputs


@dataclass(frozen=True)
class Stored:
    """Programs compiled, now or earlier, and the weights they take."""

    compiled: CompiledModel
    weights: dict[str, DType]


Loader = Callable[[Sequence[Program], Callable[[], Stored]], Stored]
"""From programs, and a function that compiles them, to the programs compiled."""


class Artifact:
    """Graphs compiled together, to be initialised with the weights of any layer."""

    def __init__(
        self,
        name: str,
        programs: Iterable[Program],
        device: str,
        load: Loader | None = None,
        slow: Callable[[], None] | None = None,
    ):
        """Compiles the programs, or takes what `load` gives, as they were compiled earlier. slow: is called if
        compiling takes seconds."""
        programs = list(programs)
        self.name = name
        self.slow = slow
        self.graphs = {program.name: list(program.inputs) for program in programs}
        compile_them = partial(self._compile, programs)
        with compiler():
            self.session = session(device)
            self.stored = load(programs, compile_them) if load else compile_them()

    def _compile(self, programs: Sequence[Program]) -> Stored:
        module, weights = GraphModule(), {}
        for program in programs:
            weights.update(program.trace(module))
        count, start = len(self.graphs), time.perf_counter()
        message = f"compiling {self.name}: {count} graphs, minutes the first time, seconds from the cache after"
        # Another process that compiles the same leaves it in MAX's cache.
        with announced(message, slow=self.slow), one_at_a_time(repr([*map(signature, programs), weights])):
            compiled = self.session.compile(module, custom_extensions=kernel_library().library_paths())
        log.debug("%s: %d graphs in %.1f s", self.name, count, time.perf_counter() - start)
        wait_at_exit()
        return Stored(compiled, weights)

    def init(self, tensors: Mapping[str, torch.Tensor], **layers: int) -> dict[str, Executable]:
        """Gives every graph of the artifact its weights from `tensors`; `layers` are the numbers for the placeholders.

        Raises CheckpointError for a tensor that is missing, or that the weight's dtype could not hold exactly.
        """
        values = {
            name: weight_value(tensors, name.format(**layers), dtype) for name, dtype in self.stored.weights.items()
        }
        with compiler():
            models = self.session.init_all(self.stored.compiled, weights_registry=values).values()
        # By order, not by name: MAX's cache takes graphs that differ in nothing but their names for the same.
        graphs = zip(self.graphs.items(), models, strict=True)
        return {name: Executable(name, model, values, inputs, self.session) for (name, inputs), model in graphs}


def weight_value(tensors: Mapping[str, torch.Tensor], name: str, dtype: DType) -> torch.Tensor:
    """Returns the tensor called `name`, widened to `dtype`; MAX alone would cast silently, and narrow as readily.

    Raises CheckpointError where it is missing, or would be narrowed.
    """
    if name not in tensors:
        raise CheckpointError(f"tensor {name} is missing")
    tensor, wanted = tensors[name], TORCH_DTYPE[dtype]
    if torch.promote_types(tensor.dtype, wanted) != wanted:
        raise CheckpointError(f"tensor {name} is {tensor.dtype}, which {wanted} does not hold exactly")
    return tensor.to(wanted).contiguous()
