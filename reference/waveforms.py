"""Audio as oracle and peer hear it, read by libsndfile and resampled by an FFT, and whether the subject hears the same.

Two right readers of one file differ by what a format leaves to them, and by no more:

- The samples of a 16 kHz file are the file's own, or as near to what its decoder computes as 16 bits are.
- Resamplers differ above their pass-band. Below it both give the same sound, each rounded to 16 bits.
- Opus leaves the resampler behind its speech decoder, and so the phase, to the implementation (RFC 6716, 4.2.9). What
  remains are the magnitudes of the spectrum, by no more than a delay of one sample changes them.
"""

import math
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, SAMPLE_RATE

STEP = 2.0**-15
"""The step between neighbouring samples of 16 bits, full scale being 1."""
CUTOFF, TAPS, BETA = 0.97, 32, 9
"""The cutoff of ffmpeg's resampler over half the sample rate, the length of its filter in samples, and the shape of its
Kaiser window."""
ATTENUATION = BETA / 0.1102 + 8.7
"""In decibels, and the width of the transition below, by Kaiser's formulas (A. Oppenheim, R. Schafer, Discrete-Time
Signal Processing, 7.6)."""
PASSBAND = SAMPLE_RATE / 2 * (CUTOFF - (ATTENUATION - 7.95) / 14.36 / TAPS)
"""In hertz: what lies below it passes the filter."""
RIPPLE = 10 ** (-ATTENUATION / 20)


@cache
def read(path: Path) -> np.ndarray:
    """Reads a file as openai-whisper's `load_audio` has ffmpeg do: float32 (samples,), mono, 16 kHz, of 16 bits."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = resampled(samples.mean(1), rate)
    return ((mono / STEP).round().clip(-1 / STEP, 1 / STEP - 1) * STEP).astype(np.float32)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Returns the same sound at 16 kHz, as far as that can hold it, without a filter of any length."""
    if rate == SAMPLE_RATE:
        return samples
    from scipy.fft import next_fast_len  # whose import takes a second of processor time
    from scipy.signal import resample

    period = rate // math.gcd(rate, SAMPLE_RATE)  # the shortest piece that is whole samples at both rates
    n_period = next_fast_len(len(samples) // period + 2)  # silence, for the end not to run into the start
    padded = np.pad(samples, (0, n_period * period - len(samples)))
    return resample(padded, len(padded) * SAMPLE_RATE // rate)[: math.ceil(len(samples) * SAMPLE_RATE / rate)]


def difference(path: Path, ours: np.ndarray) -> str:
    """Says by what `ours`, float32 (samples,), is another sound than the one in the file; nothing if it is the same.

    Differences that the format leaves to a reader do not count.
    """
    theirs, info = read(path), soundfile.info(path)
    if abs(len(ours) - info.frames * SAMPLE_RATE / info.samplerate) >= 1:
        return f"{path.name} has {len(theirs)} samples at 16 kHz, maxwhisper reads {len(ours)}"
    a, b = (torch.from_numpy(x[: min(len(ours), len(theirs))]).double() for x in (ours, theirs))
    what, found, budget = "the largest difference", float((a - b).abs().max()), STEP
    if info.samplerate == SAMPLE_RATE and info.channels == 1 and info.subtype == "PCM_16":
        budget = 0.0
    elif info.subtype == "OPUS":
        delayed = torch.nn.functional.pad(b, (1, 0))[:-1]
        what = "the magnitudes' RMS difference"
        found, budget = (rms(magnitudes(x) - magnitudes(b)) for x in (a, delayed))
    elif info.samplerate != SAMPLE_RATE:
        what = "the RMS difference in the pass-band"
        found, budget = in_passband(a - b), STEP * math.sqrt(2 / 12) + RIPPLE * rms(b)
    if found <= budget:
        return ""
    return f"{path.name}: {what} is {found / STEP:.3g} steps of 16 bits, at most {budget / STEP:.3g} is right"


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def in_passband(x: Tensor) -> float:
    """Returns the RMS of what a sound (samples,) has in the pass-band."""
    spectrum = torch.fft.rfft(x)
    kept = int(PASSBAND / SAMPLE_RATE * len(x)) + 1
    return float(spectrum[:kept].abs().square().sum().mul(2).sqrt()) / len(x)


def magnitudes(x: Tensor) -> Tensor:
    """Returns the magnitudes of the spectrum in the pass-band, (frequency, frame), in the frames that Whisper hears."""
    window = torch.hann_window(N_FFT, dtype=x.dtype)
    spectrum = torch.stft(x, N_FFT, HOP_LENGTH, window=window, return_complex=True)
    return spectrum[: int(PASSBAND / SAMPLE_RATE * N_FFT)].abs()
