"""The times of words: openai-whisper's search for them, with scores that MAX has computed."""

import logging
from collections.abc import Callable
from functools import cache
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numba.core.caching import NullCache
from whisper import timing

from .rebind import rebind

log = logging.getLogger("maxwhisper")

ALIGNING = RLock()
"""Held by the thread that is in openai-whisper's search: it has all attention of the process computed without
`scaled_dot_product_attention`, which the second of two threads would leave so for ever; and of numba's ways to use
several cores, one ends a process where two threads do."""


class Attention:
    """What `find_alignment` takes for a layer's cross-attention: a place for its hook."""

    def __init__(self) -> None:
        self.hooks: list[Callable[..., Any]] = []

    def register_forward_hook(self, hook: Callable[..., Any]) -> SimpleNamespace:
        """Returns what `find_alignment` removes the hook with, which ends with it."""
        self.hooks.append(hook)
        return SimpleNamespace(remove=lambda: None)


class Scored:
    """What `find_alignment` takes for a model, for one call: threads that share the model do not meet in its hooks."""

    def __init__(self, model: Any):
        self.model = model
        self.dims, self.device, self.alignment_heads = model.dims, model.device, model.alignment_heads
        blocks = [SimpleNamespace(cross_attn=Attention()) for _ in range(model.dims.n_text_layer)]
        self.decoder = SimpleNamespace(blocks=blocks)

    def __call__(self, mel: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits, scores = self.model.decoder.alignment(tokens, self.model.encoder(mel))
        for block, qk in zip(self.decoder.blocks, scores, strict=True):
            for hook in block.cross_attn.hooks:
                hook(block.cross_attn, (), (None, qk))
        return logits


def find_alignment(model: Any, *args: Any, **kwargs: Any) -> list[timing.WordTiming]:
    """Finds the times of words as openai-whisper does; through the model's own hooks only where it has others."""
    with ALIGNING:
        return timing.find_alignment(model if model.decoder.hooked() else Scored(model), *args, **kwargs)


add_word_timestamps = rebind(timing.add_word_timestamps, find_alignment=find_alignment)


@cache
def keep_alignment_compiled() -> None:
    """Has numba keep the search for word timestamps, which openai-whisper has it compile in every process, in seconds;
    in its own folder of caches, if there is one that can be written to."""
    for function, example in (
        (timing.backtrace, np.zeros((2, 2), np.float32)),  # first, since the other one compiles it too
        (timing.dtw_cpu, np.zeros((1, 1))),
    ):
        try:
            function.enable_caching()
            with ALIGNING:
                function(example)
        except Exception as error:  # the times of words are found without a cache as well
            log.info("the search for word timestamps is compiled in every process: %s", error)
            function._cache = NullCache()
