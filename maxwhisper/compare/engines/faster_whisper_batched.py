"""faster-whisper's own pipeline for several pieces of a recording at a time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from faster_whisper import BatchedInferencePipeline

from . import faster_whisper
from .base import Task


class Adapter(faster_whisper.Adapter):
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
