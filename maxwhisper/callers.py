"""Recordings of callers who come and go: windows of several decode at once, and each waits its turn for the next one.

A window is what is scheduled, not a recording: behind an hour of audio a short clip waits for one window, not for 120.
Texts advance together as in `scheduling`. Where tokens are sampled they cannot, so such windows are decoded one
after the other beside the others.
"""

from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event
from typing import Any

from torch import Tensor
from whisper.decoding import DecodingOptions

from .decoding.batching import BatchingStepper, Stopped
from .decoding.cache import KeyValueCache
from .decoding.rules import Rules
from .decoding.stepper import Advanced, Stepper, Texts
from .scheduling import Decode, Model, Waveform


class Scheduler:
    """A model that any number of threads transcribe with, each by a `Caller`."""

    def __init__(self, model: Model, n_window: int):
        """Has up to `n_window` windows decode at once."""
        self.model = model
        self.stepper = BatchingStepper(model.stepper, n_window)
        self.deterministic = ThreadPoolExecutor(n_window, "maxwhisper-window")
        self.sampled = ThreadPoolExecutor(1, "maxwhisper-window")

    def close(self) -> None:
        """Ends the threads, once no caller transcribes any more."""
        self.deterministic.shutdown()
        self.sampled.shutdown()


class UntilStopped:
    """A stepper that raises Stopped in the place of further steps once `stopped` is set."""

    def __init__(self, inner: Stepper, stopped: Event):
        self.inner, self.stopped = inner, stopped
        self.max_candidates, self.tokens_first, self.searches = inner.max_candidates, inner.tokens_first, inner.searches

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor) -> Advanced:
        """Decodes texts further as the inner stepper does, or raises Stopped."""
        if self.stopped.is_set():
            raise Stopped
        return self.inner.advance(texts, cache, rules, n_token)


class Caller:
    """Somebody with one recording, who may stop waiting for its transcript."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.stopped = Event()
        self.window: Future[Any] | None = None
        self.decoding = scheduler.model.stepping_by(UntilStopped(scheduler.stepper, self.stopped))

    def transcribe(self, audio: Waveform, **options: Any) -> dict[str, Any]:
        """Returns in this thread what the model's `transcribe` does; raises Stopped after a call of `stop`."""
        try:
            return self.model.transcribe(audio, **options)
        except CancelledError as error:
            raise Stopped from error

    @property
    def model(self) -> Model:
        """Returns the model whose windows wait their turn, and which raises Stopped or CancelledError after `stop`."""
        return self.decoding.stepping_by(self.decoding.stepper, self._when_due)

    def stop(self) -> None:
        """Ends `transcribe`, called from another thread: at once while it waits its turn, else after a few tokens."""
        self.stopped.set()
        if window := self.window:
            window.cancel()

    def _when_due(self, mel: Tensor, options: DecodingOptions) -> Any:
        sampled = options.temperature > 0
        threads = self.scheduler.sampled if sampled else self.scheduler.deterministic
        decode = self.decoding.decode if sampled else self._with_others
        self.window = threads.submit(self._unless_stopped, decode, mel, options)
        if self.stopped.is_set():  # after `stop` has looked for a window
            self.window.cancel()
        return self.window.result()

    def _unless_stopped(self, decode: Decode, mel: Tensor, options: DecodingOptions) -> Any:
        if self.stopped.is_set():  # a thread may have taken the window before it could be cancelled
            raise Stopped
        return decode(mel, options)

    def _with_others(self, mel: Tensor, options: DecodingOptions) -> Any:
        stepper = self.scheduler.stepper
        stepper.join()
        with stepper.turn:
            try:
                return self.decoding.decode(mel, options)
            finally:
                stepper.leave()
