"""PyTorch Whisper in three graphs for engines that run exported ones, and openai-whisper's loop over these.

    encoder   mel (1, n_mels, 3000) -> features (1, n_audio_ctx, state)
    cross     features -> keys and values of the audio, layer by layer, each (1, head, n_audio_ctx, channel)
    step      tokens (batch, token), the own cache, that of the audio -> logits (batch, token, n_vocab), the own cache

The own cache holds keys and values layer by layer, each (batch, head, token so far, channel).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from whisper import decoding
from whisper.model import ModelDimensions
from whisper.model import Whisper as OpenAIWhisper

from ..checkpoint import Checkpoint
from ..decoding.openai_loop import rebind

BATCH = 2
"""How many texts the inputs to trace with have: with 1, PyTorch's exporter would fix the number."""


class Exported(NamedTuple):
    """A graph, with what an exporter asks about it.

    module: computes it. example: inputs to trace with. inputs, outputs: by name, the axes without a fixed size.
    """

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]


def graphs(checkpoint: Checkpoint) -> dict[str, Exported]:
    """Returns the three graphs in float32, by name."""
    dims, model = checkpoint.dims, OpenAIWhisper(checkpoint.dims)
    model.load_state_dict(checkpoint.tensors)
    model.float().eval().requires_grad_(False)
    mel = torch.zeros(1, dims.n_mels, 2 * dims.n_audio_ctx)
    features = torch.zeros(1, dims.n_audio_ctx, dims.n_audio_state)
    tokens = torch.zeros(BATCH, 2, dtype=torch.int64)
    head, channel = dims.n_text_head, dims.n_text_state // dims.n_text_head
    own = [torch.zeros(BATCH, head, 3, channel)] * (2 * dims.n_text_layer)
    cross = [torch.zeros(1, head, dims.n_audio_ctx, channel)] * (2 * dims.n_text_layer)
    parts = [f"{part}.{layer}" for layer in range(dims.n_text_layer) for part in ("key", "value")]
    names = {kind: [f"{kind}.{part}" for part in parts] for kind in ("own", "cross", "next")}
    fixed = dict.fromkeys(names["cross"], ())
    growing, grown = (dict.fromkeys(names[kind], (0, 2)) for kind in ("own", "next"))
    return {
        "encoder": Exported(model.encoder, (mel,), {"mel": ()}, {"features": ()}),
        "cross": Exported(Cross(model), (features,), {"features": ()}, fixed),
        "step": Exported(
            Step(model), (tokens, *own, *cross), {"tokens": (0, 1), **growing, **fixed}, {"logits": (0, 1), **grown}
        ),
    }


def heads(x: Tensor, attention: Any) -> Tensor:
    """Turns (batch, token, state) to (batch, head, token, channel)."""
    return x.unflatten(2, (attention.n_head, -1)).transpose(1, 2)


class Cross(nn.Module):
    def __init__(self, model: OpenAIWhisper):
        super().__init__()
        self.attentions: Any = nn.ModuleList(block.cross_attn for block in model.decoder.blocks)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(heads(project(features), each) for each in self.attentions for project in (each.key, each.value))


class Step(nn.Module):
    def __init__(self, model: OpenAIWhisper):
        super().__init__()
        self.decoder: Any = model.decoder

    def forward(self, tokens: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        own, cross = cache[: len(cache) // 2], cache[len(cache) // 2 :]
        n_past, n_token = own[0].shape[2], tokens.shape[1]
        position = torch.arange(n_past + n_token)
        # Each token sees those before it and itself.
        visible = position[None, :] <= position[n_past:, None]
        x = self.decoder.token_embedding(tokens) + self.decoder.positional_embedding[n_past : n_past + n_token]
        kept: list[Tensor] = []
        for i, block in enumerate(self.decoder.blocks):
            h = block.attn_ln(x)
            k = torch.cat([own[2 * i], heads(block.attn.key(h), block.attn)], 2)
            v = torch.cat([own[2 * i + 1], heads(block.attn.value(h), block.attn)], 2)
            kept += [k, v]
            x = x + self.attend(block.attn, h, k, v, visible)
            x = x + self.attend(block.cross_attn, block.cross_attn_ln(x), cross[2 * i], cross[2 * i + 1], None)
            x = x + block.mlp(block.mlp_ln(x))
        logits = self.decoder.ln(x) @ self.decoder.token_embedding.weight.T
        return logits, *kept

    def attend(self, attention: Any, x: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        q = heads(attention.query(x), attention)
        return attention.out(scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2))


class Backend(ABC):
    """An engine that holds the three graphs. It keeps the caches of one text, or of the beams of one."""

    @abstractmethod
    def encode(self, mel: np.ndarray) -> np.ndarray:
        """Encodes (1, n_mels, 3000) to (1, n_audio_ctx, state)."""

    @abstractmethod
    def start(self, features: np.ndarray, batch: int) -> None:
        """Fills the cache of the audio and empties the own one."""

    @abstractmethod
    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the logits of tokens, int64 (batch, token), and puts these into the own cache."""

    @abstractmethod
    def rearrange(self, source_indices: list[int]) -> None:
        """Puts row `source_indices[i]` of the own cache in the place of row i."""

    def empty(self, dims: ModelDimensions, batch: int) -> np.ndarray:
        """Returns an own cache of one layer's keys or values without tokens."""
        return np.zeros((batch, dims.n_text_head, 0, dims.n_text_state // dims.n_text_head), np.float32)


class BackendInference(decoding.Inference):
    """The forward pass of openai-whisper's loop."""

    def __init__(self, model: "HostedWhisper", initial_token_length: int):
        self.backend, self.initial_token_length = model.backend, initial_token_length

    def logits(self, tokens: Tensor, audio_features: Tensor) -> Tensor:
        if tokens.shape[1] == self.initial_token_length:
            self.backend.start(audio_features.numpy(), len(tokens))
        else:
            tokens = tokens[:, -1:]
        return torch.from_numpy(self.backend.step(tokens.numpy()))

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        if source_indices != list(range(len(source_indices))):
            self.backend.rearrange(source_indices)


class DecodingTask(decoding.DecodingTask):
    __init__ = rebind(decoding.DecodingTask.__init__, PyTorchInference=BackendInference)


class HostedEncoder(nn.Module):
    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend

    def forward(self, mel: Tensor) -> Tensor:
        return torch.from_numpy(self.backend.encode(mel.numpy()))


class HostedWhisper(OpenAIWhisper):
    """openai-whisper's object and all of its code, with the network in a backend."""

    decode = torch.no_grad()(rebind(inspect.unwrap(decoding.decode), DecodingTask=DecodingTask))

    def __init__(self, dims: ModelDimensions, backend: Backend):
        nn.Module.__init__(self)  # not OpenAI's, which would build the network in PyTorch
        self.dims, self.backend = dims, backend
        self.encoder = HostedEncoder(backend)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")
