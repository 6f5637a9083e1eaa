"""Several recordings at once: their texts advance together, one execution for the next tokens of all.

Every recording is transcribed by openai-whisper's own loop, in a thread of its own, of which only one runs at a time: a
thread that needs its next tokens waits, and when all wait, the last one has steps computed for all, until a text ends.
Encoder and the start of a text are computed for one window at a time, since they wait for arithmetic and not for
memory. On a CPU a text's row of a step is bitwise what it is alone, so no transcript depends on its company.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from os import PathLike
from queue import SimpleQueue
from threading import Condition, Event, Thread, local
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from max.driver import Buffer
from torch import Tensor

from .audio import SAMPLE_RATE, read_audio
from .decoding.openai_loop import Candidates, KeyValueCache, Picked, Rules, Texts
from .decoding.speculative import rough_room
from .engine.program import buffer
from .errors import OptionError

if TYPE_CHECKING:
    from .whisper import TextDecoder, Whisper

Waveform = np.ndarray | Tensor
Audio = str | PathLike[str] | Waveform
Result = dict[str, Any] | Exception


class Seats:
    """Room for the caches of several windows side by side, so that one execution reads them all.

    on_device: the memory is (row, token, head, channel), as `maxwhisper.decoding.gpu` takes it.
    """

    def __init__(self, n_seat: int, on_device: bool = False):
        self.on_device = on_device
        self.taken: list[KeyValueCache | None] = [None] * n_seat
        self.own: list[Tensor] = []
        self.cross: list[Tensor] = []
        self.sources = self.memory = self.rough_cross = torch.empty(0, dtype=torch.float32)
        self.buffers: dict[int, list[Buffer]] = {}

    def place(self, caches: Sequence[KeyValueCache]) -> list[KeyValueCache]:
        """The caches in the order of their seats, which are the first ones; nobody else keeps one."""
        n = len(caches)
        free = [seat for seat in range(n) if self.taken[seat] not in caches]
        for cache in caches:
            if cache not in self.taken[:n]:
                self._move(cache, free.pop())
        self.taken[n:] = [None] * (len(self.taken) - n)
        return [cache for cache in self.taken[:n] if cache is not None]

    def _move(self, cache: KeyValueCache, seat: int) -> None:
        if not self.own:
            self._make_room(cache)
        own, cross = ([self._rows(kv, seat) for kv in kvs] for kvs in (self.own, self.cross))
        if self.on_device:
            for kv in own:
                kv.zero_()  # what others have left there may not be finite, and is multiplied with 0
        cache.move(own, cross, self._rows(self.sources, seat), seat * len(cache.sources))
        self.taken[seat] = cache

    def _make_room(self, cache: KeyValueCache) -> None:
        n, first = len(self.taken), cache.own[0]
        self.sources = cache.sources.repeat(n, 1)
        if self.on_device:
            self.own, self.cross = ([tokens_first(kv, n) for kv in kvs] for kvs in (cache.own, cache.cross))
            return
        self.memory = first.new_empty((len(cache.own), n * len(first), *first.shape[1:]))
        self.own, self.cross = list(self.memory), [kv.new_empty((n * len(kv), *kv.shape[1:])) for kv in cache.cross]

    def _rows(self, x: Tensor, seat: int) -> Tensor:
        n = len(x) // len(self.taken)
        return x[seat * n : (seat + 1) * n]

    def inputs(self, n: int) -> tuple[Tensor, list[Buffer]]:
        """Sources, and keys and values, of the caches in the first `n` seats, in the same memory."""
        sources, *kv = (x[: len(x) // len(self.taken) * n] for x in (self.sources, *self.own, *self.cross))
        if n not in self.buffers:
            self.buffers[n] = [buffer(x.transpose(1, 2) if self.on_device else x) for x in kv]
        return sources, self.buffers[n]

    def draft(self, n: int, make_rough: Callable[[Sequence[Tensor], Tensor, int], None]) -> list[Buffer]:
        """Of the same caches, what `decoding.speculative` takes besides. make_rough: as `TextDecoder.make_rough`."""
        if not len(self.rough_cross):
            self.rough_cross = rough_room(self.cross, len(self.taken))
        for seat, cache in enumerate(self.taken[:n]):
            assert cache is not None
            if cache.rough_cross is None:
                make_rough(cache.cross, self.rough_cross, seat)
                cache.rough_cross = self.rough_cross[:, seat : seat + 1]
        return [buffer(self.memory), buffer(self.rough_cross)]


def tokens_first(kv: Tensor, n: int) -> Tensor:
    """Room for n times as many rows as `kv` has, (row, head, token, channel); in memory the tokens of a row come before
    its heads."""
    n_row, n_head, n_token, n_channel = kv.shape
    dtype = torch.float32 if kv.dtype == torch.float16 else kv.dtype  # as `flash_dtype` has it
    return kv.new_empty((n * n_row, n_token, n_head, n_channel), dtype=dtype).transpose(1, 2)


@dataclass(frozen=True)
class Request:
    """One text's wish for its next tokens, or that of a window's beams: what `TextDecoder.pick` takes."""

    texts: Texts
    cache: KeyValueCache
    rules: Rules
    n_token: Tensor
    found: Future[Picked]


class Stopped(Exception):
    """Nobody waits for the transcripts any more."""


class Together:
    """The threads that decode together. A thread holds `turn` whenever it does not wait for tokens."""

    def __init__(self, n_thread: int, decoder: "TextDecoder"):
        self.turn = Condition()
        self.n_thread = n_thread
        self.decoder = decoder
        self.seats = Seats(n_thread, decoder.on_device)
        self.waiting: list[Request] = []
        self.stopped = False

    def pick(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor) -> Picked:
        """As `TextDecoder.pick`, once all threads have asked."""
        request = Request(texts, cache, rules, n_token, Future())
        self.waiting.append(request)
        self._step_if_all_wait()
        while not request.found.done():
            if self.stopped:
                raise Stopped
            self.turn.wait()
        return request.found.result()

    def leave(self) -> None:
        """A thread has nothing more to transcribe."""
        self.n_thread -= 1
        self._step_if_all_wait()

    def _step_if_all_wait(self) -> None:
        if self.stopped or not self.waiting or len(self.waiting) < self.n_thread:
            return
        requests, self.waiting = self.waiting, []
        try:
            found = self._compute(requests)
        except Exception as error:
            for request in requests:  # each recording fails for itself
                request.found.set_exception(error)
        else:
            for request in requests:
                request.found.set_result(found[id(request.cache)])
        self.turn.notify_all()

    def _compute(self, requests: list[Request]) -> dict[int, Picked]:
        """What every request gets, by the id of its cache, which is as much longer then."""
        by_cache = {id(request.cache): request for request in requests}
        order = [by_cache[id(cache)] for cache in self.seats.place([request.cache for request in requests])]
        texts = [each.texts for each in order]
        rules = Rules.joined([each.rules for each in order])
        n_token = torch.cat([each.n_token for each in order])
        draft = partial(self.seats.draft, len(order), self.decoder.make_rough)
        together = Texts.joined(texts, int(rules.limits[1]))
        picked = self.decoder.steps(together, rules, n_token, *self.seats.inputs(len(order)), draft)
        sizes = [len(each.tokens) for each in texts]
        parts = [x.split(sizes) for x in (*picked.texts, picked.candidates.tokens, picked.candidates.logprobs)]
        found = {}
        for each, tokens, lengths, totals, *best in zip(order, *parts, strict=True):
            longest = int(lengths.max())
            each.cache.n_token = longest - 1
            found[id(each.cache)] = Picked(Texts(tokens[:, :longest], lengths, totals), Candidates(*best))
        return found


class OfThread(local):
    """What every thread that uses a decoder has for itself, as others may use the same decoder at the same time.

    seats: its room for one window. together: what it decodes in together with other threads, if it does.
    """

    def __init__(self, on_device: bool):
        self.seats = Seats(1, on_device)
        self.together: Together | None = None


def loaded(
    audio: Iterable[Audio], stopped: Event | None = None
) -> Generator[tuple[int, Waveform | Exception], None, None]:
    """Every recording's number and waveform, or what reading it raised; the next one is read meanwhile.

    stopped: set by whoever wants no more while another thread waits here; set at the end in any case.
    """
    stopped = stopped or Event()

    def load(each: Audio) -> Waveform | Exception:
        try:
            return read_audio(each, SAMPLE_RATE, stopped) if isinstance(each, str | PathLike) else each
        except Exception as error:  # whoever asked for this recording is told, the others go on
            return error

    with ThreadPoolExecutor(1) as reader:
        ahead: list[Future[Waveform | Exception]] = []
        try:
            for number, each in enumerate(audio):
                ahead.append(reader.submit(load, each))
                if number:
                    yield number - 1, ahead.pop(0).result()
            for last in ahead:
                yield number, last.result()
        finally:
            stopped.set()


def transcribe_many(
    model: "Whisper", audio: Sequence[Audio], batch_size: int = 1, **options: Any
) -> Iterator[tuple[int, Result]]:
    """The number of every recording and what `Whisper.transcribe` returns or raises for it, as each is done.

    batch_size: how many recordings to decode together. Raises OptionError if that is not above 0.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size must be above 0, not {batch_size}")
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
    model: "Whisper",
    audio: Sequence[Audio],
    n_thread: int,
    options: dict[str, Any],
) -> Iterator[tuple[int, Result]]:
    together = Together(n_thread, model.decoder)
    results: SimpleQueue[tuple[int, Result] | BaseException] = SimpleQueue()
    enough = Event()
    source = loaded(audio, enough)

    def work() -> None:
        try:
            model.decoder.of_thread.together = together
            with together.turn:
                try:
                    while not together.stopped and (recording := next(source, None)):
                        number, waveform = recording
                        results.put((number, attempt(model.transcribe, waveform, options)))
                finally:
                    together.leave()
        except BaseException as error:  # or whoever waits for results would wait for ever
            results.put(error)

    threads = [Thread(target=work, daemon=True) for _ in range(n_thread)]
    try:
        for thread in threads:
            thread.start()
        for _ in audio:
            found = results.get()
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        enough.set()
        together.stopped = True
        with together.turn:
            together.turn.notify_all()
        for thread in threads:
            thread.join()
        source.close()
