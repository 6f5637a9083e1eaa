"""openai-whisper's decode loop over MAX: its sampling, beam search and rules untouched, the forward pass ours."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from whisper import decoding

KV = list[torch.Tensor]


def rebind(function: FunctionType, **names: Any) -> Callable[..., Any]:
    """A copy of `function` that reads `names` where the original reads the globals of its module.

    So the library's own code runs over MAX, and the library itself stays as it is for everyone else.
    """
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@dataclass
class KeyValueCache:
    """What the decoder keeps between calls; empty, and false, until the first one.

    own: keys and values of the text so far, layer by layer, each (batch, head, token, channel).
    cross: keys and values of the audio, layer by layer, each (audio, head, n_audio_ctx, channel).
    """

    own: KV = field(default_factory=list)
    cross: KV = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.own)

    @property
    def n_token(self) -> int:
        """How many tokens the cache holds."""
        return self.own[0].shape[2] if self.own else 0


class MaxInference(decoding.Inference):
    """The forward pass of the decode loop: the first call takes the whole prompt, later ones the last token."""

    def __init__(self, model: Any, initial_token_length: int):
        self.model = model
        self.initial_token_length = initial_token_length
        self.cache = KeyValueCache()

    def logits(self, tokens: torch.Tensor, audio_features: torch.Tensor) -> torch.Tensor:
        if tokens.shape[-1] > self.initial_token_length:
            tokens = tokens[:, -1:]
        return self.model.decoder(tokens, audio_features, kv_cache=self.cache)

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        # The audio's keys and values stay: all beams of a window share them.
        if source_indices != list(range(len(source_indices))):
            self.cache.own = [kv[source_indices] for kv in self.cache.own]

    def cleanup_caching(self) -> None:
        self.cache = KeyValueCache()


class DecodingTask(decoding.DecodingTask):
    """openai-whisper's decoding of a window, its forward passes through `MaxInference`."""

    __init__ = rebind(decoding.DecodingTask.__init__, PyTorchInference=MaxInference)

    def run(self, mel: torch.Tensor) -> list[decoding.DecodingResult]:
        """Decodes windows (batch, n_mels, frame): together, or one by one where each has several sequences, since
        openai-whisper's loop then takes only one window."""
        run = super().run
        if self.n_group == 1:
            return run(mel)
        return [result for window in mel for result in run(window[None])]


decode = torch.no_grad()(rebind(inspect.unwrap(decoding.decode), DecodingTask=DecodingTask))
