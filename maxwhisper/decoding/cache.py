"""What the decoder keeps between steps: keys and values of texts and of their audio, alone and side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from max.driver import Buffer
from max.dtype import DType
from torch import Tensor

from ..engine.program import buffer
from ..network.keys_values import by_layer

KV = list[Tensor]
Quantize = Callable[[Sequence[Tensor], Tensor, int], None]
"""Puts keys and values of audio in int8 into `room_for_quantized`, from a row on."""

SCALE_SIZE = DType.float32.size_in_bytes


@dataclass(eq=False)
class KeyValueCache:
    """What the decoder keeps between calls; empty, and false, until the first one.

    own: keys and values of the text so far, layer by layer, each (batch, head, position, channel), with a position for
        every token that a text may have. The first n_token of them are filled; where texts are of different lengths,
        those of the longest.
    cross: keys and values of the audio, layer by layer, each (audio, head, n_audio_ctx, channel).
    rows: (batch, position), the row of memory in which a text's keys and values of a position are; the first row of
        `own` is row `first_row` of that memory. What is new goes into a text's own row.
    memory: `own` in one, where nobody else's are between them.
    quantized_cross: `cross` in int8, as `decoding.speculative` takes it, once it has been asked for.
    """

    own: KV = field(default_factory=list)
    cross: KV = field(default_factory=list)
    n_token: int = 0
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64, device="cpu"))
    first_row: int = 0
    memory: Tensor | None = None
    quantized_cross: Tensor | None = None
    _inputs: dict[str, Buffer] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.n_token > 0

    def append(self, new: KV, n_position: int) -> None:
        """Puts keys and values of the next tokens, each (batch, head, token, channel), behind what is filled."""
        if not self.own:
            n_text, n_head, _, n_channel = new[0].shape
            self.memory = new[0].new_empty((len(new), n_text, n_head, n_position, n_channel))
            self.own = list(self.memory)
            self.rows, self.first_row = rows_of(len(new[0]), n_position), 0
            self._inputs = {}
        end = self.n_token + new[0].shape[2]
        for cached, kv in zip(self.own, new, strict=True):
            cached[:, :, self.n_token : end] = kv
        wait_for_pytorch(new[0])
        self.n_token = end

    def repeat(self, times: int) -> None:
        """Makes as many copies of every text, side by side; the texts are still in their own rows."""
        own, n_token, n_position = self.own, self.n_token, self.own[0].shape[2]
        self.own, self.n_token = [], 0
        self.append([kv[:, :, :n_token].repeat_interleave(times, 0) for kv in own], n_position)

    def rearrange(self, texts: list[int]) -> None:
        """Puts the texts of these numbers in the place of all; no key or value moves."""
        self.rows[:, : self.n_token] = self.rows[texts, : self.n_token]

    def settle(self) -> None:
        """Puts the keys and values of every text into its own row."""
        own_rows, past = rows_of(*self.rows.shape), self.rows[:, : self.n_token] - self.first_row
        if not past.equal(own_rows[:, : self.n_token]):
            for kv in self.own:
                kv[:, :, : self.n_token] = kv[past, :, torch.arange(self.n_token, device="cpu")].transpose(1, 2)
            self.rows.copy_(own_rows + self.first_row)
            wait_for_pytorch(self.own[0])

    def move(self, own: KV, cross: KV, rows: Tensor, first_row: int) -> None:
        """Continues in other memory, of the shapes of `own`, `cross` and `rows`."""
        for there, kv in zip(own, self.own, strict=True):
            there[:, :, : self.n_token] = kv[:, :, : self.n_token]
        for there, kv in zip(cross, self.cross, strict=True):
            there.copy_(kv)
        wait_for_pytorch(own[0])
        rows.copy_(self.rows - self.first_row + first_row)
        self.own, self.cross, self.rows, self.first_row, self._inputs = own, cross, rows, first_row, {}
        self.memory = self.quantized_cross = None

    def inputs(self) -> dict[str, Buffer]:
        """Returns `own` and `cross` as graphs take them, by the names of inputs, in the same memory."""
        if not self._inputs:
            self._inputs = named(cache=[buffer(kv) for kv in self.own], cross=[buffer(kv) for kv in self.cross])
        return self._inputs

    def written(self) -> dict[str, Buffer]:
        """Returns `own` once more, for graphs that write into it."""
        layers = by_layer(self.inputs(), len(self.own) // 2, "cache")
        return named(written=[kv for layer in layers for kv in layer.values()])

    def quantized(self, quantize: Quantize) -> Tensor:
        """Returns `cross` in int8, (layer, audio, head, n_audio_ctx, channel), which `quantize` computes once."""
        if self.quantized_cross is None:
            self.quantized_cross = room_for_quantized(self.cross, len(self.cross[0]))
            quantize(self.cross, self.quantized_cross, 0)
        return self.quantized_cross

    def copy(self) -> "KeyValueCache":
        memory = torch.stack(self.own) if self.own else None
        own = [] if memory is None else list(memory)
        return KeyValueCache(own, list(self.cross), self.n_token, self.rows - self.first_row, memory=memory)


def wait_for_pytorch(written: Tensor) -> None:
    """Waits for what PyTorch does to a tensor, as MAX does not where it has a buffer of it already."""
    if written.is_cuda:
        torch.cuda.synchronize(written.device)


def rows_of(n_text: int, n_position: int) -> Tensor:
    """Returns the rows of texts that each have one of a cache for themselves, (n_text, n_position)."""
    return torch.arange(n_text, device="cpu")[:, None].repeat(1, n_position)


def named(**kinds: Sequence[Any]) -> dict[str, Any]:
    """Returns keys and values by the names that graphs of the whole decoder have for them: k_cache.0, v_cache.0, ... of
    the kind "cache"."""
    return {f"{'kv'[i % 2]}_{kind}.{i // 2}": kv for kind, kvs in kinds.items() for i, kv in enumerate(kvs)}


def room_for_quantized(cross: Sequence[Tensor], n_row: int) -> Tensor:
    """Returns room for the keys and values of as many windows in int8; behind the channels stands what they are
    multiples of."""
    _, n_head, n_key, n_channel = cross[0].shape
    return torch.empty((len(cross), n_row, n_head, n_key, n_channel + SCALE_SIZE), dtype=torch.int8)


class CacheSlots:
    """Room for the caches of several windows side by side, so that one execution reads them all.

    tokens_first: the memory is (row, token, head, channel), as MAX's kernels for GPUs take it.
    """

    def __init__(self, n_slot: int, tokens_first: bool = False):
        self.tokens_first = tokens_first
        self.taken: list[KeyValueCache | None] = [None] * n_slot
        self.own: list[Tensor] = []
        self.cross: list[Tensor] = []
        self.rows = torch.empty(0, 0, dtype=torch.int64)
        self.memory: Tensor | None = None
        self.quantized_cross: Tensor | None = None
        self.buffers: dict[int, dict[str, Buffer]] = {}
        self.kept: dict[Any, Any] = {}  # by a stepper, for as long as the memory is this

    def place(self, caches: Sequence[KeyValueCache]) -> list[KeyValueCache]:
        """Puts caches into the first slots and returns them in the order of these; nobody else keeps one."""
        n = len(caches)
        free = [slot for slot in range(n) if self.taken[slot] not in caches]
        for cache in caches:
            if cache not in self.taken[:n]:
                self._move(cache, free.pop())
        self.taken[n:] = [None] * (len(self.taken) - n)
        return [cache for cache in self.taken[:n] if cache is not None]

    def _move(self, cache: KeyValueCache, slot: int) -> None:
        if not self.own:
            self._make_room(cache)
        own, cross = ([self._rows(kv, slot) for kv in kvs] for kvs in (self.own, self.cross))
        if self.tokens_first:
            for kv in own:
                kv.zero_()  # what others have left there may not be finite, and is multiplied with 0
        cache.move(own, cross, self._rows(self.rows, slot), slot * len(cache.rows))
        self.taken[slot] = cache

    def _make_room(self, cache: KeyValueCache) -> None:
        n, first = len(self.taken), cache.own[0]
        self.rows = cache.rows.repeat(n, 1)
        if self.tokens_first:
            self.own, self.cross = ([room_for_tokens_first(kv, n) for kv in kvs] for kvs in (cache.own, cache.cross))
            return
        self.memory = first.new_empty((len(cache.own), n * len(first), *first.shape[1:]))
        self.own, self.cross = list(self.memory), [kv.new_empty((n * len(kv), *kv.shape[1:])) for kv in cache.cross]

    def _rows(self, x: Tensor, slot: int) -> Tensor:
        n = len(x) // len(self.taken)
        return x[slot * n : (slot + 1) * n]

    def joined(self, n: int) -> "JoinedCache":
        """Returns the caches in the first `n` slots as one, in the same memory."""

        def first(xs: Sequence[Tensor]) -> list[Tensor]:
            return [x[: len(x) // len(self.taken) * n] for x in xs]

        def buffers(kvs: KV) -> list[Buffer]:
            return [buffer(x.transpose(1, 2) if self.tokens_first else x) for x in kvs]

        (rows,), own, cross = map(first, ([self.rows], self.own, self.cross))
        if n not in self.buffers:
            self.buffers[n] = named(cache=buffers(own), cross=buffers(cross))
        return JoinedCache(own, cross, 0, rows, 0, self.memory, None, self.buffers[n], self, n)

    def quantized(self, n: int, quantize: Quantize) -> Tensor:
        """Returns keys and values of the audio in the first `n` slots in int8; behind them there may be other rows."""
        if self.quantized_cross is None:
            self.quantized_cross = room_for_quantized(self.cross, len(self.taken))
        for slot, cache in enumerate(self.taken[:n]):
            assert cache is not None
            if cache.quantized_cross is None:
                quantize(cache.cross, self.quantized_cross, slot)
                cache.quantized_cross = self.quantized_cross[:, slot : slot + 1]
        return self.quantized_cross


@dataclass(eq=False)
class JoinedCache(KeyValueCache):
    """The caches in the first `n_slot` of some slots, as one."""

    slots: CacheSlots = field(default_factory=lambda: CacheSlots(0))
    n_slot: int = 0

    def quantized(self, quantize: Quantize) -> Tensor:
        """Returns `cross` in int8, with other rows behind it; of each window it is computed once."""
        return self.slots.quantized(self.n_slot, quantize)


def room_for_tokens_first(kv: Tensor, n: int) -> Tensor:
    """Returns room for n times as many rows as `kv` has, (row, head, token, channel); in memory the tokens of a row
    come before its heads."""
    n_row, n_head, n_token, n_channel = kv.shape
    return kv.new_empty((n * n_row, n_token, n_head, n_channel)).transpose(1, 2)
