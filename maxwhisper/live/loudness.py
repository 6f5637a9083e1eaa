"""Where a recording is quiet: what costs nothing to know, and spares the encoder a silence."""

from collections import deque

import numpy as np
from whisper.audio import SAMPLE_RATE

FRAME = SAMPLE_RATE // 50
"""Samples whose loudness is looked at together, 20 ms."""
REMEMBERED, PAUSES = 500, 0.1
"""Frames, 10 s, and the share of them that is as quiet as the room: between words, if nowhere else."""
QUIET = 0.001
"""Root mean square, -60 dB, below which nobody speaks."""
ABOVE_NOISE = 2.5
"""How many times as loud as the room, 8 dB, speech is at least."""


PAUSE = 6
"""Frames, 0.12 s, that are quiet together between sentences."""


def quietest(samples: np.ndarray, start: int, end: int) -> int:
    """Returns the middle of the frames between two samples that are quietest together; the start if there are too few.
    samples: float32 (sample,)."""
    start, end = max(start, 0), min(end, len(samples))
    powers = powers_of(samples[start:end])
    if len(powers) < PAUSE:
        return start
    return start + (int(np.convolve(powers, np.ones(PAUSE), "valid").argmin()) + PAUSE // 2) * FRAME


def powers_of(samples: np.ndarray) -> np.ndarray:
    """Returns the mean square of every whole frame, float64 (frame,)."""
    n_whole = len(samples) // FRAME
    return (samples[: n_whole * FRAME].reshape(n_whole, FRAME).astype(np.float64) ** 2).mean(1)


class Loudness:
    """Says how far a recording is loud: louder than QUIET, and than the room."""

    def __init__(self) -> None:
        self.loud_until = 0
        self.heard = 0
        self.rest = np.zeros(0, np.float32)
        self.frames: deque[float] = deque(maxlen=REMEMBERED)

    def listen(self, samples: np.ndarray) -> None:
        """Takes the next samples, float32 (sample,), after which `loud_until` is the end of the last loud frame, in
        samples since the beginning."""
        samples = np.concatenate([self.rest, samples])
        n_whole = len(samples) // FRAME
        self.rest = samples[n_whole * FRAME :]
        self.frames.extend(np.sqrt(powers_of(samples)).tolist())
        new = np.array(self.frames)[len(self.frames) - min(n_whole, len(self.frames)) :]
        self.heard += n_whole * FRAME
        if len(new) and (loud := np.flatnonzero(new > max(QUIET, ABOVE_NOISE * np.quantile(self.frames, PAUSES)))).size:
            self.loud_until = self.heard - (len(new) - 1 - int(loud[-1])) * FRAME
