"""What the blocks of a model are compared on: every comparison, and the tensors that it gives them."""

from collections.abc import Iterable, Iterator

import torch
from max.dtype import DType
from max.graph import DeviceRef
from torch import Tensor
from whisper.model import ModelDimensions

from maxwhisper.engine.session import TORCH_DTYPE, Policy
from maxwhisper.network.blocks import Block

from . import activations
from .activations import is_step
from .judge import Comparison
from .models import Model


def comparisons(
    block: Block,
    size: str,
    dims: ModelDimensions,
    dtype: torch.dtype,
    kinds: Iterable[str],
    device: str = "cpu",
    seed: int = 0,
) -> Iterator[Comparison]:
    """Yields every layer of a block on every one of `kinds` that means something for it.

    A decoder's step is judged at the end of the text, and on speech and random inputs at its first step too. The
    log-mel spectrogram is float32 whatever the dtype of the network, and on the CPU as openai-whisper's.
    """
    if block.name == "log_mel":
        dtype, device = torch.float32, "cpu"
    policy = Policy(DeviceRef.CPU(), DType.float32, DType.float32)
    meaningful = activations.kinds(block, list(block.inputs(dims, policy)))
    for layer in range(block.n_layer(dims)):
        for kind in kinds:
            if kind not in meaningful:
                continue
            moments = [".first", ".late"] if kind in ("speech", activations.RANDOM) else [".late"]
            for moment in moments if is_step(block) else [""]:
                yield Comparison(size, dtype, block.name, layer, kind + moment, device, seed)


def inputs(block: Block, model: Model, policy: Policy, comparison: Comparison) -> dict[str, Tensor]:
    """Returns the oracle's own inputs of a block, by name, rounded to the dtype under test."""
    types = block.inputs(model.dims, policy)
    kind, _, moment = comparison.inputs.partition(".")
    recorded = model.activations(kind)
    last = recorded.tokens.shape[1] - 1
    position = activations.N_PROMPT if moment == "first" else last
    given = recorded.of(block, list(types), comparison.layer, position)
    given = activations.changed(given, kind, model.dims.n_vocab, comparison.seed)
    return {name: x.to(TORCH_DTYPE[types[name].dtype]) for name, x in given.items()}


def moved(given: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Returns inputs on a device, but for scalars, which graphs take from the CPU."""
    return {name: x.to(device) if x.ndim else x for name, x in given.items()}
