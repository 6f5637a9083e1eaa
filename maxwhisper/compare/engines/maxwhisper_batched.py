"""This package, with several pieces of a recording decoded together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...batched import transcribe_batched
from ...rebind import Segments
from . import maxwhisper


class Adapter(maxwhisper.Adapter):
    def windows(self, mels: np.ndarray, n_tokens: int) -> list[list[int]]:
        # The encoder takes one after the other, as in `transcribe_batched`.
        features = (torch.cat([self.encode(mel) for mel in batch]) for batch in self.batches(mels))
        return [tokens for batch in features for tokens in self.decoded(batch, n_tokens)]

    def tell_segments(self, tell: Callable[[Segments], None], audio: np.ndarray, **options: Any) -> None:
        tell(transcribe_batched(self.model, audio, self.task.batch_size, **options)["segments"])
