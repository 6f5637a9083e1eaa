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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from max.dtype import DType
from max.graph import BufferValue, TensorValue, Weight, ops
from max.nn.layer import LayerList, Module
from whisper.model import ModelDimensions

from ..engine.session import Policy
from .backends import Attention, Steps, backend
from .gelu import gelu
from .keys_values import Cache, KeyValue, by_layer
from .products import step_product
from .shapes import causal_mask, indices


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
        self.policy = policy
        self.weight = Weight("weight", policy.storage, [n_out, n_in], policy.device)
        self.bias = Weight("bias", DType.float32, [n_out], policy.device) if bias else None

    def __call__(self, x: TensorValue) -> TensorValue:
        return backend(self.policy).linear(x, self.weight, self.bias)

    def step(self, x: TensorValue, **around: Any) -> TensorValue:
        """Computes `step_product` of x (batch, 1, n_in) with what stands around it."""
        return step_product(x, self.weight, self.bias, **around)


class Conv1d(Module):
    """Convolution over time with kernel 3 and padding 1; weight is (n_out, n_in, 3) as in PyTorch."""

    kernel_size = 3
    padding = 1

    def __init__(self, n_in: int, n_out: int, policy: Policy, stride: int = 1):
        super().__init__()
        self.policy = policy
        self.stride = stride
        self.weight = Weight("weight", policy.storage, [n_out, n_in, self.kernel_size], policy.device)
        self.bias = Weight("bias", DType.float32, [n_out], policy.device)

    def __call__(self, x: TensorValue) -> TensorValue:
        """Convolves (batch, time, n_in) to (batch, time / stride, n_out)."""
        padded = ops.pad(x, [0, 0, self.padding, self.padding, 0, 0])
        return backend(self.policy).convolve(padded, self.weight, self.bias, self.stride)


class MultiHeadAttention(Attention):
    """Attention of queries from x over given keys and values, and the projections that make those.

    joined: whether it has query, key and value as one, too, in `qkv`, which no checkpoint has.
    """

    def __init__(self, n_state: int, n_head: int, policy: Policy, joined: bool = False):
        super().__init__()
        self.policy = policy
        self.n_head = n_head
        self.n_channel = n_state // n_head
        self.query = Linear(n_state, n_state, policy)
        self.key = Linear(n_state, n_state, policy, bias=False)
        self.value = Linear(n_state, n_state, policy)
        self.out = Linear(n_state, n_state, policy)
        if joined:
            self.qkv = Linear(n_state, 3 * n_state, policy)

    def keys_values(self, x: TensorValue) -> KeyValue:
        """Computes keys and values of x (batch, token, state)."""
        shape = (*x.shape[:2], self.n_head, self.n_channel)
        return KeyValue(*(ops.permute(project(x).reshape(shape), [0, 2, 1, 3]) for project in (self.key, self.value)))

    def __call__(
        self, x: TensorValue, kv: KeyValue, mask: TensorValue | None = None, cache: Cache | None = None
    ) -> TensorValue:
        """Attends from x (batch, token, state) to kv, and to what is cached before it, which takes one token."""
        return self.out(self.attend(self.query(x), kv, mask, cache))

    def with_scores(self, x: TensorValue, kv: KeyValue) -> tuple[TensorValue, TensorValue]:
        """Attends from x to kv; also returns the scores before softmax (batch, head, token, key)."""
        wv, qk = self.attend_with_scores(self.query(x), kv)
        return self.out(wv), qk


class GELU(Module):
    def __call__(self, x: TensorValue) -> TensorValue:
        return gelu(x)


def mlp(n_state: int, policy: Policy) -> LayerList:
    """Returns Linear, GELU, Linear through four times the width; a sequence as in PyTorch, for its tensors' names."""
    return LayerList([Linear(n_state, 4 * n_state, policy), GELU(), Linear(4 * n_state, n_state, policy)])


class ResidualAttentionBlock(Steps):
    """Self-attention, cross-attention in the decoder, MLP; each behind a layer norm and around a residual."""

    def __init__(self, n_state: int, n_head: int, policy: Policy, cross_attention: bool = False, joined: bool = False):
        super().__init__()
        self.policy = policy
        self.attn = MultiHeadAttention(n_state, n_head, policy, joined)
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
        cache: Cache | None = None,
        with_scores: bool = False,
    ) -> tuple[TensorValue, KeyValue, TensorValue | None]:
        """Turns x (batch, token, state) to the same shape; also returns the self-attention's keys and values of x, and
        the cross-attention's scores, or None where they are not asked for."""
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
        """Computes the block in the encoder: every frame attends to every frame."""
        return (self(x)[0],)

    def prefill(self, x: TensorValue, k_cross: TensorValue, v_cross: TensorValue) -> tuple[TensorValue, ...]:
        """Computes the block in the decoder over a text; also returns its keys and values, the next step's cache."""
        y, kv, _ = self(x, KeyValue(k_cross, v_cross), causal_mask(x.shape[1], self.policy))
        return y, *kv

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
        """Adds positions to convolutions: (batch, n_mels, 2 * n_audio_ctx) to (batch, n_audio_ctx, state)."""
        x = ops.transpose(mel, 1, 2)
        x = gelu(self.conv1(x))
        x = gelu(self.conv2(x))
        return (x.cast(DType.float32) + self.positional_embedding).cast(self.policy.compute)

    def __call__(self, mel: TensorValue) -> TensorValue:
        """Encodes (batch, n_mels, 2 * n_audio_ctx) to audio features (batch, n_audio_ctx, state)."""
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
        """Turns indices of any shape to float32 vectors, in one more dimension."""
        return ops.gather(self.weight, indices, axis=0).cast(DType.float32)


class TextDecoder(Module):
    """Tokens and audio features to logits over the vocabulary; joined: as of its `MultiHeadAttention`."""

    def __init__(self, dims: ModelDimensions, policy: Policy, joined: bool = False):
        super().__init__()
        n_state = dims.n_text_state
        self.policy = policy
        self.token_embedding = Embedding(dims.n_vocab, n_state, policy)
        self.positional_embedding = Weight(
            "positional_embedding", DType.float32, [dims.n_text_ctx, n_state], policy.device
        )
        self.blocks = LayerList(
            [
                ResidualAttentionBlock(n_state, dims.n_text_head, policy, cross_attention=True, joined=joined)
                for _ in range(dims.n_text_layer)
            ]
        )
        self.ln = LayerNorm(n_state, policy)

    def embed(self, tokens: TensorValue, offset: TensorValue | int) -> TensorValue:
        """Embeds tokens (batch, token), the first at position `offset`, a scalar, as vectors (batch, token, state)."""
        start = offset.to(tokens.device) if isinstance(offset, TensorValue) else offset
        positions = indices(tokens.shape[1], tokens.device) + start
        x = self.token_embedding(tokens) + ops.gather(self.positional_embedding, positions, axis=0)
        return x.cast(self.policy.compute)

    def keys_values(self, audio_features: TensorValue) -> list[TensorValue]:
        """Computes every layer's cross-attention keys and values of the audio features (audio, n_audio_ctx, state)."""
        return [value for block in self.blocks for value in block.cross_attn.keys_values(audio_features)]

    def logits(self, x: TensorValue) -> TensorValue:
        """Turns (batch, token, state) to float32 logits (batch, token, n_vocab)."""
        return backend(self.policy).linear(self.ln(x), self.token_embedding.weight).cast(DType.float32)

    def __call__(self, tokens: TensorValue, **kv: TensorValue) -> list[TensorValue]:
        """Decodes a text: tokens (batch, token) to logits (batch, token, n_vocab), and all layers' keys and values.

        kv: every layer's keys and values of the audio, by names as of `by_layer`; at a step those of its cache too.
        """
        x, *new = self._layers(ResidualAttentionBlock.prefill, self.embed(tokens, offset=0), kv, "cross")
        return [self.logits(x), *new]

    def start(self, tokens: TensorValue, positions: TensorValue, **kv: TensorValue) -> list[TensorValue]:
        """Computes a whole text, but logits (batch, position, n_vocab) at some `positions` (position,) alone."""
        x, *new = self._layers(ResidualAttentionBlock.prefill, self.embed(tokens, offset=0), kv, "cross")
        return [self.logits(ops.gather(x, positions, axis=1)), *new]

    def step(self, tokens: TensorValue, offset: TensorValue, **kv: TensorValue) -> list[TensorValue]:
        """Decodes one token (batch, 1) behind `offset` cached ones: logits (batch, 1, n_vocab), and every layer's keys
        and values of the token, which the caller puts into the cache."""
        x = self.embed(tokens, offset)
        x, *new = self._layers(ResidualAttentionBlock.step, x, kv, "cache", "cross", offset=offset)
        return [self.logits(x), *new]

    def steps(
        self, x: TensorValue, offset: TensorValue, rows: TensorValue, kv: Mapping[str, TensorValue]
    ) -> list[TensorValue]:
        """Computes `step` for a few tokens that are embedded already, x (batch, token, state), on a CPU: logits (batch,
        token, n_vocab), and every layer's keys and values, each (batch, token, state). offset, rows: of all caches, as
        of a `Cache`."""
        x, *new = self._layers(ResidualAttentionBlock.steps, x, kv, "cache", "cross", offset=offset, rows=rows)
        return [self.logits(x), *new]

    def step_in_place(
        self, x: TensorValue, n_past: TensorValue, rows: TensorValue, kv: Mapping[str, TensorValue | BufferValue]
    ) -> TensorValue:
        """Returns float32 logits (batch, n_vocab) of one token of each text, embedded as x (batch, 1, state). n_past,
        rows: of all caches, as of `Slots`. kv: each (row, token, head, channel)."""
        block_step, kinds = ResidualAttentionBlock.step_in_place, ("cache", "written", "cross")
        (x,) = self._layers(block_step, x, kv, *kinds, n_past=n_past, rows=rows)
        logits = step_product(x, self.token_embedding.weight, norm=self.ln, dtype=DType.float32)
        return ops.squeeze(logits, 1)

    def align(self, tokens: TensorValue, **kv: TensorValue) -> list[TensorValue]:
        """Computes a whole text, but every layer's cross-attention scores stand behind the logits."""
        x, *scores = self._layers(ResidualAttentionBlock.align, self.embed(tokens, offset=0), kv, "cross")
        return [self.logits(x), *scores]

    def _layers(
        self,
        method: Callable[..., Sequence[TensorValue]],
        x: TensorValue,
        kv: Mapping[str, TensorValue | BufferValue],
        *kinds: str,
        **others: TensorValue,
    ) -> list[TensorValue]:
        """Returns x after every layer's `method`, which takes its own keys and values of these kinds, and the others;
        behind it what the layers return beside x."""
        found: list[TensorValue] = []
        for block, own in zip(self.blocks, by_layer(kv, len(self.blocks), *kinds), strict=True):
            x, *new = method(block, x, **own, **others)
            found += new
        return [x, *found]
