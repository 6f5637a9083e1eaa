"""The log-mel spectrogram as a graph."""

import math

import torch
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, Weight, ops
from max.nn.layer import Module
from whisper.audio import HOP_LENGTH, N_FFT, mel_filters

from ..engine.program import Program
from ..errors import OptionError
from .products import convolution

N_BINS = N_FFT // 2 + 1
"""Frequencies of the Fourier transform of a frame, from 0 to SAMPLE_RATE / 2."""
N_ROWS = -(-N_BINS // 16) * 16
"""N_BINS, and as many zeros behind them as fill a kernel's vectors."""
PIECE = math.gcd(N_FFT, HOP_LENGTH)
"""Samples in what overlapping frames are put together from."""
LOG_MEL = "log_mel"
"""The name of the graph and of the unit, and what the names of its weights begin with."""
N_MELS = (80, 128)
"""Filter banks that openai-whisper ships: 128 bands for large-v3 and turbo, 80 for all others."""


class LogMelSpectrogram(Module):
    """The log-mel spectrogram of one waveform: openai-whisper's `log_mel_spectrogram`, after its padding.

    audio: float32 (samples,), any number of samples above N_FFT // 2. Returns float32 (n_mels, samples // HOP_LENGTH).
    Weights, as `log_mel_weights` makes them, behind "log_mel.":
        fourier  (2 * N_ROWS, PIECE, N_FFT // PIECE)  Hann window times Fourier basis, cosines before sines
        filters  (n_mels, N_ROWS)                     mel filter bank

    The Fourier transform is a convolution over pieces of the waveform with its matrix. It rounds like a sum of N_FFT
    terms, a fast transform like one of log2(N_FFT).
    """

    def __init__(self, n_mels: int, device: DeviceRef):
        super().__init__()
        self.fourier = Weight("fourier", DType.float32, [2 * N_ROWS, PIECE, N_FFT // PIECE], device)
        self.filters = Weight("filters", DType.float32, [n_mels, N_ROWS], device)

    def __call__(self, audio: TensorValue) -> TensorValue:
        mel = self.mel(self.power(audio))
        mel = ops.max(mel, ops.constant(1e-10, DType.float32, audio.device))
        # OpenAI's (max(log10(mel), top - 8) + 4) / 4, with the division by 4 folded into the logarithm's base.
        log_mel = ops.log(mel) * (math.log10(math.e) / 4) + 1
        top = ops.max(ops.max(log_mel, axis=0), axis=1)
        total = ops.sum(audio, axis=0)
        # What is no number in the audio, since MAX's maximum passes over NaN, where PyTorch's gives it.
        lost = ops.where(ops.is_nan(total) | ops.is_inf(total), total, ops.constant(0, DType.float32, audio.device))
        return ops.transpose(ops.max(log_mel, top - 2) + lost, 0, 1)

    def power(self, audio: TensorValue) -> TensorValue:
        """Turns (samples,) to (frame, N_ROWS): frame i is centred on sample i * HOP_LENGTH, the ends mirrored."""
        n_frames = audio.shape[0] // HOP_LENGTH
        stride, taps = HOP_LENGTH // PIECE, N_FFT // PIECE
        n_pieces = (n_frames - 1) * stride + taps
        padded = ops.pad(audio, [N_FFT // 2, N_FFT // 2], mode="reflect")
        pieces = padded[: n_pieces * PIECE].reshape((1, n_pieces, PIECE))
        spectrum = ops.squeeze(convolution(pieces, self.fourier, stride, n_frames), 0)
        real, imaginary = spectrum[:, :N_ROWS], spectrum[:, N_ROWS:]
        return real * real + imaginary * imaginary

    def mel(self, power: TensorValue) -> TensorValue:
        """Turns (frame, N_ROWS) to (frame, n_mels)."""
        return ops.squeeze(convolution(ops.unsqueeze(power, 0), self.filters, n_y=power.shape[0]), 0)


def log_mel_weights(n_mels: int) -> dict[str, torch.Tensor]:
    """Returns the weights of the graph, by name, float32, computed in float64; the filter bank is openai-whisper's.

    Raises OptionError for a number of mel bands that openai-whisper has no filter bank for.
    """
    if n_mels not in N_MELS:
        raise OptionError(f"n_mels is one of {N_MELS}, not {n_mels}")
    sample = torch.arange(N_FFT, dtype=torch.float64)
    turns = torch.arange(N_BINS).unsqueeze(1) * sample % N_FFT / N_FFT
    window = torch.hann_window(N_FFT, periodic=True, dtype=torch.float64)
    basis = window * torch.stack([torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)])
    unused = N_ROWS - N_BINS
    rows = torch.nn.functional.pad(basis, (0, 0, 0, unused))  # (2, N_ROWS, N_FFT)
    return {
        f"{LOG_MEL}.fourier": rows.reshape(2 * N_ROWS, -1, PIECE).mT.float().contiguous(),
        f"{LOG_MEL}.filters": torch.nn.functional.pad(mel_filters("cpu", n_mels), (0, unused)),
    }


def log_mel_program(n_mels: int) -> Program:
    """Returns the graph of `LogMelSpectrogram` on the CPU, where openai-whisper computes it too."""
    cpu = DeviceRef.CPU()
    inputs = {"audio": TensorType(DType.float32, ["samples"], cpu)}
    return Program(LOG_MEL, LOG_MEL, LogMelSpectrogram(n_mels, cpu), lambda m, audio: (m(audio),), inputs)
