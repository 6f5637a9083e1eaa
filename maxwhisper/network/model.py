"""Whisper as a MAX graph: the network of openai/whisper's ``model.py``, class by class and attribute by attribute.

Attributes carry OpenAI's names, so a checkpoint's tensors load without a rename table and the two files read side by
side. What differs is the cache. OpenAI threads a dictionary of tensors through forward hooks; a graph is a function, so
keys and values are explicit here: `MultiHeadAttention.keys_values` computes them, the caller keeps them, and attention
is handed the ones to attend to. The four uses of attention are then one class:

    encoder self-attention      attn(x, attn.keys_values(x))
    causal, over a prompt       attn(x, attn.keys_values(x), mask)
    cached, one token           attn(x, attn.keys_values(x), cache=cache)
    cross-attention             attn(x, kv)        with kv = attn.keys_values(audio features), once per window

Shapes: batch and text length are symbolic; audio length and widths are static and come from the checkpoint.
"""

from collections.abc import Callable, Sequence
from typing import Any

from max.dtype import DType
from max.graph import TensorType, TensorValue, Weight, ops
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import flash_attention_gpu, masked_flash_attention_gpu
from max.nn.layer import LayerList, Module
from whisper.model import ModelDimensions

from ..engine.session import Policy
from .gelu import gelu
from .keys_values import Cache, KeyValue, Slots, flash_dtype
from .products import DECODER_LAYERS, convolution, convolution_by_product, linear
from .shapes import causal_mask, grouped, indices, join_rows, split_rows


class LayerNorm(Module):
    """Layer norm over the last axis, in float32 whatever the dtype of x, with PyTorch's default epsilon."""

    epsilon = 1e-5

    def __init__(self, n_state: int, policy: Policy):
        super().__init__()
        self.weight = Weight("weight", DType.float32, [n_state], policy.device)
        self.bias = Weight("bias", DType.float32, [n_state], policy.device)

    def __call__(self, x: TensorValue) -> TensorValue:
        return ops.layer_norm(x.cast(DType.float32), self.weight, self.bias, self.epsilon).cast(x.dtype)


class Linear(Module):
    """x @ weight.T + bias; weight is (n_out, n_in) as in PyTorch."""

    def __init__(self, n_in: int, n_out: int, policy: Policy, bias: bool = True):
        super().__init__()
        self.weight = Weight("weight", policy.storage, [n_out, n_in], policy.device)
        self.bias = Weight("bias", DType.float32, [n_out], policy.device) if bias else None

    def __call__(self, x: TensorValue) -> TensorValue:
        return linear(x, self.weight, self.bias)


class Conv1d(Module):
    """Convolution over time with kernel 3 and padding 1; weight is (n_out, n_in, 3) as in PyTorch."""

    kernel_size = 3
    padding = 1

    def __init__(self, n_in: int, n_out: int, policy: Policy, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = Weight("weight", policy.storage, [n_out, n_in, self.kernel_size], policy.device)
        self.bias = Weight("bias", DType.float32, [n_out], policy.device)

    def __call__(self, x: TensorValue) -> TensorValue:
        """(batch, time, n_in) to (batch, time / stride, n_out)."""
        padded = ops.pad(x, [0, 0, self.padding, self.padding, 0, 0])
        if not x.device.is_cpu():
            return convolution_by_product(padded, self.weight, self.bias, self.stride)
        return (convolution(padded, self.weight, self.stride) + self.bias).cast(x.dtype)


class MultiHeadAttention(Module):
    """Attention of queries from x over given keys and values, and the projections that make those."""

    def __init__(self, n_state: int, n_head: int, policy: Policy):
        super().__init__()
        self.policy = policy
        self.n_head = n_head
        self.n_channel = n_state // n_head
        self.query = Linear(n_state, n_state, policy)
        self.key = Linear(n_state, n_state, policy, bias=False)
        self.value = Linear(n_state, n_state, policy)
        self.out = Linear(n_state, n_state, policy)

    def keys_values(self, x: TensorValue) -> KeyValue:
        """Keys and values of x (batch, token, state)."""
        shape = (*x.shape[:2], self.n_head, self.n_channel)
        return KeyValue(*(ops.permute(project(x).reshape(shape), [0, 2, 1, 3]) for project in (self.key, self.value)))

    def __call__(
        self, x: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | Slots | None = None
    ) -> TensorValue:
        """Attend from x (batch, token, state) to kv, and to what is cached before it, which takes one token.

        kv may have fewer rows than the batch: with several sequences per audio window, consecutive ones share a row.
        """
        q = self.query(x)
        if isinstance(cache, Slots):
            q, kv = cache.filled(q, kv)
            attend = self.written_out if x.device.is_cpu() else self.by_flash_attention
            return self.out(attend(q, kv, cache.mask))
        attend = self.by_kernel if x.device.is_cpu() else self.by_flash_attention
        return self.out(attend(q, kv, mask, cache))

    def with_scores(self, x: TensorValue, kv: KeyValue) -> tuple[TensorValue, TensorValue]:
        """Attend from x to kv; also the scores before softmax (batch, head, token, key)."""
        q = self.query(x)
        wv, qk = self.scores_by_kernel(q, kv) if x.device.is_cpu() else self.heads_attention(q, kv, None)
        return self.out(wv), qk

    def scores_by_kernel(self, q: TensorValue, kv: KeyValue) -> tuple[TensorValue, TensorValue]:
        """Attends as `by_kernel` does; also returns the scores before softmax."""
        qk = TensorType(DType.float32, [q.shape[0], kv.k.shape[1], q.shape[1], kv.k.shape[2]], q.device)
        parameters = {"n_channel": self.n_channel}
        scores = ops.custom("maxwhisper.attention_scores", q.device, [q, kv.k], [qk], parameters=parameters)
        return self.by_kernel(q, kv), scores[0].tensor

    def by_kernel(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | None = None
    ) -> TensorValue:
        """Attention of q (batch, token, state) by kernels of our own, for CPUs, which add up in float32.

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
        parameters = {"n_channel": self.n_channel}
        return ops.custom(name, q.device, inputs, [wv], parameters=parameters)[0].tensor.cast(q.dtype)

    def by_flash_attention(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | None = None
    ) -> TensorValue:
        """Attends by MAX's kernels for GPUs, which know a causal mask, (token, token), without reading it."""
        kv = kv if cache is None else cache.followed_by(kv)
        rows = split_rows(q, kv.k.shape[0])
        heads = rows.reshape((*rows.shape[:2], self.n_head, self.n_channel))
        values = [x.cast(flash_dtype(x.dtype)) for x in (heads, *(ops.permute(x, [0, 2, 1, 3]) for x in kv))]
        scale = self.n_channel**-0.5
        if mask is not None and mask.rank > 2:
            wv = masked_flash_attention_gpu(*values, mask, scale)
        else:
            variant = MHAMaskVariant.NULL_MASK if mask is None else MHAMaskVariant.CAUSAL_MASK
            wv = flash_attention_gpu(*values, variant, scale)
        return join_rows(wv.cast(self.policy.compute).reshape(rows.shape), *q.shape[:2])

    def written_out(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | None = None
    ) -> TensorValue:
        """Attends as `by_kernel` does, by MAX's operations."""
        return self.heads_attention(q, kv if cache is None else cache.followed_by(kv), mask)[0]

    def heads_attention(
        self, q: TensorValue, kv: KeyValue, mask: TensorValue | None
    ) -> tuple[TensorValue, TensorValue]:
        """Attention of q (batch, token, state), and the scores before softmax (batch, head, token, key). Where texts
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
            qk = qk + (mask if mask.rank == 2 else ops.unsqueeze(mask, 1))
        return (ops.softmax(qk) @ v).cast(self.policy.compute), qk


class GELU(Module):
    def __call__(self, x: TensorValue) -> TensorValue:
        return gelu(x)


def mlp(n_state: int, policy: Policy) -> LayerList:
    """Linear, GELU, Linear through four times the width; a sequence as in PyTorch, for its tensors' names."""
    return LayerList([Linear(n_state, 4 * n_state, policy), GELU(), Linear(4 * n_state, n_state, policy)])


class ResidualAttentionBlock(Module):
    """Self-attention, cross-attention in the decoder, MLP; each behind a layer norm and around a residual."""

    def __init__(self, n_state: int, n_head: int, policy: Policy, cross_attention: bool = False):
        super().__init__()
        self.policy = policy
        self.attn = MultiHeadAttention(n_state, n_head, policy)
        self.attn_ln = LayerNorm(n_state, policy)
        self.cross_attn = MultiHeadAttention(n_state, n_head, policy) if cross_attention else None
        self.cross_attn_ln = LayerNorm(n_state, policy) if cross_attention else None
        self.mlp = mlp(n_state, policy)
        self.mlp_ln = LayerNorm(n_state, policy)

    def __call__(
        self,
        x: TensorValue,
        cross_kv: KeyValue | None = None,
        mask: TensorValue | None = None,
        cache: Cache | Slots | None = None,
        with_scores: bool = False,
    ) -> tuple[TensorValue, KeyValue, TensorValue | None]:
        """x (batch, token, state) to the same shape; also the self-attention's keys and values of x, and the
        cross-attention's scores, or None where they are not asked for."""
        normed = self.attn_ln(x)
        kv = self.attn.keys_values(normed)
        x = x + self.attn(normed, kv, mask, cache)
        scores = None
        if self.cross_attn is not None and self.cross_attn_ln is not None and cross_kv is not None:
            normed = self.cross_attn_ln(x)
            if with_scores:
                update, scores = self.cross_attn.with_scores(normed, cross_kv)
            else:
                update = self.cross_attn(normed, cross_kv)
            x = x + update
        return x + self.mlp(self.mlp_ln(x)), kv, scores

    def encode(self, x: TensorValue) -> tuple[TensorValue]:
        """The block in the encoder: every frame attends to every frame."""
        return (self(x)[0],)

    def prefill(self, x: TensorValue, k_cross: TensorValue, v_cross: TensorValue) -> tuple[TensorValue, ...]:
        """The block in the decoder over a whole text; also returns its keys and values, the cache of the next step."""
        y, kv, _ = self(x, KeyValue(k_cross, v_cross), causal_mask(x.shape[1], self.policy))
        return y, *kv

    def step(
        self,
        x: TensorValue,
        offset: TensorValue,
        k_cache: TensorValue,
        v_cache: TensorValue,
        k_cross: TensorValue,
        v_cross: TensorValue,
    ) -> tuple[TensorValue, ...]:
        """The block in the decoder for one token behind `offset` cached ones; also returns the token's keys and values,
        which the caller puts into the cache."""
        follow = self.by_kernel if x.device.is_cpu() else self.written_out
        return follow(x, KeyValue(k_cross, v_cross), Cache(k_cache, v_cache, offset))

    def written_out(self, x: TensorValue, cross_kv: KeyValue, cache: Cache) -> tuple[TensorValue, ...]:
        """Computes `step` submodule by submodule."""
        y, kv, _ = self(x, cross_kv, cache=cache)
        return y, *kv

    def step_in_place(self, x: TensorValue, cross_kv: KeyValue, slots: Slots) -> tuple[TensorValue]:
        """Computes `step` submodule by submodule; the token's keys and values are in the cache afterwards."""
        return (self(x, cross_kv, cache=slots)[0],)

    def by_kernel(self, x: TensorValue, cross_kv: KeyValue, cache: Cache) -> tuple[TensorValue, ...]:
        """Computes `step` by one kernel of our own, for CPUs, in float32: threads start once for all of it."""
        assert x.shape[1] == 1, "the keys and values of several tokens would need another order"
        y, *new = self.steps(x, cross_kv, cache)
        shape = (x.shape[0], self.attn.n_head, 1, self.attn.n_channel)
        return y, *(each.reshape(shape) for each in new)

    def steps(self, x: TensorValue, cross_kv: KeyValue, cache: Cache) -> tuple[TensorValue, ...]:
        """Computes a few tokens x (batch, token, state) by that kernel; keys and values are of that shape too."""
        y, outputs = self.kernel_outputs(x, cross_kv, cache)
        return y, outputs[self.attn.key], outputs[self.attn.value]

    def kernel_outputs(
        self, x: TensorValue, cross_kv: KeyValue, cache: Cache
    ) -> tuple[TensorValue, dict[Module, TensorValue]]:
        """The block's output and that of each submodule, all (batch, token, width), in the dtype of x."""
        assert self.cross_attn is not None and self.cross_attn_ln is not None
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

    def align(self, x: TensorValue, k_cross: TensorValue, v_cross: TensorValue) -> tuple[TensorValue, ...]:
        """Computes `prefill`, but returns the cross-attention's scores (batch, head, token, n_audio_ctx) beside x."""
        kv = KeyValue(k_cross, v_cross)
        y, _, scores = self(x, kv, causal_mask(x.shape[1], self.policy), with_scores=True)
        assert scores is not None
        return y, scores


class AudioEncoder(Module):
    """Log-mel to audio features."""

    def __init__(self, dims: ModelDimensions, policy: Policy):
        super().__init__()
        n_state = dims.n_audio_state
        self.policy = policy
        self.conv1 = Conv1d(dims.n_mels, n_state, policy)
        self.conv2 = Conv1d(n_state, n_state, policy, stride=2)
        self.positional_embedding = Weight(
            "positional_embedding", DType.float32, [dims.n_audio_ctx, n_state], policy.device
        )
        self.blocks = LayerList(
            [ResidualAttentionBlock(n_state, dims.n_audio_head, policy) for _ in range(dims.n_audio_layer)]
        )
        self.ln_post = LayerNorm(n_state, policy)

    def stem(self, mel: TensorValue) -> TensorValue:
        """Convolutions and positional table: (batch, n_mels, 2 * n_audio_ctx) to (batch, n_audio_ctx, state)."""
        x = ops.transpose(mel, 1, 2)
        x = gelu(self.conv1(x))
        x = gelu(self.conv2(x))
        return (x.cast(DType.float32) + self.positional_embedding).cast(self.policy.compute)

    def __call__(self, mel: TensorValue) -> TensorValue:
        """(batch, n_mels, 2 * n_audio_ctx) to audio features (batch, n_audio_ctx, state)."""
        x = self.stem(mel)
        for block in self.blocks:
            (x,) = block.encode(x)
        return self.ln_post(x)


class Embedding(Module):
    """A table of vectors, (n_rows, n_state)."""

    def __init__(self, n_rows: int, n_state: int, policy: Policy):
        super().__init__()
        self.weight = Weight("weight", policy.storage, [n_rows, n_state], policy.device)

    def __call__(self, indices: TensorValue) -> TensorValue:
        """Indices of any shape to float32 vectors, in one more dimension."""
        return ops.gather(self.weight, indices, axis=0).cast(DType.float32)


class TextDecoder(Module):
    """Tokens and audio features to logits over the vocabulary."""

    def __init__(self, dims: ModelDimensions, policy: Policy):
        super().__init__()
        n_state = dims.n_text_state
        self.policy = policy
        self.token_embedding = Embedding(dims.n_vocab, n_state, policy)
        self.positional_embedding = Weight(
            "positional_embedding", DType.float32, [dims.n_text_ctx, n_state], policy.device
        )
        self.blocks = LayerList(
            [
                ResidualAttentionBlock(n_state, dims.n_text_head, policy, cross_attention=True)
                for _ in range(dims.n_text_layer)
            ]
        )
        self.ln = LayerNorm(n_state, policy)

    def embed(self, tokens: TensorValue, offset: TensorValue | int) -> TensorValue:
        """Tokens (batch, token), the first at position `offset`, a scalar or (batch,), to vectors (batch, token,
        state)."""
        start = offset.to(tokens.device) if isinstance(offset, TensorValue) else offset
        if isinstance(start, TensorValue) and start.rank:
            start = ops.unsqueeze(start, 1)
        positions = indices(tokens.shape[1], tokens.device) + start
        x = self.token_embedding(tokens) + ops.gather(self.positional_embedding, positions, axis=0)
        return x.cast(self.policy.compute)

    def keys_values(self, audio_features: TensorValue) -> list[TensorValue]:
        """Every layer's cross-attention keys and values of the audio features (audio, n_audio_ctx, state)."""
        return [value for block in self.blocks for value in block.cross_attn.keys_values(audio_features)]

    def logits(self, x: TensorValue) -> TensorValue:
        """(batch, token, state) to float32 logits (batch, token, n_vocab)."""
        return linear(self.ln(x), self.token_embedding.weight).cast(DType.float32)

    def __call__(self, tokens: TensorValue, *cross_kv: TensorValue) -> list[TensorValue]:
        """A whole text: tokens (batch, token) to logits (batch, token, n_vocab), and every layer's keys and values."""
        x, *kv = self._layers(ResidualAttentionBlock.prefill, self.embed(tokens, offset=0), grouped(cross_kv, 2))
        return [self.logits(x), *kv]

    def start(self, tokens: TensorValue, positions: TensorValue, *cross_kv: TensorValue) -> list[TensorValue]:
        """Computes a whole text, but logits (batch, position, n_vocab) at some `positions` (position,) alone."""
        x, *kv = self._layers(ResidualAttentionBlock.prefill, self.embed(tokens, offset=0), grouped(cross_kv, 2))
        return [self.logits(ops.gather(x, positions, axis=1)), *kv]

    def step(self, tokens: TensorValue, offset: TensorValue, *kv: TensorValue) -> list[TensorValue]:
        """One token (batch, 1) behind `offset` cached ones: logits (batch, 1, n_vocab), and every layer's keys and
        values of the token, which the caller puts into the cache.

        kv: every layer's cache, keys and values, then every layer's cross-attention keys and values.
        """
        cache, cross_kv = grouped(kv[: len(kv) // 2], 2), grouped(kv[len(kv) // 2 :], 2)
        inputs = [(offset, *own, *cross) for own, cross in zip(cache, cross_kv, strict=True)]
        x, *new = self._layers(ResidualAttentionBlock.step, self.embed(tokens, offset), inputs)
        return [self.logits(x), *new]

    def steps(
        self, x: TensorValue, offset: TensorValue, kv: Sequence[TensorValue], rows: TensorValue
    ) -> list[TensorValue]:
        """Computes `step` for a few tokens that are embedded already, x (batch, token, state), on a CPU: logits (batch,
        token, n_vocab), and every layer's keys and values, each (batch, token, state). rows: of all caches, as of a
        `Cache`."""
        own, cross = grouped(kv[: len(kv) // 2], 2), grouped(kv[len(kv) // 2 :], 2)
        inputs = [(KeyValue(*c), Cache(o[0], o[1], offset, rows)) for o, c in zip(own, cross, strict=True)]
        x, *new = self._layers(ResidualAttentionBlock.steps, x, inputs)
        return [self.logits(x), *new]

    def step_in_place(self, tokens: TensorValue, cross: Sequence[KeyValue], slots: Sequence[Slots]) -> TensorValue:
        """Logits (batch, 1, n_vocab) of one token of each text (batch, 1), by layer cross-attention's keys and values
        and the cache."""
        x = self.embed(tokens, slots[0].n_past)
        (x,) = self._layers(ResidualAttentionBlock.step_in_place, x, list(zip(cross, slots, strict=True)))
        return self.logits(x)

    def align(self, tokens: TensorValue, *cross_kv: TensorValue) -> list[TensorValue]:
        """Computes a whole text, but every layer's cross-attention scores stand behind the logits."""
        x, *scores = self._layers(ResidualAttentionBlock.align, self.embed(tokens, offset=0), grouped(cross_kv, 2))
        return [self.logits(x), *scores]

    def _layers(
        self,
        method: Callable[..., Sequence[TensorValue]],
        x: TensorValue,
        inputs: Sequence[Sequence[Any]],
    ) -> list[TensorValue]:
        """x after every layer's `method`, each with its own inputs, and what the layers return beside x."""
        others: list[TensorValue] = []
        for block, own in zip(self.blocks, inputs, strict=True):
            x, *new = method(block, x, *own)
            others += new
        return [x, *others]
