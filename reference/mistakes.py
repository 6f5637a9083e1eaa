"""Wrong layers: each stands in for a method of the network, and does what it does but for one thing."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from maxwhisper.engine.session import Policy
from maxwhisper.network import backends, model
from maxwhisper.network.gelu import gelu
from maxwhisper.network.log_mel import LogMelSpectrogram

Patch = Callable[[], AbstractContextManager[Any]]
"""Puts a wrong layer in the place of the right one while it is entered."""


def float32_norm(x: TensorValue, weight: TensorValue, bias: TensorValue, form: str) -> TensorValue:
    """Computes layer norm, written out, wrong in one way."""
    mean = ops.mean(x, axis=-1)
    centred = x if form == "mean not subtracted" else x - mean
    variance = ops.mean(centred * centred, axis=-1)
    if form == "divided by n - 1":
        n = int(x.shape[-1])
        variance = variance * (n / (n - 1))
    if form == "epsilon outside the root":
        return centred / (ops.sqrt(variance) + 1e-5) * weight + bias
    return centred / ops.sqrt(variance + 1e-5) * weight + bias


def norm(form: str) -> Patch:
    def call(self: model.LayerNorm, x: TensorValue) -> TensorValue:
        return float32_norm(x.cast(DType.float32), self.weight, self.bias, form).cast(x.dtype)

    return lambda: patch.object(model.LayerNorm, "__call__", call)


def half(dtype: DType) -> DType:
    """Returns the dtype that a careless port would compute in."""
    return dtype if dtype != DType.float32 else DType.float16


def written_out(right: Patch) -> Patch:
    """Returns a patch of attention or of a block that also applies where a kernel would compute that."""

    def without_kernels(policy: Policy) -> backends.Backend:
        attend, step = backends.Attention.written_out, backends.Steps.written_out
        return replace(model.backend(policy), attend=attend, step=step)

    @contextmanager
    def patched() -> Iterator[None]:
        with patch.object(backends, "backend", without_kernels), right():
            yield

    return patched


def attention(
    scale: Callable[[model.MultiHeadAttention], float] = lambda attn: attn.n_channel**-0.5,
    softmax: Callable[[TensorValue], TensorValue] = ops.softmax,
    kv_of: Callable[[model.KeyValue], model.KeyValue] = lambda kv: kv,
    computed_in: Callable[[Policy], DType] = lambda policy: DType.float32,
) -> Patch:
    """Returns a patch of attention, with another scale or softmax, over other keys and values, or in another dtype."""

    def attend(
        self: model.MultiHeadAttention, q: TensorValue, kv: model.KeyValue, mask: TensorValue | None
    ) -> tuple[TensorValue, TensorValue]:
        q, k, v = (x.cast(computed_in(self.policy)) for x in (q, *kv_of(kv)))
        qk = (q @ ops.transpose(k, 2, 3)) * ops.constant(scale(self), q.dtype, q.device)
        if mask is not None:
            qk = qk + mask.cast(q.dtype)
        return (softmax(qk).cast(q.dtype) @ v).cast(self.policy.compute), qk.cast(DType.float32)

    return written_out(method(model.MultiHeadAttention, "qkv_attention", attend))


def half_softmax(qk: TensorValue) -> TensorValue:
    """Computes softmax in float16, and written out: a cast before MAX's own is dropped where it fuses attention."""
    exp = ops.exp((qk - ops.max(qk, axis=-1)).cast(DType.float16))
    return exp / ops.sum(exp, axis=-1)


def single_head(
    self: model.MultiHeadAttention, q: TensorValue, kv: model.KeyValue, mask: TensorValue | None
) -> tuple[TensorValue, TensorValue]:
    def joined(x: TensorValue) -> TensorValue:
        batch, n_head, n_token, n_channel = x.shape
        joint = ops.permute(x.cast(DType.float32), [0, 2, 1, 3])
        return joint.reshape((batch, 1, n_token, n_head * n_channel))

    qk = (joined(q) @ ops.transpose(joined(kv.k), 2, 3)) * ops.constant(self.n_channel**-0.5, DType.float32, q.device)
    wv = (ops.softmax(qk) @ joined(kv.v)).cast(self.policy.compute)
    return ops.permute(wv.reshape((*wv.shape[:1], wv.shape[2], self.n_head, self.n_channel)), [0, 2, 1, 3]), qk


def interleaved_heads(self: model.MultiHeadAttention, x: TensorValue) -> model.KeyValue:
    shape = (*x.shape[:2], self.n_channel, self.n_head)
    return model.KeyValue(*(ops.permute(project(x).reshape(shape), [0, 3, 1, 2]) for project in (self.key, self.value)))


def cached(change: Callable[[model.Cache], model.Cache]) -> Patch:
    """Returns a patch of attention of one token, alone or in its block, that goes over another cache."""
    for_kernel, followed_by = model.Cache.for_kernel, model.Cache.followed_by

    @contextmanager
    def patched() -> Iterator[None]:
        with (
            patch.object(model.Cache, "for_kernel", lambda cache, batch: for_kernel(change(cache), batch)),
            patch.object(model.Cache, "followed_by", lambda cache, new: followed_by(change(cache), new)),
        ):
            yield

    return patched


def of_next_text(cache: model.Cache) -> model.Cache:
    k, v = of_next_row(model.KeyValue(cache.k, cache.v))
    return cache._replace(k=k, v=v)


def without_newest(kv: model.KeyValue) -> model.KeyValue:
    return model.KeyValue(*(x[:, :, :-1] for x in kv))


def with_padding(kv: model.KeyValue) -> model.KeyValue:
    """Puts three rows of zeros behind the cache, as a cache of fixed length has them, and no mask over them."""

    def padded(x: TensorValue) -> TensorValue:
        zero = ops.constant(0, x.dtype, x.device).broadcast_to((x.shape[0], x.shape[1], 3, x.shape[3]))
        return ops.concat([x, zero], axis=2)

    return model.KeyValue(*(padded(x) for x in kv))


def of_next_row(kv: model.KeyValue) -> model.KeyValue:
    return model.KeyValue(*(ops.concat([x[1:], x[:1]], axis=0).rebind(x.shape) for x in kv))


def mask(make: Callable[[Any, Any], TensorValue]) -> Patch:
    return lambda: patch.object(model, "causal_mask", make)


def band(above: float, num_upper: int, n_token: Any, policy: Any) -> TensorValue:
    """Returns a mask (query, key): `above` where a key is more than num_upper later than the query, 0 elsewhere."""
    value = ops.constant(above, DType.float32, policy.device).broadcast_to((n_token, n_token))
    return ops.band_part(value, num_lower=-1, num_upper=num_upper, exclude=True)


def by_comparison(n_token: Any, policy: Any) -> TensorValue:
    """Returns a right mask, in the form that MAX 26.7 drops when it fuses attention itself on CPU."""
    position = model.indices(n_token, policy.device)
    later = ops.unsqueeze(position, 0) > ops.unsqueeze(position, 1)
    return later.cast(DType.float32) * ops.constant(-1e4, DType.float32, policy.device)


def earlier_hidden(n_token: Any, policy: Any) -> TensorValue:
    return ops.transpose(band(float("-inf"), 0, n_token, policy), 0, 1)


def conv(padding: tuple[int, int] = (1, 1), reverse: bool = False) -> Patch:
    """Returns a patch of the convolution whose taps begin elsewhere or run backwards."""

    def call(self: model.Conv1d, x: TensorValue) -> TensorValue:
        taps = ops.permute(self.weight.cast(x.dtype), [2, 1, 0])
        if reverse:
            taps = ops.concat([taps[2:3], taps[1:2], taps[0:1]], axis=0)
        image, kernel = ops.unsqueeze(x, 1).cast(DType.float32), ops.unsqueeze(taps, 0).cast(DType.float32)
        y = ops.conv2d(image, kernel, stride=(1, self.stride), padding=(0, 0, *padding))
        return (ops.squeeze(y, 1) + self.bias).cast(x.dtype)

    return lambda: patch.object(model.Conv1d, "__call__", call)


def stem(form: str) -> Patch:
    def call(self: model.AudioEncoder, mel: TensorValue) -> TensorValue:
        x = gelu(self.conv1(ops.transpose(mel, 1, 2)))
        x = self.conv2(x).cast(DType.float32)
        if form == "positions before GELU":
            return gelu(x + self.positional_embedding).cast(self.policy.compute)
        if form == "no positions":
            return gelu(x).cast(self.policy.compute)
        return (x + self.positional_embedding).cast(self.policy.compute)

    return lambda: patch.object(model.AudioEncoder, "stem", call)


def embedding(change: Callable[[Any], Any]) -> Patch:
    """Returns a patch that embeds tokens at another position."""
    embed = model.TextDecoder.embed
    return method(model.TextDecoder, "embed", lambda self, tokens, offset: embed(self, tokens, change(offset)))


def layers(change: Callable[[Sequence[Any]], Sequence[Any]]) -> Patch:
    """Returns a patch that gives the decoder's layers other keys and values, or each another's."""
    right = model.by_layer
    return lambda: patch.object(model, "by_layer", lambda *given: change(right(*given)))


def residual(form: str) -> Patch:
    """Returns a patch that puts the parts of a residual block together wrongly."""

    def call(
        self: model.ResidualAttentionBlock,
        x: TensorValue,
        cross_kv: Any = None,
        mask: Any = None,
        cache: Any = None,
        with_scores: bool = False,
    ) -> tuple[TensorValue, model.KeyValue, TensorValue | None]:
        normed = self.attn_ln(x)
        kv = self.attn.keys_values(normed)
        x = (normed if form == "residual from the norm" else x) + self.attn(normed, kv, mask, cache)
        scores = None
        if cross_kv is not None:
            assert self.cross_attn is not None and self.cross_attn_ln is not None
            normed = x if form == "cross-attention's norm left out" else self.cross_attn_ln(x)
            if with_scores:
                update, scores = self.cross_attn.with_scores(normed, cross_kv)
            else:
                update = self.cross_attn(normed, cross_kv)
            x = update if form == "cross-attention without residual" else x + update
        update = self.mlp(self.mlp_ln(x))
        return (update if form == "mlp without residual" else x + update), kv, scores

    return written_out(method(model.ResidualAttentionBlock, "__call__", call))


def cpu_int(value: int) -> TensorValue:
    return ops.constant(value, DType.int64, DeviceRef.CPU())


def keys_then_values(layers: Sequence[Mapping[str, TensorValue]]) -> list[dict[str, TensorValue]]:
    """Reads the order K, K, K, V, V, V as K, V, K, V, K, V, of every kind."""

    def read(name: str, layer: int) -> TensorValue:
        values = [of[f"{kv}{name[1:]}"] for of in layers for kv in "kv"]
        return values[layer + (len(layers) if name.startswith("v") else 0)]

    return [{name: read(name, layer) for name in of} for layer, of in enumerate(layers)]


def log_mel(form: str) -> Patch:
    """Returns a patch that scales the log-mel spectrogram in another way."""

    def call(self: LogMelSpectrogram, waveform: TensorValue) -> TensorValue:
        power = self.power(waveform)
        mel = self.mel(ops.sqrt(power) if form == "magnitude for power" else power)
        if form != "clamp left out":
            mel = ops.max(mel, ops.constant(1e-10, DType.float32, waveform.device))
        log = ops.log(mel) * (1.0 if form == "ln for log10" else math.log10(math.e))
        top = ops.max(ops.max(log, axis=0), axis=1)
        if form != "dynamic range not limited":
            log = ops.max(log, top - 8)
        if form == "decibels below the peak, as librosa":
            return ops.transpose((log - top) * 10, 0, 1)
        return ops.transpose(log if form == "not scaled" else (log + 4) / 4, 0, 1)

    return lambda: patch.object(LogMelSpectrogram, "__call__", call)


def product(form: str) -> Patch:
    """Returns a patch of the product with a vector of one token, wrong in one way."""
    right = model.Linear.__call__

    def call(self: model.Linear, x: TensorValue) -> TensorValue:
        if x.shape[1] != 1:
            return right(self, x)
        dtype = half(x.dtype) if form == "summed in half precision" else x.dtype
        y = ops.transpose(ops.sum((x * self.weight.cast(x.dtype)).cast(dtype), axis=-1), 1, 2).cast(x.dtype)
        return y if self.bias is None or form == "bias left out at a step" else y + self.bias.cast(x.dtype)

    return method(model.Linear, "__call__", call)


def method(owner: type, name: str, function: Callable[..., Any]) -> Patch:
    return lambda: patch.object(owner, name, function)


def encoder_without_norm(self: model.AudioEncoder, mel: TensorValue) -> TensorValue:
    x = self.stem(mel)
    for block in self.blocks:
        (x,) = block.encode(x)
    return x


def logits_without_norm(self: model.TextDecoder, x: TensorValue) -> TensorValue:
    return model.backend(self.policy).linear(x, self.token_embedding.weight).cast(DType.float32)
