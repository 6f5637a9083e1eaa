"""Seeing inside a graph: every layer's output made an output of the graph as well."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from max.graph import TensorValue
from max.nn.layer import Layer, Module, add_layer_hook, clear_hooks
from whisper.model import ModelDimensions

from maxwhisper.engine.program import Program
from maxwhisper.engine.session import Policy
from maxwhisper.network.blocks import Block
from maxwhisper.network.model import ResidualAttentionBlock

WITH_INTERMEDIATES = ("encoder", "decoder.prefill", "decoder.step")
"""Blocks that are compiled with their intermediates too."""
SUMS = {"encoder.blocks.0": "encoder.stem", "decoder.blocks.0": "decoder.embedding"}
"""Values that are no submodule's output: what goes into these submodules is found under these names."""


@contextmanager
def layer_outputs(module: Module, path: str) -> Iterator[dict[str, TensorValue]]:
    """Puts every layer's output into the dictionary that it yields, by its PyTorch name, as the graph is built while
    this is open; `path` is the module's own name, whose output is the graph's already."""
    names = {id(layer): f"{path}.{prefix}".rstrip(".") for prefix, layer in module.named_modules()}
    found: dict[str, TensorValue] = {}

    def hook(layer: Layer, inputs: tuple[Any, ...], keywords: dict[str, Any], outputs: Any) -> None:
        name = names[id(layer)]
        if name == path:
            return
        if name in SUMS:
            found[SUMS[name]] = inputs[0]
        found[name] = outputs[0] if isinstance(outputs, tuple | list) else outputs

    kernel_outputs = ResidualAttentionBlock.kernel_outputs

    def outputs_seen(block: ResidualAttentionBlock, x: TensorValue, *others: Any) -> Any:
        # A block's kernel calls no submodule, but puts out what each of them computes.
        y, outputs = kernel_outputs(block, x, *others)
        for layer, value in [*outputs.items(), (block, y)]:
            hook(layer, (x,), {}, value)
        return y, outputs

    add_layer_hook(hook)
    try:
        with patch.object(ResidualAttentionBlock, "kernel_outputs", outputs_seen):
            yield found
    finally:
        clear_hooks()


def with_intermediates(block: Block, dims: ModelDimensions, policy: Policy) -> tuple[Program, list[str]]:
    """Returns the block's program with every layer's output behind its own outputs, and a list that holds those layers'
    names once the program has been traced."""
    program = block.program(dims, policy)
    names: list[str] = []

    def function(module: Module, **inputs: TensorValue) -> Sequence[TensorValue]:
        with layer_outputs(module, block.path) as found:
            outputs = block.function(module, **inputs)
        names[:] = list(found)
        return [*outputs, *found.values()]

    return Program(f"{block.name} with intermediates", program.path, program.module, function, program.inputs), names
