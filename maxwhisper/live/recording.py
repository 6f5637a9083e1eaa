"""All that a session has heard: on the disk, so that an hour of it takes no memory before its end."""

import tempfile
import weakref
from typing import Any

import numpy as np
import torch
from whisper.audio import SAMPLE_RATE

from ..audio import SAMPLES, as_waveform
from ..errors import AudioError


class Recording:
    """Samples in a file without a name, which is gone with the process."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.n_sample = 0
        self.close = weakref.finalize(self, self.file.close)  # of a session that nobody finishes too

    def __len__(self) -> int:
        return self.n_sample

    def add(self, samples: Any) -> np.ndarray:
        """Takes the next samples, floats (sample,), and returns them as float32.

        Raises OptionError for another shape or dtype, AudioError for a NaN or an infinity, or where the disk is full:
        then none of them are taken.
        """
        waveform = as_waveform(samples, SAMPLES).numpy()
        if not np.isfinite(waveform).all():
            at = len(self) + int(np.flatnonzero(~np.isfinite(waveform))[0])
            raise AudioError(f"audio: sample {at} ({at / SAMPLE_RATE:.3f} s) is not finite")
        try:
            self.file.seek(self.n_sample * waveform.itemsize)
            self.file.write(waveform.tobytes())
            self.file.flush()
        except OSError as error:
            raise AudioError(f"audio: cannot be kept in a temporary file: {error.strerror or error}") from error
        self.n_sample += len(waveform)
        return waveform

    def all(self) -> torch.Tensor:
        """Returns all samples, float32 (sample,)."""
        self.file.seek(0)
        return torch.from_numpy(np.fromfile(self.file, np.float32, self.n_sample))
