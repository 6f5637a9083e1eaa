"""This package."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from max.driver import Device, DeviceEvent
from whisper.audio import SAMPLE_RATE

from ...batched import transcribe_batched
from ...decoding.speculative import WORTH_PROPOSING
from ...engine.session import find_device
from ...rebind import Segments
from ...whisper import load_model
from . import precision
from .openai_like import OpenAILike


class Adapter(OpenAILike):
    def load(self, folder: Path) -> None:
        artifacts, dtype = self.task.artifacts, precision(self.variant)
        self.model = load_model(folder / "model.pt", self.task.device, artifacts=artifacts, dtype=dtype)

    @cached_property
    def max_device(self) -> Device:
        return find_device(self.task.device)

    def synchronize(self) -> None:
        self.max_device.synchronize()
        super().synchronize()

    def event(self) -> Any:
        """Puts an event on MAX's queue, where the network runs: PyTorch has one of its own."""
        if self.task.device == "cpu":
            return None
        event = DeviceEvent(self.max_device, enable_timing=True)
        self.max_device.default_queue.record_event(event)
        return event

    def tell_segments(self, tell: Callable[[Segments], None], audio: np.ndarray, **options: Any) -> None:
        self.model.transcribe(audio, on_segments=tell, **options)

    def prepare(self, folder: Path) -> None:
        """Compiles every graph that is used, into the folder where `load_model` keeps them."""
        self.load(folder)
        silence = np.zeros((self.model.dims.n_mels, 2 * self.model.dims.n_audio_ctx), np.float32)
        for n_token in (2, 1 + WORTH_PROPOSING):  # not proposed, and proposed
            self.generate(self.encode(silence), n_token)
        # The spectrogram compiles when it is first used. Nothing follows the 30 s of zeros appended to the audio.
        self.model.transcribe(np.zeros(SAMPLE_RATE, np.float32), language="en", temperature=0.0, sample_len=2)


class Batched(Adapter):
    """Decodes several pieces of a recording together."""

    def windows(self, mels: np.ndarray, n_tokens: int) -> list[list[int]]:
        # The encoder takes one after the other, as in `transcribe_batched`.
        features = (torch.cat([self.encode(mel) for mel in batch]) for batch in self.batches(mels))
        return [tokens for batch in features for tokens in self.decoded(batch, n_tokens)]

    def tell_segments(self, tell: Callable[[Segments], None], audio: np.ndarray, **options: Any) -> None:
        tell(transcribe_batched(self.model, audio, self.task.batch_size, **options)["segments"])
