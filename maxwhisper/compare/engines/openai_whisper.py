"""PyTorch Whisper, the reference of every comparison."""

from pathlib import Path

import numpy as np
import torch
import whisper

from .openai_like import OpenAILike


class Adapter(OpenAILike):
    def load(self, folder: Path) -> None:
        torch.set_num_threads(self.task.threads)
        # The float32 of a GPU is to be float32: convolutions would be TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.model = whisper.load_model(str(folder / "model.pt"), device=self.device).float()

    def detect_language(self, mel: np.ndarray) -> str:
        _, probabilities = self.model.detect_language(torch.from_numpy(mel).to(self.device))
        return max(probabilities, key=probabilities.get)
