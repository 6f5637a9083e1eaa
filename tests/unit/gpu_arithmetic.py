"""The arithmetic of kernels for GPUs, right and wrong, by PyTorch on a CPU: what the judge says of it needs no GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, pad
from whisper.model import MultiHeadAttention, Whisper

from reference.blocks import join_heads, split_heads
from reference.tf32 import operand

LOG2E = 1 / math.log(2)
TERMS = 8
"""Products that a tensor core adds to a sum at a time."""

Product = Callable[[Tensor, Tensor], Tensor]
"""Of matrices of float32, to one of float32."""


def float32(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def one_after_another(a: Tensor, b: Tensor) -> Tensor:
    """Computes each sum by one thread, which adds up its terms in order."""
    total = torch.zeros(*a.shape[:-1], b.shape[-1])
    for i in range(a.shape[-1]):
        total += a[..., i, None] * b[..., i, None, :]
    return total


def of_operands(shorten: Callable[[Tensor], Tensor]) -> Product:
    """Returns a product as of tensor cores, whose operands are shortened and whose sums are float32."""
    return lambda a, b: shorten(a) @ shorten(b)


def cut_off(x: Tensor) -> Tensor:
    """Cuts values off to TF32, as the hardware does with float32 that it is handed."""
    return operand(x, "cut off after")


def toward_zero(x: Tensor) -> Tensor:
    """Rounds float64 to float32 as a tensor core leaves a sum."""
    y = x.float()
    return torch.where(y.double().abs() > x.abs(), torch.nextafter(y, torch.zeros_like(y)), y)


def of_parts(promoted: int | None) -> Product:
    """Returns a product of three, of two TF32 parts of each operand, added up in the same sums, which go into sums that
    round every `promoted` terms, or never."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        (a, a_rest), (b, b_rest) = ((operand(x, "rounded to"), x - operand(x, "rounded to")) for x in (a, b))
        pairs = ((a_rest, b), (a, b_rest), (a, b))
        total = torch.zeros(*a.shape[:-1], b.shape[-1])
        sums = torch.zeros_like(total)
        for i in range(0, a.shape[-1], TERMS):
            for x, y in pairs:
                sums = toward_zero(sums.double() + x[..., i : i + TERMS].double() @ y[..., i : i + TERMS, :].double())
            if promoted and (i + TERMS) % promoted == 0:
                total, sums = total + sums, torch.zeros_like(sums)
        return total + sums

    return product


@dataclass(frozen=True)
class Attends:
    """How a kernel attends.

    scores, values: its products of queries with keys, and of probabilities with values.
    part: keys of a part, None for all. power: how the parts are weighed by differences of their maxima, which are in
        exponents of 2. stored: the dtype in which a part's values wait for the others.
    """

    scores: Product = float32
    values: Product = float32
    part: int | None = None
    power: Callable[[Tensor], Tensor] = torch.exp2
    stored: torch.dtype = torch.float32

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from q to k and v, each (batch, head, token, channel), in the dtype of q."""
        scores = self.scores(q.float(), k.float().mT) * (q.shape[-1] ** -0.5 * LOG2E)
        scores = scores if mask is None else scores + mask
        maxima, sums, values = zip(*(self.of_part(*each) for each in self.parts(scores, v.float())), strict=True)
        greatest = torch.stack(maxima).amax(0)
        weights = [total * self.power(maximum - greatest) for maximum, total in zip(maxima, sums, strict=True)]
        joined = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
        return torch.as_tensor(joined).to(q.dtype)

    def parts(self, scores: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        part = self.part or scores.shape[-1]
        return list(zip(scores.split(part, -1), v.split(part, -2), strict=True))

    def of_part(self, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maximum = scores.amax(-1, keepdim=True)
        weights = torch.exp2(scores - maximum)
        total = weights.sum(-1, keepdim=True)
        n_more = -weights.shape[-1] % TERMS  # for products that take so many terms at a time
        values = self.values(pad(weights, (0, n_more)), pad(v, (0, 0, 0, n_more))) / total
        return maximum, total, values.to(self.stored).float()


# ---- blocks --------------------------------------------------------------------------------------------------------


def project(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """Computes a linear layer by products of float32, rounded once, or in bfloat16 before the bias is added too."""
    y = linear(x.float(), layer.weight.to(x.dtype).float())
    if layer.bias is None:
        return y.to(x.dtype)
    return (y.to(x.dtype) + layer.bias.to(x.dtype)) if x.dtype == torch.bfloat16 else (y + layer.bias).to(x.dtype)


def attended(attn: MultiHeadAttention, attends: Attends, x: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    q = project(attn.query, x)
    q = q.reshape(len(k), -1, q.shape[-1])  # texts that share a window stand side by side
    y = join_heads(attends(split_heads(q, attn.n_head), k, v))
    return [project(attn.out, y.reshape(x.shape))]


def attention(model: Whisper, block: str, layer: int, attends: Attends) -> Callable[..., list[Tensor]]:
    """Returns what computes the attention of an encoder's layer, or a decoder's cross-attention."""
    if block == "encoder.attention":
        attn = model.encoder.blocks[layer].attn
        heads = [
            lambda x, project_=each: split_heads(project(project_, x), attn.n_head) for each in (attn.key, attn.value)
        ]
        return lambda x: attended(attn, attends, x, *(of(x) for of in heads))
    attn = model.decoder.blocks[layer].cross_attn
    return lambda x, k_cross, v_cross: attended(attn, attends, x, k_cross, v_cross)


def mlp(model: Whisper, layer: int, product: Product) -> Callable[[Tensor], list[Tensor]]:
    """Returns what computes the MLP of a decoder's layer, in float32."""
    hidden, _, out = model.decoder.blocks[layer].mlp
    of = [lambda x, each=each: product(x, each.weight.T) + each.bias for each in (hidden, out)]
    return lambda x: [of[1](gelu(of[0](x)))]
