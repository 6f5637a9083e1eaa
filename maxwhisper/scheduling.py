"""Several recordings at once: their texts advance together, one execution for the next tokens of all.

Every recording is transcribed by openai-whisper's own loop, in a thread of its own, of which only one runs at a time:
see `decoding.batching`. Encoder and the start of a text are computed for one window at a time, since they wait for
arithmetic and not for memory.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from os import PathLike
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from whisper.decoding import DecodingOptions

from .audio import SAMPLE_RATE, read_audio
from .decoding.batching import BatchingStepper
from .decoding.stepper import Stepper
from .options import is_several, refused, whole

Waveform = np.ndarray | Tensor
Audio = str | PathLike[str] | Waveform
Result = dict[str, Any] | Exception
Decode = Callable[[Tensor, DecodingOptions], Any]


class Model(Protocol):
    """What transcribes, and can be had with another stepper."""

    stepper: Stepper

    def stepping_by(self, stepper: Stepper, decode: Decode | None = None) -> "Model":
        """Returns the model with another stepper, and another `decode` for `transcribe`."""

    def decode(self, mel: Tensor, options: DecodingOptions) -> Any:
        """Returns what openai-whisper's function of this name does."""

    def transcribe(self, audio: Waveform, **options: Any) -> dict[str, Any]:
        """Returns a recording's transcript."""


def loaded(
    audio: Iterable[Audio], stopped: Event | None = None
) -> Generator[tuple[int, Waveform | Exception], None, None]:
    """Yields every recording's number and waveform, or what reading it raised; the next one is read meanwhile.

    stopped: set by whoever wants no more while another thread waits here; set at the end in any case.
    """
    stopped = stopped or Event()

    def load(each: Audio) -> Waveform | Exception:
        try:
            return read_audio(each, SAMPLE_RATE, stopped) if isinstance(each, str | PathLike) else each
        except Exception as error:  # whoever asked for this recording is told, the others go on
            return error

    with ThreadPoolExecutor(1) as reader:
        prefetched: list[Future[Waveform | Exception]] = []
        try:
            for number, each in enumerate(audio):
                prefetched.append(reader.submit(load, each))
                if number:
                    yield number - 1, prefetched.pop(0).result()
            for last in prefetched:
                yield number, last.result()
        finally:
            stopped.set()


def transcribe_many(
    model: Model, audio: Sequence[Audio], batch_size: int = 1, **options: Any
) -> Iterator[tuple[int, Result]]:
    """Yields the number of every recording and what `Whisper.transcribe` returns or raises for it, as each is done.

    batch_size: how many recordings to decode together.

    Raises OptionError if that is no whole number above 0, or for what is not several recordings.
    """
    batch_size = whole("batch_size", batch_size, 1)
    if not isinstance(audio, Sized) or not is_several(audio) or getattr(audio, "ndim", 2) < 2:
        raise refused("audio", audio, "several recordings, in a list")
    n_thread = min(batch_size, len(audio))
    if n_thread > 1:
        yield from in_threads(model, audio, n_thread, options)
        return
    with closing(loaded(audio)) as source:
        for number, waveform in source:
            yield number, attempt(model.transcribe, waveform, options)


def attempt(
    transcribe: Callable[..., dict[str, Any]], waveform: Waveform | Exception, options: dict[str, Any]
) -> Result:
    if isinstance(waveform, Exception):
        return waveform
    try:
        return transcribe(waveform, **options)
    except Exception as error:  # one recording must not take the others down
        return error


def in_threads(
    model: Model, audio: Sequence[Audio], n_thread: int, options: dict[str, Any]
) -> Iterator[tuple[int, Result]]:
    """Transcribes as `transcribe_many` does, in as many threads, whose texts advance together."""
    stepper = BatchingStepper(model.stepper, n_thread)
    batching = model.stepping_by(stepper)
    results: SimpleQueue[tuple[int, Result] | BaseException] = SimpleQueue()
    enough = Event()
    source = loaded(audio, enough)

    def work() -> None:
        try:
            with stepper.turn:
                try:
                    while not stepper.stopped and (recording := next(source, None)):
                        number, waveform = recording
                        results.put((number, attempt(batching.transcribe, waveform, options)))
                finally:
                    stepper.leave()
        except BaseException as error:  # or whoever waits for results would wait for ever
            results.put(error)

    threads = [Thread(target=work, daemon=True) for _ in range(n_thread)]
    try:
        for thread in threads:
            stepper.join()
            thread.start()
        for _ in audio:
            found = results.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        enough.set()
        stepper.stop()
        for thread in threads:
            thread.join()
        source.close()
