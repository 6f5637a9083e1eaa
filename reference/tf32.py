"""What PyTorch makes of products in TF32, which is float32 with 10 bits of mantissa in the place of 23.

GPUs multiply faster in TF32, so libraries may use it where float32 was asked for, as PyTorch does for convolutions. A
product's operands are then shortened, and its sum is float32. The result errs as much as one of float16, which no
budget of float32 allows. What tells it from other errors is that the oracle errs in the same way when its operands are
shortened. That wears off where products follow on products, for values that differ in their last bits may be rounded
to either side: an encoder, or a layer of it, may go unrecognised where the attention and the MLP inside it do not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

SIGNIFICANT = 11
"""Bits of a TF32 number: those of the mantissa, and the first, which is not stored."""
ROUNDINGS: Mapping[str, Callable[[Tensor], Tensor]] = {"rounded to": torch.round, "cut off after": torch.trunc}
"""How an operand is shortened: by the library that rounds it, or by the hardware, which ignores the last bits."""
PRODUCTS = (conv1d, linear, Tensor.matmul)
"""What is called on two operands by openai-whisper's modules and by their twins, beside attention."""


def name(rounding: str) -> str:
    """Says what a failure looks like."""
    return f"float32 products in TF32, operands {rounding} {SIGNIFICANT - 1} bits of mantissa"


def operand(x: Tensor, rounding: str) -> Tensor:
    """Returns the number of TF32 for each value; the dtype stays."""
    mantissa, exponent = torch.frexp(x)  # of 0.5 to 1
    return torch.ldexp(ROUNDINGS[rounding](mantissa * 2**SIGNIFICANT), exponent - SIGNIFICANT)


class TF32(TorchFunctionMode):
    """Has PyTorch's products take operands in TF32 while this is open, whatever the dtype that they add up in."""

    def __init__(self, rounding: str):
        super().__init__()
        self.rounding = rounding

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        if func in PRODUCTS:
            args = [operand(x, self.rounding) for x in args[:2]] + list(args[2:])
        return func(*args, **(kwargs or {}))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        """Computes attention with its two products written out, the scale behind the first: before it, as OpenAI has it
        without this function, other bits of q and k would be the last ones."""
        q, k, v = (operand(x, self.rounding) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return operand(scores.softmax(-1), self.rounding) @ v
