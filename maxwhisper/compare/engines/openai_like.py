"""What engines have in common whose object behaves as openai-whisper's `Whisper`."""

from typing import Any

import numpy as np
import torch
from whisper.decoding import DecodingOptions

from .base import Engine


class OpenAILike(Engine):
    """`load` sets `model`."""

    model: Any

    def encode(self, mel: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.encoder(torch.from_numpy(mel)[None])

    def generate(self, features: torch.Tensor, n_tokens: int) -> list[int]:
        return self.decoded(features, n_tokens)[0]

    def decoded(self, features: torch.Tensor, n_tokens: int) -> list[list[int]]:
        """As `generate`, for each of (window, n_audio_ctx, state)."""
        options = DecodingOptions(
            language="en",
            temperature=0.0,
            sample_len=n_tokens,
            beam_size=self.task.beam_size,
            suppress_tokens=[*self.task.suppress, self.task.eot],
            without_timestamps=True,
            fp16=False,
        )
        return [result.tokens for result in self.model.decode(features, options)]

    def transcribe(self, audio: np.ndarray, language: str) -> list[int]:
        options = {"temperature": 0.0, "beam_size": self.task.beam_size, "fp16": False}
        result = self.result(audio, language=language, verbose=None, **options)
        return [token for segment in result["segments"] for token in segment["tokens"]]

    def result(self, audio: np.ndarray, **options: Any) -> dict[str, Any]:
        """What openai-whisper's `transcribe` returns, with its options."""
        return self.model.transcribe(audio, **options)
