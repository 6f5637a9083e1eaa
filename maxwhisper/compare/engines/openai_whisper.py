"""PyTorch Whisper, the reference of every comparison."""

from pathlib import Path

import numpy as np
import torch
import whisper

from .openai_like import OpenAILike


class Adapter(OpenAILike):
    def load(self, folder: Path) -> None:
        torch.set_num_threads(self.task.threads)
        self.model = whisper.load_model(str(folder / "model.pt"), device="cpu").float()

    def detect_language(self, mel: np.ndarray) -> str:
        _, probabilities = self.model.detect_language(torch.from_numpy(mel))
        return max(probabilities, key=probabilities.get)
