"""CTranslate2, as faster-whisper's users run it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper.transcribe import get_ctranslate2_storage

from ...engine.cuda import find, load, locations
from .base import Engine, Task


def load_cublas() -> None:
    """Loads libcublas.so.12, which CTranslate2 opens by name, from where pip puts it: no dynamic loader looks there."""
    for libraries in find(locations()):
        if libraries.major == 12 and libraries.usable:
            load(libraries)
            return


class Adapter(Engine):
    def load(self, folder: Path) -> None:
        threads, device = self.task.threads, "cpu"
        if self.task.device == "gpu":
            device = "cuda"
            load_cublas()
        self.model = WhisperModel(
            str(folder), device=device, compute_type=self.variant, cpu_threads=threads, local_files_only=True
        )

    def encode(self, mel: np.ndarray) -> Any:
        return self.encoded(mel[None])

    def encoded(self, mels: np.ndarray) -> Any:
        """Returns the features of (window, n_mels, 3000)."""
        return self.model.model.encode(get_ctranslate2_storage(mels))

    def generate(self, features: Any, n_tokens: int) -> list[int]:
        return self.decoded(features, 1, n_tokens)[0]

    def decoded(self, features: Any, n_window: int, n_tokens: int) -> list[list[int]]:
        """Generates as `generate` does, for each of so many windows."""
        # CTranslate2 stops at half of max_length, or when text and prompt, less one token, are as long as it.
        max_length = max(2 * n_tokens, n_tokens + len(self.task.prompt) - 1)
        results = self.model.model.generate(
            features,
            [self.task.prompt] * n_window,
            beam_size=self.task.beam_size or 1,
            max_length=max_length,
            suppress_tokens=[*self.task.suppress, self.task.eot],
        )
        return [result.sequences_ids[0] for result in results]

    def transcribe(self, audio: np.ndarray, language: str, tell: Callable[[list[int]], None]) -> None:
        segments, _ = self.model.transcribe(
            audio, language=language, beam_size=self.task.beam_size or 1, temperature=0.0, vad_filter=False
        )
        for segment in segments:
            tell(segment.tokens)


class Batched(Adapter):
    """Decodes several pieces of a recording at a time by faster-whisper's own pipeline."""

    def __init__(self, variant: str, task: Task):
        super().__init__("float16" if task.device == "gpu" else "float32", task)

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.pipeline = BatchedInferencePipeline(self.model)

    def windows(self, mels: np.ndarray, n_tokens: int) -> list[list[int]]:
        return [
            tokens for batch in self.batches(mels) for tokens in self.decoded(self.encoded(batch), len(batch), n_tokens)
        ]

    def transcribe(self, audio: np.ndarray, language: str, tell: Callable[[list[int]], None]) -> None:
        segments, _ = self.pipeline.transcribe(
            audio,
            language=language,
            beam_size=self.task.beam_size or 1,
            temperature=0.0,
            without_timestamps=False,
            batch_size=self.task.batch_size,
        )
        for segment in segments:
            tell(segment.tokens)
