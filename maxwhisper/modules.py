"""Encoder and decoder: openai-whisper's modules, whose networks run on MAX.

What is asked of the modules inside, by hooks, for gradients or for a trace, is computed by openai-whisper's own code,
in PyTorch.
"""

from typing import Any

import torch
from whisper import model as openai
from whisper.model import ModelDimensions

from .compiled import Network
from .decoding.cache import KeyValueCache, named
from .decoding.stepper import check_room
from .engine.surroundings import one_torch_thread
from .errors import AudioError, OptionError
from .frozen import HOOKS, Frozen, without_memory
from .options import FLOATS, check_dense


def check_floats(name: str, x: torch.Tensor) -> None:
    """Raises OptionError for what is no tensor of floats, which alone are neither read as something else nor lost, and
    for a batch without a window."""
    if not isinstance(x, torch.Tensor):
        raise OptionError(f"{name} is a {type(x).__name__}, expected a tensor: torch.as_tensor makes one of an array")
    if x.dtype not in FLOATS:
        raise OptionError(f"{name} is {x.dtype}, expected floats of 16, 32 or 64 bits")
    check_dense(name, x)
    if not torch.jit.is_tracing() and not x.numel():
        raise OptionError(f"{name} is {tuple(x.shape)}, expected a window or more")


class AudioEncoder(Frozen, openai.AudioEncoder):
    """Log-mel to audio features."""

    def __init__(self, dims: ModelDimensions, network: Network, device: torch.device):
        with without_memory():
            super().__init__(dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer)
        self.dims = dims
        self.hold(network, network.tensors("encoder"), device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encodes a mel x ([batch,] n_mels, 2 * n_audio_ctx) to ([batch,] n_audio_ctx, state), in the dtype of x.

        It is computed in PyTorch while modules inside have hooks, or x requires a gradient that is not switched off.

        Raises AudioError for another shape, or for values that are not finite, and OptionError for what is no tensor of
        floats, or if weights were changed.
        """
        check_floats("mel", x)
        self.check_unchanged()
        if not torch.jit.is_tracing():
            self._check(x)
        batch = x if x.ndim == 3 else x[None]
        if reason := self.why_pytorch(x):
            self.pytorch(reason)
            features = super().forward(batch)
        else:
            features = self._on_max(batch)
        return features if x.ndim == 3 else features[0]

    def _check(self, mel: torch.Tensor) -> None:
        expected = (self.dims.n_mels, 2 * self.dims.n_audio_ctx)
        if mel.ndim not in (2, 3) or mel.shape[-2:] != expected:
            raise AudioError(f"mel is {tuple(mel.shape)}, expected {expected} or a batch of these")

    @one_torch_thread()
    def _on_max(self, mel: torch.Tensor) -> torch.Tensor:
        computed = mel.to(self.network.dtype)
        if not all(extreme.isfinite() for extreme in computed.aminmax()):
            raise AudioError(f"mel holds values that are not finite in {self.network.dtype}")
        return self.network["encoder"](mel=computed.to(self.device))[0].to(mel.dtype)


class TextDecoder(Frozen, openai.TextDecoder):
    """Tokens and audio features to logits."""

    blocks: Any

    def __init__(self, dims: ModelDimensions, network: Network, device: torch.device):
        with without_memory():
            super().__init__(dims.n_vocab, dims.n_text_ctx, dims.n_text_state, dims.n_text_head, dims.n_text_layer)
        self.register_buffer(
            "mask",
            torch.full((dims.n_text_ctx, dims.n_text_ctx), -torch.inf, dtype=torch.float32).triu_(1),
            persistent=False,
        )
        self.dims = dims
        self.hold(network, network.tensors("decoder"), device)

    def forward(
        self, x: torch.Tensor, xa: torch.Tensor, kv_cache: Any = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the logits of tokens x (batch, token) given audio features xa (audio, n_audio_ctx, state), as float32
        (batch, token, n_vocab).

        positions: (position,) int64, with an empty cache; the logits are then of the tokens there alone.

        xa may have fewer rows than x: consecutive texts then share one. With a cache of `install_kv_cache_hooks`, the
        first call takes a text from its start and fills the cache; each later one takes one more token and needs xa no
        longer. With a dict that hooks fill, this is openai-whisper's forward, in PyTorch.

        While a block's `cross_attn` has forward hooks, no cache is given and `disable_sdpa` holds, as where
        openai-whisper looks for the times of words, all these hooks receive their layer's scores as outputs[-1], and
        None as the other output. With other hooks inside, or features that require a gradient that is not switched off,
        this is openai-whisper's forward, in PyTorch.

        Raises OptionError for tokens or features that the model has no room for, or if weights were changed.
        """
        cache = kv_cache if isinstance(kv_cache, KeyValueCache) else KeyValueCache()
        if cache:
            cache.settle()
        else:
            self.check_unchanged()
        if not torch.jit.is_tracing():
            self._check(x, xa, cache, positions)
        reason = self.why_pytorch(xa)
        if kv_cache and not cache:
            reason = reason or "the cache is not of install_kv_cache_hooks"
        if reason is None:
            return self._on_max(x, xa, cache, positions)
        if reason == HOOKS and kv_cache is None and self._wants_scores():
            logits, changed = self._aligned(x, xa)
            if not changed:
                return logits
            reason = "hooks have outputs of their own"
        if isinstance(kv_cache, KeyValueCache):
            raise OptionError(f"{reason}, unlike when this cache was made: use torch.no_grad(), or make another")
        self.pytorch(reason)
        logits = super().forward(x, xa, kv_cache)
        return logits if positions is None else logits[:, positions]

    @one_torch_thread()
    def _on_max(
        self, x: torch.Tensor, xa: torch.Tensor, cache: KeyValueCache, positions: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.to(self.device, torch.int64)
        if cache:
            offset = torch.tensor(cache.n_token, device="cpu")
            logits, *new = self.network["decoder.step"](tokens=x, offset=offset, **cache.inputs())
            cache.append(new, self.dims.n_text_ctx)
            return logits
        cross = self._keys_values(xa)
        if positions is not None:
            given = {"tokens": x, "positions": positions.to(self.device), **named(cross=cross)}
            logits, *new = self.network["decoder.start"](**given)
        else:
            logits, *new = self.network["decoder.prefill"](tokens=x, **named(cross=cross))
        cache.cross = cross
        cache.append(new, self.dims.n_text_ctx)
        return logits

    def _keys_values(self, xa: torch.Tensor) -> list[torch.Tensor]:
        return self.network["decoder.keys_values"](audio_features=xa.to(self.device, self.network.dtype))

    def _wants_scores(self) -> bool:
        """Returns whether all hooks inside are such as openai-whisper looks for the times of words with."""
        attentions = [block.cross_attn for block in self.blocks]
        return not openai.MultiHeadAttention.use_sdpa and all(
            module in attentions and not module._forward_pre_hooks and not module._forward_hooks_with_kwargs
            for module in self.hooked()
        )

    def _aligned(self, x: torch.Tensor, xa: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Returns the logits, and whether a hook that received scores gave something in their place."""
        logits, scores = self.alignment(x, xa)
        given = [
            hook(block.cross_attn, (), (None, qk))
            for block, qk in zip(self.blocks, scores, strict=True)
            for hook in list(block.cross_attn._forward_hooks.values())
        ]
        return logits, any(each is not None for each in given)

    @one_torch_thread()
    def alignment(self, x: torch.Tensor, xa: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the logits of tokens as `forward` takes them, and of every layer the scores of cross-attention before
        softmax, float32 (batch, head, token, n_audio_ctx)."""
        tokens, cross = x.to(self.device, torch.int64), named(cross=self._keys_values(xa))
        logits, *scores = self.network["decoder.alignment"](tokens=tokens, **cross)
        return logits, [qk.float() for qk in scores]

    def _check(self, x: torch.Tensor, xa: torch.Tensor, cache: KeyValueCache, positions: torch.Tensor | None) -> None:
        dims = self.dims
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
            found = x.dtype if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
            raise OptionError(f"tokens are {found}, expected a tensor of torch.int64 or torch.int32")
        check_dense("tokens", x)
        if x.ndim != 2 or 0 in x.shape:
            raise OptionError(f"tokens are {tuple(x.shape)}, expected (batch, token)")
        if not 0 <= x.min() <= x.max() < dims.n_vocab:
            raise OptionError(f"tokens reach from {x.min()} to {x.max()}, the vocabulary from 0 to {dims.n_vocab - 1}")
        if positions is not None and (cache or not 0 <= positions.min() <= positions.max() < x.shape[1]):
            raise OptionError(
                f"positions {positions.tolist()} are not all in the {x.shape[1]} tokens of a text's start"
            )
        check_room(cache.n_token + x.shape[1], dims.n_text_ctx)
        if cache:
            if x.shape != (len(cache.own[0]), 1):
                raise OptionError(f"tokens are {tuple(x.shape)}, expected {(len(cache.own[0]), 1)} behind this cache")
            return
        check_floats("xa", xa)
        if xa.ndim != 3 or xa.shape[1:] != (dims.n_audio_ctx, dims.n_audio_state):
            expected = f"(audio, {dims.n_audio_ctx}, {dims.n_audio_state})"
            raise OptionError(f"audio features are {tuple(xa.shape)}, expected {expected}")
        if len(x) % len(xa):
            raise OptionError(f"{len(x)} texts cannot share {len(xa)} rows of audio features evenly")
