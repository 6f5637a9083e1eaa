"""This package."""

from pathlib import Path

import numpy as np
from whisper.audio import SAMPLE_RATE

from ...speculation import WORTH_GUESSING
from ...whisper import load_model
from .openai_like import OpenAILike


class Adapter(OpenAILike):
    def load(self, folder: Path) -> None:
        self.model = load_model(folder / "model.pt", dtype="bfloat16" if self.variant == "bfloat16" else "float32")

    def prepare(self, folder: Path) -> None:
        """Compiles every graph that is used, into the folder where `load_model` keeps them."""
        self.load(folder)
        silence = np.zeros((self.model.dims.n_mels, 2 * self.model.dims.n_audio_ctx), np.float32)
        for n_token in (2, 1 + WORTH_GUESSING):  # not guessed, and guessed
            self.generate(self.encode(silence), n_token)
        # The spectrogram compiles when it is first used. Nothing follows the 30 s of zeros appended to the audio.
        self.model.transcribe(np.zeros(SAMPLE_RATE, np.float32), language="en", temperature=0.0, sample_len=2)
