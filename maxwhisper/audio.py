"""From an audio file to what Whisper hears: reading the waveform, and its log-mel spectrogram on MAX.

The constants are openai-whisper's own: a second of audio has SAMPLE_RATE samples, a frame of the spectrogram looks at
N_FFT of them and the next one starts HOP_LENGTH later, a window of CHUNK_LENGTH seconds has N_SAMPLES samples and
N_FRAMES frames.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import groupby
from threading import Event, Lock
from typing import IO

import av
import av.container
import numpy as np
import torch
from whisper.audio import CHUNK_LENGTH, HOP_LENGTH, N_FFT, N_FRAMES, N_SAMPLES, SAMPLE_RATE

from .engine.program import Artifact, Executable
from .engine.surroundings import cpu_by_default, one_torch_thread
from .errors import AudioError, OptionError, warn_once
from .network.log_mel import LogMelSpectrogram, log_mel_program, log_mel_weights
from .options import FLOATS, check_dense, refused, whole
from .pipes import Pipe, is_regular, open_once, status_of

__all__ = [
    "CHUNK_LENGTH",
    "HOP_LENGTH",
    "N_FFT",
    "N_FRAMES",
    "N_SAMPLES",
    "SAMPLE_RATE",
    "LogMelSpectrogram",
    "load_audio",
    "log_mel_spectrogram",
    "log_mel_weights",
]

MAX_DAMAGED = 2 / 3
"""Share of packets that do not decode above which a file counts as undecodable: ffmpeg's default -max_error_rate."""

NOTICEABLE = 0.125
"""Seconds by which sound may be late before viewers notice it, by ITU-R BT.1359: neither do they of subtitles. What
encoders put before the first sample, and the rounding of times, is less."""

JOINED = 2**16
"""Samples that are converted at a time."""

MOST_RATE = 2**31 - 1
"""Samples per second, as libav counts them."""

HIGHEST_RATE = 2**24
"""Samples per second that a file may have, more than any recording has. To resample from more, as a damaged header may
ask for, takes seconds and hundreds of MB, be there one sample or many."""

LOUDEST = 2
"""Samples beyond this were not meant to be in [-1, 1]: lossy decoders and resamplers overshoot it by less than 6 dB."""

SAMPLES = "floats (samples,) in [-1, 1]"
"""What a waveform is."""


def load_audio(file: str | os.PathLike[str], sr: int = SAMPLE_RATE) -> np.ndarray:
    """Reads the audio of a file, down-mixed to mono and resampled to `sr` samples per second; "-" is standard input.

    The counterpart of openai-whisper's `load_audio` and, like it, what ffmpeg makes of the file: the stream is the one
    that libav ranks best, samples pass through signed 16 bit, and of a truncated or damaged file what can be decoded
    is returned. Three things are stricter here: packets left out for damage are announced by a RuntimeWarning, a NaN or
    an infinity is an error, because the conversion to 16 bit would turn it into a plausible sample, and so is a rate
    that no recording has. Where the stream starts late in the file, or has gaps, nothing fills them, as in
    openai-whisper: another RuntimeWarning says so, if times come out wrong by more than an eighth of a second. What can
    be read once, as a pipe, is read once, and may be of any format; a device is refused, since most never end.

    Returns: float32 (samples,) in [-1, 1).
    Raises: AudioError if the file cannot be opened, has no audio stream, yields no sample, does not decode for the
    most part, has a rate above 2**24, or holds a sample that is not finite; OptionError for another `sr` or `file`.
    """
    return read_audio(file, sr, Event())


def read_audio(file: str | os.PathLike[str], sr: int, stopped: Event) -> np.ndarray:
    """Reads audio as `load_audio` does, for a thread that reads ahead: once `stopped` is set, it no longer waits for a
    pipe, and raises AudioError."""
    if not isinstance(file, str | bytes | os.PathLike):
        raise refused("file", file, "the name of a file")
    name = os.fsdecode(file)
    if not name or "\0" in name:  # before which libav would end it
        raise AudioError(f"{name or repr(name)}: cannot be read as audio: no name of a file")
    return _waveform(_open(name, stopped), name, whole("sr", sr, 1, MOST_RATE))


def read_upload(file: IO[bytes], name: str, longest: float, stopped: Event) -> np.ndarray:
    """Reads audio from an open file that a stranger has sent, and from no other file or address that it refers to.

    name: what errors and warnings call it. stopped: once it is set, AudioError is raised.

    Returns and raises as `load_audio`, and AudioError for more than `longest` seconds.
    """

    def within_limits(frames: Iterable[av.AudioFrame]) -> Iterator[av.AudioFrame]:
        seconds = 0.0
        for frame in frames:
            seconds += frame.samples / frame.sample_rate  # resampling a few samples of 1 Hz makes gigabytes
            if seconds > longest:
                raise AudioError(f"{name}: has more than {longest:g} s of audio, which is the limit here")
            if stopped.is_set():
                raise AudioError(f"{name}: nobody waits for it any more")
            yield frame

    return _waveform(_open_upload(file), name, SAMPLE_RATE, within_limits)


def _waveform(
    source: AbstractContextManager[av.container.InputContainer],
    name: str,
    sr: int,
    passing: Callable[[Iterable[av.AudioFrame]], Iterable[av.AudioFrame]] = iter,
) -> np.ndarray:
    pcm = bytearray()
    try:
        with source as container:
            for frame in _resample(passing(_all_finite(_joined(_decode(container, name)), name)), sr, name):
                pcm += frame.to_ndarray().tobytes()
    except av.FFmpegError as error:
        raise AudioError(f"{name}: cannot be read as audio: {error.strerror}") from error
    if not pcm:
        raise AudioError(f"{name}: no audio samples")
    audio = np.frombuffer(pcm, np.int16).astype(np.float32)
    audio /= 32768
    return audio


@contextmanager
def _open(name: str, stopped: Event) -> Iterator[av.container.InputContainer]:
    descriptor = open_once(name)
    if descriptor is not None:
        with Pipe(name, descriptor, stopped) as pipe, av.open(pipe, "r", metadata_errors="ignore") as container:
            yield container
        return
    # Without the scheme, libav takes what precedes a colon in a file's name for a network protocol.
    with av.open(f"file:{name}" if os.path.exists(name) else name, metadata_errors="ignore") as container:
        yield container


@contextmanager
def _open_upload(file: IO[bytes]) -> Iterator[av.container.InputContainer]:
    # Some formats, as ffconcat, name other files: libav would read any that this process may.
    with av.open(file, "r", options={"protocol_whitelist": "none"}, metadata_errors="ignore") as container:
        yield container


def duration(file: str | os.PathLike[str]) -> float | None:
    """Returns the seconds of audio in a file, as it says itself; 0 if it cannot be read.

    None where only reading all of it would show: of a file that does not say, and of whatever is no file on a disk,
    such as a pipe or an address, which is not opened.
    """
    name = os.fsdecode(file)
    if not is_regular(name):
        return None if status_of(name) or ":" in name else 0
    try:
        with _open(name, Event()) as container:
            return container.duration / av.time_base if container.duration else None
    except av.FFmpegError:
        return 0


def _decode(container: av.container.InputContainer, name: str) -> Iterator[av.AudioFrame]:
    """Yields the frames of the best audio stream, leaving out the packets that do not decode."""
    stream = container.streams.best("audio")
    if not isinstance(stream, av.AudioStream):
        raise AudioError(f"{name}: no audio stream")
    if stream.codec_context is None:
        raise AudioError(f"{name}: no decoder for its audio stream")
    decoded, timeline = 0, Timeline(container.start_time, container.duration)
    damage: list[str | None] = []
    for packet in container.demux(stream):
        try:
            frames = stream.decode(packet)
        except av.FFmpegError as error:
            damage.append(error.strerror)
        else:
            decoded += len(frames)
            for frame in frames:
                if frame.sample_rate > HIGHEST_RATE:
                    raise AudioError(f"{name}: has {frame.sample_rate} samples per second, more than any recording")
                timeline.add(frame)
                yield frame
    if len(damage) > MAX_DAMAGED * (decoded + len(damage)):
        raise AudioError(f"{name}: {len(damage)} packets do not decode and only {decoded} do: {damage[-1]}")
    if damage:
        message = f"{name}: {len(damage)} damaged packets left out, {decoded} decoded: {damage[-1]}"
        warnings.warn(message, RuntimeWarning, stacklevel=8)
    if unfilled := timeline.unfilled:
        message = (
            f"{name}: its audio {unfilled}, which nothing fills: times after that are too early by as much;"
            " `ffmpeg -i INPUT -af aresample=async=1:first_pts=0 OUTPUT.wav` fills it with silence"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=8)


class Timeline:
    """How far the frames of a stream, by their times in the file, are behind where their samples alone would be."""

    def __init__(self, start: int | None, duration: int | None):
        """Takes start and duration of the file, as multiples of 1 / av.time_base s; None if it does not say."""
        self.position = None if start is None else start / av.time_base
        # A time behind it is none: damaged, or one before the start in a format whose times wrap around.
        self.end = math.inf if start is None or not duration else (start + duration) / av.time_base
        self.rate: int | None = None
        self.at_first: float | None = None
        self.at_most = 0.0

    def add(self, frame: av.AudioFrame) -> None:
        self.rate = self.rate or frame.sample_rate
        if frame.sample_rate != self.rate:  # by the first one, libav may have guessed the times
            self.end = -math.inf
        if frame.time is not None and frame.time <= self.end:
            if self.position is None:
                self.position = frame.time
            behind = frame.time - self.position
            if self.at_first is None:
                self.at_first = behind
            self.at_most = max(self.at_most, behind)
        if self.position is not None:
            self.position += frame.samples / frame.sample_rate

    @property
    def unfilled(self) -> str | None:
        """Says what there is more time in than samples; None where that is not noticeable."""
        if self.at_first is None or self.at_most <= NOTICEABLE:
            return None
        parts = {
            "starts {:.2f} s after the file does": self.at_first,
            "has gaps of {:.2f} s in all": self.at_most - self.at_first,
        }
        return " and ".join(text.format(seconds) for text, seconds in parts.items() if round(seconds, 2) > 0)


def _joined(frames: Iterable[av.AudioFrame]) -> Iterator[av.AudioFrame]:
    """Yields the same samples in frames of JOINED: those of many codecs are so short that each costs more in Python
    than in libav."""
    for _, section in groupby(frames, lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)):
        fifo = av.AudioFifo()
        for frame in section:
            frame.pts = None  # the queue would insist that they follow each other without gaps
            fifo.write(frame)
            yield from fifo.read_many(JOINED)
        if rest := fifo.read():
            yield rest


def _all_finite(frames: Iterable[av.AudioFrame], name: str) -> Iterator[av.AudioFrame]:
    """Passes frames on and raises at the first sample that is NaN or infinite."""
    position = 0
    for frame in frames:
        if frame.format.name in ("flt", "fltp", "dbl", "dblp"):
            samples = frame.to_ndarray()  # planar: (channel, sample); packed: (1, sample and channel)
            if not np.isfinite(samples).all():
                column = np.nonzero(~np.isfinite(samples))[1].min()
                sample = position + column // (1 if frame.format.is_planar else frame.layout.nb_channels)
                raise AudioError(f"{name}: sample {sample} ({sample / frame.sample_rate:.3f} s) is not finite")
        position += frame.samples
        yield frame


def _resample(frames: Iterable[av.AudioFrame], sr: int, name: str) -> Iterator[av.AudioFrame]:
    """Converts frames to signed 16 bit mono at `sr`, with a new resampler wherever the stream changes its format."""
    for _, section in groupby(frames, lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)):
        resampler = av.AudioResampler(format="s16", layout="mono", rate=sr)
        for frame in section:
            try:
                yield from resampler.resample(frame)
            except av.ArgumentError as error:
                raise AudioError(
                    f"{name}: has {frame.layout.nb_channels} channels of which libav cannot make one:"
                    " `ffmpeg -i INPUT -af 'pan=mono|c0=c0' OUTPUT.wav` takes the first"
                ) from error
        yield from resampler.resample(None)


COMPILING = Lock()
"""Held by the thread that asks for the spectrogram of no model, so that the second of two finds it compiled."""


@cache
def compiled_spectrogram(n_mels: int) -> Executable:
    """Returns the spectrogram on the CPU, where openai-whisper computes it too, for waveforms of any length, compiled.

    Raises OptionError for an n_mels other than 80 and 128.
    """
    weights, program = log_mel_weights(n_mels), log_mel_program(n_mels)  # refused before a minute goes into compiling
    return Artifact(program.name, [program], "cpu").init(weights)[program.name]


def as_waveform(audio: np.ndarray | torch.Tensor, expected: str = f"the name of a file, or {SAMPLES}") -> torch.Tensor:
    """Converts an array or a tensor of floats in any memory layout to float32 (samples,) on the CPU, without gradient.

    expected: said of what is no array. Raises OptionError for that, for another shape, and for integers.
    """
    if isinstance(audio, torch.Tensor):
        check_dense("audio", audio)
    samples = audio.detach() if isinstance(audio, torch.Tensor) else as_array(audio, expected)
    floats = samples.dtype in FLOATS if isinstance(samples, torch.Tensor) else samples.dtype.kind == "f"
    if not floats or samples.ndim != 1:
        if isinstance(samples, np.ndarray) and samples.dtype.kind in "OSU":  # is what NumPy makes of anything
            raise refused("audio", audio, expected)
        found = f"{samples.dtype} {tuple(samples.shape)}"
        hint = "; take the mean of its channels" if samples.ndim == 2 else ""
        hint = "; divide it by 32768" if str(samples.dtype).removeprefix("torch.") == "int16" else hint
        raise OptionError(f"audio must be {SAMPLES}, not {found}{hint}")
    if isinstance(samples, np.ndarray):
        samples = torch.from_numpy(np.require(samples, np.float32, ["C", "W"]))
    return samples.to("cpu", torch.float32)


def as_array(audio: object, expected: str) -> np.ndarray:
    """Raises OptionError for what is no array."""
    try:
        return np.asarray(audio)
    except ValueError as error:  # of lists of different lengths
        raise refused("audio", audio, expected) from error


@cpu_by_default()
@one_torch_thread()
def log_mel_spectrogram(
    audio: str | os.PathLike[str] | np.ndarray | torch.Tensor, n_mels: int = 80, padding: int = 0
) -> torch.Tensor:
    """Computes on MAX the log-mel spectrogram of a file or a 16 kHz waveform (samples,), `padding` zeros behind it.

    Returns what openai-whisper's function of that name does: float32 (n_mels, (samples + padding) // HOP_LENGTH).
    It is without gradient. Warns of samples far outside of [-1, 1].
    Raises: AudioError if the file cannot be read, a sample is not finite, or there are too few samples to mirror;
    OptionError for a waveform of another shape or of integers, a negative padding, or an n_mels other than 80 and 128.
    """
    n_mels, waveform = whole("n_mels", n_mels, 1), heard(audio, padding)  # before a minute goes into compiling
    with COMPILING:
        compiled = compiled_spectrogram(n_mels)
    [log_mel] = compiled(audio=waveform)
    return log_mel


@cpu_by_default()
@one_torch_thread()
def spectrogram(
    compiled: Executable, audio: str | os.PathLike[str] | np.ndarray | torch.Tensor, padding: int = 0
) -> torch.Tensor:
    """Computes `log_mel_spectrogram` by a graph that `compiled_spectrogram` or a model has compiled."""
    [log_mel] = compiled(audio=heard(audio, padding))
    return log_mel


def heard(audio: str | os.PathLike[str] | np.ndarray | torch.Tensor, padding: int) -> torch.Tensor:
    """Returns what a spectrogram is computed of, float32 (samples + padding,); raises as `log_mel_spectrogram`."""
    waveform = as_waveform(load_audio(audio) if isinstance(audio, str | os.PathLike) else audio)
    padding = whole("padding", padding, 0)
    if not waveform.isfinite().all():
        raise AudioError(f"audio: sample {int((~waveform.isfinite()).nonzero()[0])} is not finite")
    waveform = torch.nn.functional.pad(waveform, (0, padding))
    if len(waveform) <= N_FFT // 2:
        raise AudioError(f"audio of {len(waveform)} samples is too short: a spectrogram needs {N_FFT // 2 + 1}")
    if max(waveform.aminmax(), key=abs).abs() > LOUDEST:
        warn_once(f"audio has samples beyond {LOUDEST}, expected floats in [-1, 1]: divide 16-bit samples by 32768")
    return waveform
