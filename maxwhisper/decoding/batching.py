"""Texts of several threads advance together, one execution for the next tokens of all.

Of the threads only one runs at a time: a thread that needs its next tokens waits, and when all wait, the last one has
another stepper compute them for all, until a text ends. On a CPU a text's row of a step is bitwise what it is alone, so
no transcript depends on its company.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from threading import Condition, Lock

import torch
from torch import Tensor

from .cache import CacheSlots, KeyValueCache
from .rules import Rules
from .stepper import Advanced, Candidates, Stepper, Texts


@dataclass(frozen=True)
class Request:
    """One text's wish for its next tokens, or that of a window's beams: what `Stepper.advance` takes."""

    texts: Texts
    cache: KeyValueCache
    rules: Rules
    n_token: Tensor
    found: Future[Advanced]


class Stopped(Exception):
    """Nobody waits for the transcripts any more."""


class BatchingStepper:
    """Takes texts of several threads further together. A thread holds `turn` from when it has joined until it leaves,
    whenever it does not wait for tokens."""

    def __init__(self, inner: Stepper, n_slot: int):
        """Takes the steps of up to `n_slot` threads at a time, which `inner` computes."""
        self.inner = inner
        self.max_candidates, self.tokens_first, self.searches = inner.max_candidates, inner.tokens_first, inner.searches
        self.turn = Condition()
        self.n_thread, self.counting = 0, Lock()
        self.slots = CacheSlots(n_slot, inner.tokens_first)
        self.waiting: list[Request] = []
        self.stopped = False

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor) -> Advanced:
        """Decodes texts once all threads have asked: until one ends, or one of another thread's.

        Raises Stopped once nobody waits for them.
        """
        request = Request(texts, cache, rules, n_token, Future())
        self.waiting.append(request)
        self._step_if_all_wait()
        while not request.found.done():
            if self.stopped:
                raise Stopped
            self.turn.wait()
        return request.found.result()

    def join(self) -> None:
        """Counts in a thread, before it has the turn: those that have it wait for this one from their next step on, and
        so give the turn away."""
        with self.counting:
            self.n_thread += 1

    def leave(self) -> None:
        """Counts out a thread that has nothing more to transcribe."""
        with self.counting:
            self.n_thread -= 1
        self._step_if_all_wait()

    def stop(self) -> None:
        """Has every thread that waits raise Stopped."""
        self.stopped = True
        with self.turn:
            self.turn.notify_all()

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

    def _compute(self, requests: Sequence[Request]) -> dict[int, Advanced]:
        """Returns what every request gets, by the id of its cache, which is as much longer then."""
        by_cache = {id(request.cache): request for request in requests}
        order = [by_cache[id(cache)] for cache in self.slots.place([request.cache for request in requests])]
        rules = Rules.joined([each.rules for each in order])
        texts = Texts.joined([each.texts for each in order], rules.eot)
        n_token = torch.cat([each.n_token for each in order])
        advanced = self.inner.advance(texts, self.slots.joined(len(order)), rules, n_token)
        sizes = [len(each.texts.tokens) for each in order]
        candidates, ended = advanced.candidates, iter(advanced.ended)
        parts = [x.split(sizes) for x in (*advanced.texts, candidates.tokens, candidates.logprobs)]
        found = {}
        for each, tokens, lengths, totals, *best in zip(order, *parts, strict=True):
            longest = int(lengths.max())
            each.cache.n_token = longest - 1
            its_ended = [*islice(ended, len(each.cache.cross[0]))]
            texts = Texts(tokens[:, :longest], lengths, totals)
            found[id(each.cache)] = Advanced(texts, Candidates(*best), its_ended)
        return found
