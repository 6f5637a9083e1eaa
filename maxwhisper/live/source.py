"""Where live audio comes from: a microphone, or raw samples on standard input."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread
from time import sleep
from typing import Any

import av
import numpy as np
from whisper.audio import SAMPLE_RATE

from ..errors import AudioError, OptionError
from ..pipes import AT_ONCE

log = logging.getLogger("maxwhisper")

MAX_QUEUED = 6000
"""Blocks, ten minutes, that are read before anybody wants them: of a file, since nobody is so late with speech."""

OF_FILES = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\x1a\x45\xdf\xa3", b"FORM", b"\x30\x26\xb2\x75", b"#!AMR", b"caff")
"""What WAV, FLAC, Ogg, MP3, Matroska, AIFF, WMA, AMR and CAF begin with."""

Blocks = SimpleQueue[bytes | Exception | None]
"""Signed 16-bit samples as they come; what reading raised; None at the end."""


class Source:
    """Audio that comes by itself, and is kept until somebody takes it."""

    def __init__(self, blocks: Blocks, rate: int):
        """Takes blocks of `rate` samples per second, which are converted to 16 kHz."""
        self.blocks, self.rate = blocks, rate
        self.resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        self.odd = b""
        self.ended = False

    def take(self) -> np.ndarray:
        """Waits for audio, and returns all there is, float32 (sample,) at 16 kHz; `ended` is set with the last.

        Raises what reading raised, and OptionError for a rate that nothing can be resampled from.
        """
        found = [self.blocks.get()]
        while not self.blocks.empty() and len(found) < MAX_QUEUED:
            found.append(self.blocks.get())
        if error := next((each for each in found if isinstance(each, Exception)), None):
            raise error
        self.ended = None in found
        return self._converted(b"".join(each for each in found if isinstance(each, bytes)))

    def stop(self) -> None:
        """Has `take` end with what has come until now."""
        self.blocks.put(None)

    def _converted(self, pcm: bytes) -> np.ndarray:
        pcm = self.odd + pcm
        n_whole = len(pcm) // 2 * 2
        pcm, self.odd = pcm[:n_whole], pcm[n_whole:]
        samples = np.frombuffer(pcm, "<i2")
        if self.rate != SAMPLE_RATE:
            try:
                samples = np.concatenate([samples[:0], *self._resampled(samples)])
            except (av.FFmpegError, OverflowError) as error:
                raise OptionError(f"rate is {self.rate}, expected samples per second of audio") from error
        return samples.astype(np.float32) / 32768

    def _resampled(self, samples: np.ndarray) -> Iterator[np.ndarray]:
        if len(samples):
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate = self.rate
            yield from (each.to_ndarray()[0] for each in self.resampler.resample(frame))
        if self.ended:
            yield from (each.to_ndarray()[0] for each in self.resampler.resample(None))


def is_of_a_file(data: bytes) -> bool:
    """Tells whether data begin as a file of audio does, and next to no speech: it would be transcribed as noise."""
    return (
        data.startswith(OF_FILES) or data[4:8] == b"ftyp" or any(is_of_frames(data, codec) for codec in ("mp3", "aac"))
    )


def is_of_frames(data: bytes, codec: str) -> bool:
    """Tells whether data are frames of a codec one behind the other, which begin alike, with ones."""
    frames = av.CodecContext.create(codec, "r").parse(data) if data.startswith(b"\xff") else []
    return len(frames) > 1 and data[:2] == data[frames[0].size :][:2] != b"\xff\xff"


@contextmanager
def standard_input(rate: int) -> Iterator[Source]:
    """Gives what comes through standard input: signed 16-bit little-endian mono samples.

    Raises AudioError if it is closed, or a terminal; the source does for a file of another kind.
    """
    if sys.__stdin__ is None or sys.__stdin__.closed:
        raise AudioError("-: standard input is closed")
    number = sys.__stdin__.fileno()
    if os.isatty(number):
        raise AudioError(
            "-: is a terminal: expected samples, as in `arecord -t raw -f S16_LE -r 16000 | maxwhisper live -`"
        )
    blocks: Blocks = SimpleQueue()
    stopped = Event()

    rest = f"-f s16le -ac 1 -ar {rate} -"
    no_samples = f"-: begins as a file of audio does: expected samples alone, as `ffmpeg -i FILE {rest}` gives"

    def read() -> None:
        begun = False
        try:
            while not stopped.is_set() and (data := os.read(number, min(max(2, rate // 5), AT_ONCE))):
                blocks.put(data if begun or not is_of_a_file(data) else AudioError(no_samples))
                begun = True
                while blocks.qsize() > MAX_QUEUED and not stopped.is_set():
                    sleep(0.1)
            blocks.put(None)
        except OSError as error:
            blocks.put(AudioError(f"-: cannot be read: {error.strerror or error}"))

    Thread(target=read, daemon=True).start()  # which waits for a pipe, perhaps for ever
    try:
        yield Source(blocks, rate)
    finally:
        stopped.set()


@contextmanager
def microphone(rate: int) -> Iterator[Source]:
    """Gives what the default microphone hears.

    Raises OptionError if sounddevice or its library is missing, or there is no microphone.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise OptionError("the microphone needs sounddevice: pip install 'maxwhisper[live]'") from error
    except OSError as error:  # the library is not in the package on Linux
        raise OptionError(f"the microphone needs PortAudio, as in `apt install libportaudio2`: {error}") from error
    blocks: Blocks = SimpleQueue()

    def hear(data: Any, n_frame: int, times: Any, status: Any) -> None:
        if status:
            log.warning("warning: the microphone lost samples: %s", status)
        blocks.put(bytes(data))

    try:
        with sounddevice.RawInputStream(rate, rate // 10, channels=1, dtype="int16", callback=hear):
            yield Source(blocks, rate)
    except sounddevice.PortAudioError as error:
        raise OptionError(f"the microphone cannot be opened: {error}") from error
