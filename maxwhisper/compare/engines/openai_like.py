"""What engines have in common whose object behaves as openai-whisper's `Whisper`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from whisper.decoding import DecodingOptions
from whisper.transcribe import transcribe

from ...rebind import Segments, enumerate_and_tell, rebind
from .on_pytorch import OnPyTorch


class OpenAILike(OnPyTorch):
    """An engine whose `load` sets `model`."""

    model: Any

    @property
    def fp16(self) -> bool:
        return self.variant == "float16"

    def encode(self, mel: np.ndarray) -> torch.Tensor:
        window = torch.from_numpy(mel)[None].to(self.device)
        with torch.inference_mode():
            return self.model.encoder(window.half() if self.fp16 else window)

    def generate(self, features: torch.Tensor, n_tokens: int) -> list[int]:
        return self.decoded(features, n_tokens)[0]

    def generate_batch(self, mels: np.ndarray, n_tokens: int) -> list[list[int]]:
        return self.decoded(torch.from_numpy(mels), n_tokens)

    def decoded(self, windows: torch.Tensor, n_tokens: int) -> list[list[int]]:
        """Returns `n_tokens` of each window, of mel (window, n_mels, 3000) or features (window, n_audio_ctx, state)."""
        options = DecodingOptions(
            language="en",
            temperature=0.0,
            sample_len=n_tokens,
            beam_size=self.task.beam_size,
            suppress_tokens=[*self.task.suppress, self.task.eot],
            without_timestamps=True,
            fp16=self.fp16,
        )
        return [result.tokens for result in self.model.decode(windows, options)]

    def transcribe(self, audio: np.ndarray, language: str, tell: Callable[[list[int]], None]) -> None:
        options = {"temperature": 0.0, "beam_size": self.task.beam_size, "fp16": self.fp16}
        self.tell_segments(
            lambda segments: tell(tokens_of(segments)), audio, language=language, verbose=None, **options
        )

    def tell_segments(self, tell: Callable[[Segments], None], audio: np.ndarray, **options: Any) -> None:
        """Tells the segments of each window of what openai-whisper's `transcribe` returns, with its options."""
        rebind(transcribe, enumerate=partial(enumerate_and_tell, tell))(self.model, audio, **options)

    def transcribe_fixed(self, audio: np.ndarray, n_tokens: int) -> list[int]:
        result = self.model.transcribe(
            audio,
            language="en",
            temperature=0.0,
            beam_size=self.task.beam_size,
            sample_len=n_tokens,
            # From the end of a text on there are only special tokens and timestamps.
            suppress_tokens=[*self.task.suppress, *range(self.task.eot, self.model.dims.n_vocab)],
            without_timestamps=True,
            condition_on_previous_text=False,
            no_speech_threshold=None,
            fp16=False,
            verbose=None,
        )
        return tokens_of(result["segments"])


def tokens_of(segments: Segments) -> list[int]:
    return [token for segment in segments for token in segment["tokens"]]
