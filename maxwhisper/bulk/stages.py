"""What Ray's processes do: decode audio, anywhere, and transcribe it, in those that hold a model."""

import errno
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
from ray.data.checkpoint import NumpyArrayBasedCheckpointFilter

from ..audio import SAMPLE_RATE, load_audio, read_upload
from ..errors import AudioError, DecodingError, MaxWhisperError, OptionError
from ..options import transcribing
from ..scheduling import transcribe_many
from ..whisper import Whisper
from .filesystems import check_regular
from .inputs import identified
from .rows import ROW, row_of

AUDIO = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "audio": pa.large_binary(),  # samples of 16 bits, half of what they are as floats; null after an error
        "warnings": pa.list_(pa.string()),
        "error": pa.string(),
        "transient": pa.bool_(),
        "decode_seconds": pa.float64(),
    }
)
TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENOTCONN,
        errno.EBUSY,
    }
)
"""Errors of disks and networks that may pass, besides ConnectionError and TimeoutError."""
WAITS = (0.5, 2.0, 8.0)
"""Seconds after which a file is read again that could not be."""

T = TypeVar("T")


class NotYetWritten(NumpyArrayBasedCheckpointFilter):
    """Leaves out what earlier runs have written, by ids that it gives: the source has none."""

    def filter_rows_for_block(self, block: pa.Table) -> pa.Table:
        return super().filter_rows_for_block(identified(block))


def decode(table: pa.Table) -> Iterator[pa.Table]:
    """Yields the audio of each input, as AUDIO, or its error."""
    for row in identified(table).to_pylist():
        start = time.perf_counter()
        found: dict[str, Any] = {"id": row["id"], "path": row["path"], "audio": None, "error": None, "transient": False}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found["audio"] = (waveform(row["path"], row["bytes"]) * 32768).astype(np.int16).tobytes()
            except (ImportError, MemoryError):
                raise  # of the machine, and not of this input
            except Exception as error:
                found |= {"error": message_of(error), "transient": isinstance(error, Unread)}
        found["warnings"] = [str(each.message) for each in caught]
        yield pa.Table.from_pylist([found | {"decode_seconds": time.perf_counter() - start}], AUDIO)


class Unread(AudioError):
    """An input that could not be read, for a reason that may pass."""


def waveform(path: str | None, content: bytes | None) -> np.ndarray:
    """Returns float32 (samples,) of a file, an object in a store, or bytes; raises AudioError, OSError."""
    if content is None and path is None:
        raise AudioError("neither path nor bytes: both are null")
    if content is None and path is not None:
        if "://" not in path:
            check_regular(path)
            return patiently(load_audio, path)
        content = patiently(fetched, path)
    return read_upload(io.BytesIO(content or b""), path or "bytes", math.inf, Event())


def fetched(path: str) -> bytes:
    """Returns an object in a store; raises OSError."""
    try:
        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
            return content
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # what a store's package raises, as for want of credentials, has no common class
        raise ConnectionError(message_of(error)) from error


def patiently(read: Callable[[str], T], path: str, waits: tuple[float, ...] = WAITS) -> T:
    """Returns what `read` makes of a file, tried again after an error that may pass; raises Unread where that stays."""
    try:
        return read(path)
    except Exception as error:
        if not may_pass(error.__cause__ if isinstance(error, AudioError) else error):
            raise
        if not waits:
            raise Unread(message_of(error)) from error
    time.sleep(waits[0])
    return patiently(read, path, waits[1:])


def may_pass(error: BaseException | None) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or isinstance(error, OSError) and error.errno in TRANSIENT


def message_of(error: Exception) -> str:
    return str(error) if isinstance(error, MaxWhisperError) else f"{type(error).__name__}: {error}"


def check_options(options: dict[str, Any], model: Whisper) -> None:
    """Raises OptionError for options that a model cannot follow: where `transcribe` warns, as of a prompt that is too
    long, nobody would see what a process of Ray's has to say."""
    if not model.is_multilingual:
        for name, known in (("language", (None, "en", "English")), ("task", ("transcribe",))):
            if options.get(name, known[0]) not in known:
                raise OptionError(f"--{name} {options[name]}: the model knows English only")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            transcribing(options, model)
        except UserWarning as warning:
            raise OptionError(f"--{warning}") from warning


class Transcriber:
    """A process with a model, which transcribes all that comes."""

    def __init__(self, load: Callable[[], Whisper], options: dict[str, Any], batch_size: int):
        """Loads the model; what keeps it from loading is raised by the first call, for Ray starts a process whose
        making fails again and again."""
        self.options, self.batch_size = dict(options), batch_size
        self.unusable: Exception | None = None
        try:
            self.model = load()
            check_options(self.options, self.model)
            if not self.model.is_multilingual:
                self.options["language"] = "en"
        except Exception as error:  # not ours alone: a device may have no room, or a machine lack a package
            self.unusable = error

    def __call__(self, table: pa.Table) -> pa.Table:
        """Returns the rows, as ROW, of AUDIO; raises MaxWhisperError for options that cannot be used, what loading the
        model raised, and what ended a model that takes nothing more."""
        if self.unusable:
            raise self.unusable
        sources = table.to_pylist()
        readable = [source for source in sources if source["error"] is None]
        audio = [np.frombuffer(source["audio"], np.int16).astype(np.float32) / 32768 for source in readable]
        start = time.perf_counter()
        results = self.transcripts(audio)
        per_sample = (time.perf_counter() - start) / max(sum(map(len, audio)), 1)
        done = {
            source["id"]: (samples, result) for source, samples, result in zip(readable, audio, results, strict=True)
        }
        return pa.Table.from_pylist([self.row(source, done.get(source["id"]), per_sample) for source in sources], ROW)

    def transcripts(self, audio: list[np.ndarray]) -> list[dict[str, Any] | Exception]:
        results: list[Any] = [None] * len(audio)
        for number, result in transcribe_many(self.model, audio, self.batch_size, **self.options):
            if isinstance(result, MaxWhisperError | MemoryError) and not isinstance(result, AudioError | DecodingError):
                raise result  # of the options or the machine, and not of this recording
            results[number] = result
        unexpected = (each for each in results if isinstance(each, Exception) and not isinstance(each, MaxWhisperError))
        if (found := next(unexpected, None)) and not self.works():
            raise found
        return results

    def works(self) -> bool:
        """Returns whether the model takes a second of silence: a GPU that has failed once takes nothing more."""
        try:
            self.model.transcribe(np.zeros(SAMPLE_RATE, np.float32), language="en")
        except Exception:
            return False
        return True

    def row(
        self, source: dict[str, Any], done: tuple[np.ndarray, dict[str, Any] | Exception] | None, per_sample: float
    ) -> dict[str, Any]:
        if done is None:
            return row_of(source, None, None)
        samples, result = done
        timed = source | {"transcribe_seconds": len(samples) * per_sample}
        if isinstance(result, Exception):
            return row_of(timed | {"error": message_of(result)}, len(samples) / SAMPLE_RATE, None)
        return row_of(timed, len(samples) / SAMPLE_RATE, result)
