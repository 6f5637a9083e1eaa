"""What a block has to do at least: floating-point operations and bytes to move, counted on its PyTorch twin.

Operations are those of matrix products, convolutions and attention, as PyTorch's FlopCounterMode counts them; a Fourier
transform, norms and other elementwise work are not among them. Bytes are those of inputs, outputs and weights, each
once: of a weight as many elements as any one operation reads, so of an embedding table the rows that are looked up.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from whisper.model import Whisper, disable_sdpa

from maxwhisper.network.blocks import BLOCKS

from ..blocks import TWINS
from ..inputs import moved
from ..judge import Comparison
from ..suite import Suite


@dataclass(frozen=True)
class Cost:
    """The work of a block. flops: floating-point operations. n_bytes: bytes of inputs, outputs and weights."""

    flops: int
    n_bytes: int


class WeightsRead(TorchDispatchMode):
    """Counts, while this is open, how many elements of each weight of a model an operation reads at most."""

    def __init__(self, model: Whisper):
        super().__init__()
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in model.state_dict().items()}
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and (name := self.names.get(tensor.untyped_storage().data_ptr())):
                    read = (
                        min(out.numel(), tensor.numel()) if func is torch.ops.aten.embedding.default else tensor.numel()
                    )
                    self.elements[name] = max(self.elements.get(name, 0), read)
        return out


def costs(suite: Suite, comparison: Comparison) -> dict[str, Cost]:
    """Returns what each engine has to do for the block of a comparison on its inputs.

    MAX keeps weights in the suite's storage dtype, PyTorch in float32. Weights that only MAX has, the log-mel
    spectrogram's, are read whole.
    """
    block, layer = BLOCKS[comparison.block], comparison.layer
    inputs = moved(suite.inputs(block, comparison), comparison.torch_device)
    # OpenAI's attention written out, for its products to be counted; the fused one is a single operation.
    with torch.no_grad(), disable_sdpa(), FlopCounterMode(display=False) as flops, WeightsRead(suite.peer) as weights:
        outputs = TWINS[block.name](suite.peer, layer, **inputs)
    activations = sum(x.nbytes for x in (*inputs.values(), *outputs))

    path = block.path.format(audio_layer=layer, text_layer=layer)
    stored = block.program(suite.dims, suite.policy).module.raw_state_dict()
    ours = 0
    for name, weight in stored.items():
        full, whole = f"{path}.{name}", prod(int(dim) for dim in weight.shape)
        n_element = weights.elements.get(full, 0) if full in suite.model.tensors else whole
        ours += n_element * weight.dtype.size_in_bytes
    parameters = suite.peer.state_dict()
    theirs = sum(n_element * parameters[name].element_size() for name, n_element in weights.elements.items())
    total = flops.get_total_flops()
    return {"MAX": Cost(total, activations + ours), "PyTorch": Cost(total, activations + theirs)}
