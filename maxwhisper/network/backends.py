"""What layers are computed by: kernels of our own on a CPU, others on other devices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from max.dtype import DType
from max.graph import BufferValue, TensorType, TensorValue, ops
from max.nn.layer import Module

from ..engine.session import Policy
from .keys_values import Cache, KeyValue, Slots, tokens_first
from .products import DECODER_LAYERS, convolution_by_product, convolve, device_product, is_audio, linear
from .shapes import indices, join_rows, split_rows

PART = 64
"""Keys of a part in `maxwhisper.split_attention`."""


class Attention(Module):
    """Attention of queries over keys and values; the projections around it are those of `MultiHeadAttention`.

    Queries q are (batch, token, state), and so is what every way returns, in the dtype of q. kv may have fewer rows
    than the batch: with several sequences per audio window, consecutive ones share a row.
    """

    policy: Policy
    n_head: int
    n_channel: int

    def attend(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | None = None
    ) -> TensorValue:
        """Attends to kv, and to what is cached before it, which takes one token."""
        return backend(self.policy).attend(self, q, kv, mask, cache)

    def attend_in_place(self, qkv: TensorValue, slots: Slots) -> TensorValue:
        """Attends from one token of each text to those before it and itself, whose key and value are in the cache
        afterwards; qkv: its query, key and value side by side, (batch, 1, 3 * state)."""
        q = slots.filled(qkv)
        return self.split_attention("cached_split_attention", q, slots.k, slots.v, slots.n_past, slots.rows)

    def attend_with_scores(self, q: TensorValue, kv: KeyValue) -> tuple[TensorValue, TensorValue]:
        """Attends to kv; also returns the scores before softmax, float32 (batch, head, token, key)."""
        return backend(self.policy).attend_with_scores(self, q, kv)

    def scores_by_kernel(self, q: TensorValue, kv: KeyValue) -> tuple[TensorValue, TensorValue]:
        """Attends with scores by a kernel of our own, for CPUs."""
        scores = self.scores("maxwhisper.attention_scores", q, kv, kv.k)
        return self.attend(q, kv), scores

    def scores_by_device_kernel(self, q: TensorValue, kv: KeyValue) -> tuple[TensorValue, TensorValue]:
        """Attends with scores by a kernel for GPUs."""
        return self.attend(q, kv), self.scores("maxwhisper.device_scores", q, kv, tokens_first(kv)[0])

    def scores(self, name: str, q: TensorValue, kv: KeyValue, k: TensorValue) -> TensorValue:
        """Returns the scores before softmax by an operation of our own, which takes the keys as k."""
        qk = TensorType(DType.float32, [q.shape[0], kv.k.shape[1], q.shape[1], kv.k.shape[2]], q.device)
        return ops.custom(name, q.device, [q, k], [qk], parameters={"n_channel": self.n_channel})[0].tensor

    def by_kernel(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | None = None
    ) -> TensorValue:
        """Attends by kernels of our own, for CPUs, which add up in float32.

        Those of one token read the cache where it is, and the keys and values of a window once for all texts that share
        them.
        """
        if cache is not None:
            assert q.shape[1] == 1, "the kernel would compute the first token alone"
            name = "maxwhisper.cached_attention"
            inputs = [q.cast(DType.float32), *cache.for_kernel(q.shape[0]), *kv]
        elif q.shape[1] == 1:
            name, inputs = "maxwhisper.attention", [q.cast(DType.float32), *kv]
        elif mask is None:
            name, inputs = "maxwhisper.tiled_attention", [q, *kv]
        else:
            name, inputs = "maxwhisper.masked_attention", [q, *kv, mask]
        wv = TensorType(inputs[0].dtype, q.shape, q.device)
        parameters: dict[str, Any] = {"n_channel": self.n_channel}
        if name == "maxwhisper.tiled_attention":
            parameters["audio"] = is_audio(q)
        return ops.custom(name, q.device, inputs, [wv], parameters=parameters)[0].tensor.cast(q.dtype)

    def by_device_kernel(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | None = None
    ) -> TensorValue:
        """Attends by kernels for GPUs, which know a causal mask, (token, token), without reading it: one query of each
        text by ours, many by MAX's, which in float32 would take TF32."""
        k, v = tokens_first(kv if cache is None else cache.followed_by(kv))
        if q.shape[1] == 1:
            return self.split_attention("split_attention", q, k, v)
        if q.dtype == DType.float32:
            return self.split_queries(q, k, v, causal=mask is not None)
        rows = split_rows(q, k.shape[0])
        heads = rows.reshape((*rows.shape[:2], self.n_head, self.n_channel))
        parameters = {"n_head": self.n_head, "n_channel": self.n_channel, "causal": mask is not None}
        name = "maxwhisper.device_attention"
        (wv,) = ops.custom(name, q.device, [heads, k, v], [heads.type], parameters=parameters)
        return join_rows(wv.tensor.reshape(rows.shape), *q.shape[:2])

    def split_queries(self, q: TensorValue, k: TensorValue, v: TensorValue, causal: bool) -> TensorValue:
        """Attends as `split_attention` does, from each query as if it were a text of its own."""
        batch, n_token, n_state = q.shape
        rows = q.reshape((-1, 1, n_state))
        if not causal:
            return self.split_attention("split_attention", rows, k, v).reshape(q.shape)
        n_past = ops.unsqueeze(indices(n_token, q.device), 0).broadcast_to((batch, n_token)).reshape((-1,))
        return self.split_attention("limited_split_attention", rows, k, v, n_past).reshape(q.shape)

    def split_attention(
        self, name: str, q: TensorValue, k: TensorValue, v: TensorValue, *of_keys: TensorValue
    ) -> TensorValue:
        """Attends from one query of each text to k and v (row, token, head, channel), by a kernel of our own for any
        device, which adds up in float32. of_keys: what the operation of that name takes behind these."""
        n_part = (k.shape[1] + PART - 1) // PART
        parts = TensorType(DType.float32, [q.shape[0], k.shape[2], n_part, self.n_channel + 2], q.device)
        values, parameters = [q, k, v, *of_keys], {"n_channel": self.n_channel}
        return ops.custom(f"maxwhisper.{name}", q.device, values, [q.type, parts], parameters=parameters)[0].tensor

    def written_out(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | None = None
    ) -> TensorValue:
        """Attends as `by_kernel` does, by MAX's operations."""
        return self.heads_attention(q, kv if cache is None else cache.followed_by(kv), mask)[0]

    def heads_attention(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None = None
    ) -> tuple[TensorValue, TensorValue]:
        """Attends by MAX's operations; also returns the scores before softmax (batch, head, token, key). Where texts
        share a row of kv they stand side by side meanwhile."""
        rows = split_rows(q, kv.k.shape[0])
        rows = rows.reshape((*rows.shape[:2], self.n_head, self.n_channel))
        wv, qk = self.qkv_attention(ops.permute(rows, [0, 2, 1, 3]), kv, mask)
        _, n_head, _, n_key = qk.shape
        wv, qk = (ops.permute(x, [0, 2, 1, 3]) for x in (wv, qk))
        wv, qk = (join_rows(x.reshape((*x.shape[:2], -1)), *q.shape[:2]) for x in (wv, qk))
        return wv, ops.permute(qk.reshape((*q.shape[:2], n_head, n_key)), [0, 2, 1, 3])

    def qkv_attention(self, q: TensorValue, kv: KeyValue, mask: TensorValue | None) -> tuple[TensorValue, TensorValue]:
        # On a CPU MAX replaces exactly this form, with the scale as right operand, by a fused kernel. It adds up in the
        # dtype it is given, and 1,500 keys are too many for bfloat16, so attention is float32 at any precision.
        q, k, v = (x.cast(DType.float32) for x in (q, *kv))
        qk = (q @ ops.transpose(k, 2, 3)) * ops.constant(self.n_channel**-0.5, DType.float32, q.device)
        if mask is not None:
            qk = qk + mask
        return (ops.softmax(qk) @ v).cast(self.policy.compute), qk


class Steps(Module):
    """The ways to compute a `ResidualAttentionBlock` in the decoder for tokens behind cached ones."""

    policy: Policy
    attn: Any
    attn_ln: Any
    cross_attn: Any
    cross_attn_ln: Any
    mlp: Any
    mlp_ln: Any

    def step(
        self,
        x: TensorValue,
        offset: TensorValue,
        k_cache: TensorValue,
        v_cache: TensorValue,
        k_cross: TensorValue,
        v_cross: TensorValue,
    ) -> tuple[TensorValue, ...]:
        """Computes the block for one token behind `offset` cached ones; also returns the token's keys and values, which
        the caller puts into the cache."""
        return backend(self.policy).step(self, x, KeyValue(k_cross, v_cross), Cache(k_cache, v_cache, offset))

    def written_out(self, x: TensorValue, cross_kv: KeyValue, cache: Cache) -> tuple[TensorValue, ...]:
        """Computes `step` submodule by submodule."""
        y, kv, _ = self(x, cross_kv, cache=cache)
        return y, *kv

    def step_in_place(
        self,
        x: TensorValue,
        n_past: TensorValue,
        rows: TensorValue,
        k_cache: TensorValue,
        v_cache: TensorValue,
        k_written: BufferValue,
        v_written: BufferValue,
        k_cross: TensorValue,
        v_cross: TensorValue,
    ) -> tuple[TensorValue]:
        """Computes `step` on any device, by kernels for few rows; the token's keys and values are in the cache
        afterwards. k_cross, v_cross: (audio, token, head, channel); the others are those of `Slots`."""
        slots = Slots(k_cache, v_cache, k_written, v_written, n_past, rows)
        attn, cross_attn, (hidden, _, mlp_out) = self.attn, self.cross_attn, self.mlp
        x = attn.out.step(attn.attend_in_place(attn.qkv.step(x, norm=self.attn_ln), slots), residual=x)
        q = cross_attn.query.step(x, norm=self.cross_attn_ln)
        x = cross_attn.out.step(cross_attn.split_attention("split_attention", q, k_cross, v_cross), residual=x)
        return (mlp_out.step(hidden.step(x, norm=self.mlp_ln, activated=True), residual=x),)

    def by_kernel(self, x: TensorValue, cross_kv: KeyValue, cache: Cache) -> tuple[TensorValue, ...]:
        """Computes `step` by one kernel of our own, for CPUs, in float32: threads start once for all of it."""
        assert x.shape[1] == 1, "the keys and values of several tokens would need another order"
        y, outputs = self.kernel_outputs(x, cross_kv, cache)
        shape = (x.shape[0], self.attn.n_head, 1, self.attn.n_channel)
        return y, *(outputs[each].reshape(shape) for each in (self.attn.key, self.attn.value))

    def steps(
        self,
        x: TensorValue,
        offset: TensorValue,
        rows: TensorValue,
        k_cache: TensorValue,
        v_cache: TensorValue,
        k_cross: TensorValue,
        v_cross: TensorValue,
    ) -> tuple[TensorValue, ...]:
        """Computes a few tokens x (batch, token, state) by that kernel; keys and values are of that shape too. offset,
        rows: those of a `Cache`, of every text."""
        cache = Cache(k_cache, v_cache, offset, rows)
        y, outputs = self.kernel_outputs(x, KeyValue(k_cross, v_cross), cache)
        return y, outputs[self.attn.key], outputs[self.attn.value]

    def kernel_outputs(
        self, x: TensorValue, cross_kv: KeyValue, cache: Cache
    ) -> tuple[TensorValue, dict[Module, TensorValue]]:
        """Returns the block's output and that of each submodule, all (batch, token, width), in the dtype of x."""
        attn, cross_attn, (hidden, active, mlp_out) = self.attn, self.cross_attn, self.mlp
        submodules: dict[str, Any] = dict(self.named_modules())
        layers = [submodules[f"{name}."] for name in DECODER_LAYERS]
        weights = [weight for layer in layers for weight in (layer.weight, layer.bias) if weight is not None]
        widths = (x.shape[2], hidden.weight.shape[0])
        narrow, wide = (TensorType(DType.float32, [*x.shape[:2], width], x.device) for width in widths)
        in_between = [narrow] * 4
        types = [narrow, *(wide if layer is hidden else narrow for layer in layers), wide, *in_between]
        inputs = [x.cast(DType.float32), *cache.for_kernel(x.shape[0]), *cross_kv, *weights]
        parameters = {"n_channel": attn.n_channel}
        results = ops.custom("maxwhisper.decoder_block", x.device, inputs, types, parameters=parameters)
        y, *values = (result.tensor.cast(x.dtype) for result in results)
        found = dict(zip([*layers, active], values, strict=False))
        return y, found | {attn: found[attn.out], cross_attn: found[cross_attn.out], self.mlp: found[mlp_out]}


@dataclass(frozen=True)
class Backend:
    """What layers are computed by on a kind of device: products, attention, that with its scores, a block's step."""

    linear: Callable[..., TensorValue]
    convolve: Callable[..., TensorValue]
    attend: Callable[..., TensorValue]
    attend_with_scores: Callable[..., tuple[TensorValue, TensorValue]]
    step: Callable[..., tuple[TensorValue, ...]]


CPU_BACKEND = Backend(linear, convolve, Attention.by_kernel, Attention.scores_by_kernel, Steps.by_kernel)
DEVICE_BACKEND = Backend(
    device_product,
    convolution_by_product,
    Attention.by_device_kernel,
    Attention.scores_by_device_kernel,
    Steps.written_out,
)


def backend(policy: Policy) -> Backend:
    """Returns what computes under a policy; nowhere else does the network ask what it runs on."""
    return CPU_BACKEND if policy.own_kernels else DEVICE_BACKEND
