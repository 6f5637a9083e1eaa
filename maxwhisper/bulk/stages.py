"""What Ray's processes do: decode audio, anywhere, and transcribe it, in those that hold a model."""

import io
import math
import time
import warnings
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from ray.data.checkpoint import NumpyArrayBasedCheckpointFilter

from ..audio import SAMPLE_RATE, load_audio, read_upload
from ..errors import AudioError, DecodingError, MaxWhisperError
from ..scheduling import transcribe_many
from ..whisper import Whisper
from .inputs import identified
from .rows import ROW, row_of

AUDIO = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "audio": pa.large_binary(),  # samples of 16 bits, half of what they are as floats; null after an error
        "warnings": pa.list_(pa.string()),
        "error": pa.string(),
        "decode_seconds": pa.float64(),
    }
)


class NotYetWritten(NumpyArrayBasedCheckpointFilter):
    """Leaves out what earlier runs have written, by ids that it gives: the source has none."""

    def filter_rows_for_block(self, block: pa.Table) -> pa.Table:
        return super().filter_rows_for_block(identified(block))


def decode(table: pa.Table) -> Iterator[pa.Table]:
    """Yields the audio of each input, as AUDIO, or its error."""
    for row in identified(table).to_pylist():
        start = time.perf_counter()
        found: dict[str, Any] = {"id": row["id"], "path": row["path"], "audio": None, "error": None}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found["audio"] = (waveform(row["path"], row["bytes"]) * 32768).astype(np.int16).tobytes()
            except (ImportError, MemoryError):
                raise  # of the machine, and not of this input
            except Exception as error:
                found["error"] = said(error)
        found["warnings"] = [str(each.message) for each in caught]
        yield pa.Table.from_pylist([found | {"decode_seconds": time.perf_counter() - start}], AUDIO)


def waveform(path: str | None, content: bytes | None) -> np.ndarray:
    """Returns float32 (samples,) of a file, an object in a store, or bytes; raises AudioError, OSError."""
    if path is None and content is None:
        raise AudioError("neither path nor bytes: both are null")
    if content is None and path is not None:
        if "://" not in path:
            return load_audio(path)
        with fsspec.open(path, "rb") as file:
            content = file.read()
    return read_upload(io.BytesIO(content or b""), path or "bytes", math.inf, Event())


def said(error: Exception) -> str:
    return str(error) if isinstance(error, MaxWhisperError) else f"{type(error).__name__}: {error}"


class Transcriber:
    """A process with a model, which transcribes all that comes."""

    def __init__(self, load: Callable[[], Whisper], options: dict[str, Any], batch_size: int):
        """Loads the model; what keeps it from loading is raised by the first call, for Ray starts a process whose
        making fails again and again."""
        self.options, self.batch_size = dict(options), batch_size
        self.unusable: Exception | None = None
        try:
            self.model = load()
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
            return row_of(timed | {"error": said(result)}, len(samples) / SAMPLE_RATE, None)
        return row_of(timed, len(samples) / SAMPLE_RATE, result)
