"""Wrong models of wrong weights: what a loader or a converter gets wrong."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from whisper.audio import N_FFT, SAMPLE_RATE
from whisper.model import ModelDimensions

from .faults import LAYER, Fault, Tensors, path_of

ENCODER, DECODER = f"encoder.blocks.{LAYER}", f"decoder.blocks.{LAYER}"


def at(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, ModelDimensions], Tensors]:
    """Returns a change of one tensor."""
    return lambda tensors, dims: {name: change(tensors[name])}


def swapped(one: str, other: str) -> Callable[[Tensors, ModelDimensions], Tensors]:
    """Returns a change that swaps two tensors, or all tensors of two modules."""

    def change(tensors: Tensors, dims: ModelDimensions) -> Tensors:
        names = [name for name in tensors if name == one or name.startswith(one + ".")]
        pairs = [(a, b) for a in names if (b := other + a.removeprefix(one)) in tensors]
        return {a: tensors[b] for a, b in pairs} | {b: tensors[a] for a, b in pairs}

    return change


def copied(source: str, destination: str) -> Callable[[Tensors, ModelDimensions], Tensors]:
    """Returns a change that puts all tensors of one module in the place of another's: stale weights."""
    return lambda tensors, dims: {
        destination + name.removeprefix(source): tensor
        for name, tensor in tensors.items()
        if name.startswith(source + ".")
    }


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def heads_exchanged(x: Tensor) -> Tensor:
    """Exchanges the rows of the first head, of (n_state, n_in), with those of the second."""
    return torch.cat([x[64:128], x[:64], x[128:]])


def one_element_off(x: Tensor) -> Tensor:
    """Moves one element by a hundredth of its row's norm."""
    y = x.clone()
    y[7, 11] += x[7].float().norm() / 100
    return y


def rounded_to_8_bits(x: Tensor) -> Tensor:
    step = x.float().abs().max() / 127
    return ((x.float() / step).round() * step).to(x.dtype)


def bits_read_as_bfloat16(x: Tensor) -> Tensor:
    return x.half().view(torch.bfloat16).float().clamp(-65504, 65504).half().to(x.dtype)


def one_row(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def of(x: Tensor) -> Tensor:
        y = x.clone()
        y[5] = change(x[5])
        return y

    return of


def half_window(x: Tensor) -> Tensor:
    """Returns the Fourier basis (row, PIECE, tap) under a symmetric Hann window in the place of the periodic one."""
    windows = (torch.hann_window(N_FFT, periodic=p, dtype=torch.float64) for p in (True, False))
    periodic, symmetric = (window.reshape(-1, x.shape[1]).T for window in windows)
    return torch.where(periodic == 0, 0, x.double() / periodic.clamp(min=1e-300) * symmetric).float()


def without_weights(norm: str) -> Callable[[Tensors, ModelDimensions], Tensors]:
    """Returns a change that leaves a norm without weights: it only normalises."""
    weight, bias = f"{norm}.weight", f"{norm}.bias"
    return lambda tensors, dims: {weight: torch.ones_like(tensors[weight]), bias: zeros(tensors[bias])}


def weight_faults() -> Iterator[Fault]:
    """Yields faults of which each is some lines of what a loader or a converter gets wrong."""

    def fault(name: str, block: str, change: Any, path: str = "", published: bool = False) -> Fault:
        return Fault(name, block, path or path_of(block), change=change, published=published)

    attn, mlp, norm, e = "encoder.attention", "encoder.mlp", "encoder.layer_norm", f"{ENCODER}.attn"
    yield fault("query bias dropped", attn, at(f"{e}.query.bias", zeros))
    yield fault("value bias dropped", attn, at(f"{e}.value.bias", zeros))
    yield fault("out bias dropped", attn, at(f"{e}.out.bias", zeros))
    yield fault("key and value swapped", attn, swapped(f"{e}.key.weight", f"{e}.value.weight"))
    yield fault("query and key swapped", attn, swapped(f"{e}.query.weight", f"{e}.key.weight"))
    yield fault("square weight transposed", attn, at(f"{e}.out.weight", lambda x: x.T.contiguous()))
    yield fault("heads of the query permuted", attn, at(f"{e}.query.weight", heads_exchanged))
    yield fault("heads of out permuted", attn, at(f"{e}.out.weight", lambda x: heads_exchanged(x.T).T.contiguous()))
    yield fault("one element off by 1 % of its row", attn, at(f"{e}.value.weight", one_element_off))
    yield fault("one row's sign", attn, at(f"{e}.value.weight", one_row(torch.neg)))
    yield fault("rounded to bfloat16", attn, at(f"{e}.value.weight", lambda x: x.bfloat16().to(x.dtype)))
    yield fault("rounded to 8 bits", attn, at(f"{e}.value.weight", rounded_to_8_bits))
    yield fault("float16 read as bfloat16", mlp, at(f"{ENCODER}.mlp.2.weight", bits_read_as_bfloat16))
    yield fault("mlp bias dropped", mlp, at(f"{ENCODER}.mlp.0.bias", zeros))
    stale = copied("decoder.blocks.0.mlp", f"{DECODER}.mlp")
    yield fault("stale mlp of another layer", "decoder.mlp.prefill", stale)
    first = "encoder.blocks.0"
    yield fault("encoder layers swapped", "encoder.block", swapped(first, ENCODER), first)
    yield fault("decoder layers swapped", "decoder.block.prefill", swapped(DECODER, "decoder.blocks.2"))
    yield fault("another norm's weights", norm, copied(f"{ENCODER}.mlp_ln", f"{ENCODER}.attn_ln"))
    yield fault("norm's bias dropped", norm, at(f"{ENCODER}.attn_ln.bias", zeros))

    cross, d, c = "decoder.cross_attention", f"{DECODER}.attn", f"{DECODER}.cross_attn"
    causal = at(f"{d}.value.bias", zeros)
    yield fault("causal attention's value bias dropped", "decoder.attention.causal", causal)
    yield fault("cross-attention's weights from self-attention", f"{cross}.prefill", copied(d, c))
    yield fault("cross-attention silent", f"{cross}.prefill", at(f"{c}.out.weight", zeros))
    yield fault("cross-attention's value bias dropped", f"{cross}.keys_values", at(f"{c}.value.bias", zeros))

    stem, conv, embedding = "encoder.stem", "encoder.conv1", "decoder.embedding"
    late = at("encoder.positional_embedding", lambda x: x.roll(1, 0))
    yield fault("audio positions shifted by one", stem, late, stem)
    yield fault("conv taps reversed", stem, at(f"{conv}.weight", lambda x: x.flip(2)), conv)
    conv, words = "encoder.conv2", "decoder.token_embedding"
    transposed = at(f"{conv}.weight", lambda x: x.transpose(0, 1).contiguous())
    yield fault("conv channels transposed", stem, transposed, conv, True)
    yield fault("conv bias dropped", stem, at(f"{conv}.bias", zeros), conv)
    early = at("decoder.positional_embedding", lambda x: x.roll(-1, 0))
    yield fault("text positions shifted by one", embedding, early, embedding)
    yield fault("vocabulary shifted by one", embedding, at(f"{words}.weight", lambda x: x.roll(1, 0)), words)

    logits, ln, post = "decoder.logits.prefill", "decoder.ln", "encoder.ln_post"
    yield fault("one word's vector lost", logits, at(f"{words}.weight", one_row(zeros)))
    yield fault("last norm of the decoder skipped", logits, without_weights(ln), ln)
    yield fault("last norm of the encoder without weights", "encoder", without_weights(post), post)

    filters = "log_mel.filters"
    yield fault("mel filters not normalised", "log_mel", at(filters, lambda x: x / x.amax(1, keepdim=True)))
    yield fault("mel filters of another scale", "log_mel", at(filters, lambda x: htk_filters(*x.shape)))
    yield fault("symmetric window", "log_mel", at("log_mel.fourier", half_window))


def htk_filters(n_mels: int, n_rows: int) -> Tensor:
    """Returns triangles of equal width on HTK's mel scale, area one, (n_mels, n_rows); Whisper's are on Slaney's."""
    mel = torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), n_mels + 2, dtype=torch.float64)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    bins = torch.arange(n_rows, dtype=torch.float64) * SAMPLE_RATE / N_FFT
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()
