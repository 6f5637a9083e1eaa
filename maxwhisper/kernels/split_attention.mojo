"""Attention of one query of each text, over keys that are cut into parts; for any device. Many queries of a text are as
many texts, which share its keys.

A GPU has a block of threads for every part of every head of every text, since whole heads would leave most of its
processors without work, and a second kernel puts the parts together. Both are made of functions that a CPU computes
too: all but how threads share the work is tested without a GPU. Sums are float32, of whatever dtype keys and values are.
"""

from max.gpu import barrier, block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu
from max.gpu.memory import AddressSpace
from std.math import ceildiv
from std.memory import bitcast, unsafe_stack_allocation
from std.sys import size_of
from std.utils.numerics import max_finite

import extensibility
from extensibility import InputTensor, OutputTensor

from .pointers import Numbers, Stored, numbers, stored

comptime PART = 64  # keys; a block has a thread for each, and then for each channel; `backends.PART` is the same
comptime LEAST = -max_finite[DType.float32]()  # the difference to which is a number, of minus infinity too


@always_inline
def product[dtype: DType, n_channel: Int](q: Stored[dtype], k: Stored[dtype]) -> Float32:
    comptime width = 16 // size_of[dtype]()  # the most that a thread of a GPU loads at once, from multiples of that
    var sums = SIMD[DType.float32, width](0)
    comptime for c in range(0, n_channel, width):
        var qs = q.unsafe_load[width=width, alignment=16](c).cast[DType.float32]()
        sums = qs.fma(k.unsafe_load[width=width, alignment=16](c).cast[DType.float32](), sums)
    return sums.reduce_add()


@always_inline
def score[dtype: DType, n_channel: Int](q: Stored[dtype], k: Stored[dtype]) -> Float32:
    """Returns the scaled product of a query and a key in units of log2, as all scores in this file are."""
    comptime LOG2E = 1.4426950408889634
    return product[dtype, n_channel](q, k) * Float32(Float64(n_channel) ** -0.5 * LOG2E)


@always_inline
def weight(score: Float32, greatest: Float32) -> Float32:
    """Returns 2 to the power of how far a score is from the greatest; of NaN NaN, where MAX's gives a number."""
    comptime ROUND = Float32(3 << 22)  # numbers of this size have no fraction, and their last bits count by one
    # 2^(k + rest), the rest between -0.5 and 0.5, and k from -127 on, the power of which comes out as 0.
    var x = score - greatest
    x = -127 if x < -127 else x
    var k = x + ROUND
    var rest = x - (k - ROUND)
    # As in `softmax`: fitted for the least relative error, 2e-9.
    var power = rest.fma(1.5353362e-4, 1.3398875e-3)
    power = power.fma(rest, 9.61843692e-3)
    power = power.fma(rest, 5.55033237e-2)
    power = power.fma(rest, 0.240226477)
    power = power.fma(rest, 0.693147182)
    power = power.fma(rest, 1)
    return power * bitcast[DType.float32](((bitcast[DType.uint32](k) + 127) << 23))


@always_inline
def greatest_of(scores: Pointer[Float32, _, address_space=_], n_key: Int) -> Float32:
    var greatest = Float32(LEAST)
    for key in range(n_key):
        greatest = max(greatest, scores[unsafe_offset=key])
    return greatest


@always_inline
def joined[n_channel: Int, width: Int](parts: Numbers, n_part: Int, channel: Int) -> SIMD[DType.float32, width]:
    """Returns `width` channels of attention from all its parts, each (n_channel + 2,): behind the sum of a part's
    weights stands its greatest score."""
    comptime size = n_channel + 2
    var greatest = Float32(LEAST)
    for i in range(n_part):
        greatest = max(greatest, parts[unsafe_offset=i * size + n_channel + 1])
    var weights = Float32(0)
    var sums = SIMD[DType.float32, width](0)
    for i in range(n_part):
        var part = parts.unsafe_offset(i * size)
        var weighs = weight(part[unsafe_offset=n_channel + 1], greatest)
        sums = part.unsafe_load[width=width](channel).fma(SIMD[DType.float32, width](weighs), sums)
        weights = part[unsafe_offset=n_channel].fma(weighs, weights)
    return sums / weights


@fieldwise_init
struct Task[dtype: DType, n_channel: Int, cached: Bool](TrivialRegisterPassable):
    """A head of a text: where its parts, its query, and its keys and values are, and how many of these it attends to.

    rows: of a cache, in which row each key is; k and v are then those of row 0, else the first of its own.
    """

    comptime size = Self.n_channel + 2

    var parts: Numbers
    var q: Stored[Self.dtype]
    var k: Stored[Self.dtype]
    var v: Stored[Self.dtype]
    var rows: Stored[DType.int64]
    var n_state: Int
    var n_key: Int
    var row_size: Int  # in keys

    @always_inline
    def n_part(self) -> Int:
        return ceildiv(self.n_key, PART)

    @always_inline
    def keys_of(self, part: Int) -> Int:
        """Returns how many keys a part has; of one behind the last, none or fewer."""
        return min(PART, self.n_key - part * PART)

    @always_inline
    def place(self, key: Int) -> Int:
        """Returns where a key and its value begin."""
        comptime if Self.cached:
            return (Int(self.rows[unsafe_offset=key]) * self.row_size + key) * self.n_state
        return key * self.n_state

    @always_inline
    def score(self, part: Int, key: Int) -> Float32:
        var k = self.k.unsafe_offset(self.place(part * PART + key))
        return score[Self.dtype, Self.n_channel](self.q, k)

    @always_inline
    def greatest(self, scores: Pointer[Float32, _, address_space=_], part: Int) -> Float32:
        """Returns the greatest score of a part, and leaves it there."""
        var found = greatest_of(scores, self.keys_of(part))
        self.parts[unsafe_offset=part * Self.size + Self.n_channel + 1] = found
        return found

    @always_inline
    def attend[width: Int](self, weights: Pointer[Float32, _, address_space=_], part: Int, channel: Int):
        """Writes `width` channels of a part, the sum of the values, each times its weight; behind all channels the sum
        of the weights."""
        var total = Float32(0)
        var sums = SIMD[DType.float32, width](0)
        for key in range(self.keys_of(part)):
            var weighs = weights[unsafe_offset=key]
            var at = self.place(part * PART + key) + channel
            var values = self.v.unsafe_load[width=width](at).cast[DType.float32]()
            sums = values.fma(SIMD[DType.float32, width](weighs), sums)
            total += weighs
        var its_own = self.parts.unsafe_offset(part * Self.size)
        its_own.unsafe_store(channel, sums)
        if channel == 0:
            its_own[unsafe_offset=Self.n_channel] = total

    @always_inline
    def result[width: Int](self, channel: Int) -> SIMD[Self.dtype, width]:
        return joined[Self.n_channel, width](self.parts, self.n_part(), channel).cast[Self.dtype]()


@always_inline
def task[
    dtype: DType, n_channel: Int, limited: Bool, cached: Bool
](
    parts: Numbers,
    q: Stored[dtype],
    k: Stored[dtype],
    v: Stored[dtype],
    n_past: Stored[DType.int64],
    rows: Stored[DType.int64],
    n_head: Int,
    n_key: Int,
    shared: Int,
    text: Int,
    head: Int,
) -> Task[dtype, n_channel, cached]:
    """Returns that of a head of a text. shared: how many texts attend to a row of keys. limited: whether it attends
    to so many first keys and the next one, or to all. cached: whether each key is in a row that is named."""
    var n_state = n_head * n_channel
    var first, number, seen = head * n_channel, text * n_head + head, n_key
    comptime if limited:
        seen = min(n_key, Int(n_past[unsafe_offset=text]) + 1)
    comptime if not cached:
        first += text // shared * n_key * n_state
    return Task[dtype, n_channel, cached](
        parts.unsafe_offset(number * ceildiv(n_key, PART) * (n_channel + 2)),
        q.unsafe_offset(number * n_channel),
        k.unsafe_offset(first),
        v.unsafe_offset(first),
        rows.unsafe_offset(text * n_key),
        n_state,
        seen,
        n_key,
    )


@__name(t"split_attention_{dtype}_{n_channel}_{limited}_{cached}")
def attend_on_gpu[
    dtype: DType, n_channel: Int, limited: Bool, cached: Bool
](
    parts: Numbers,
    q: Stored[dtype],
    k: Stored[dtype],
    v: Stored[dtype],
    n_past: Stored[DType.int64],
    rows: Stored[DType.int64],
    n_head: Int32,
    n_key: Int32,
    shared: Int32,
):
    """Attends from the query of a block's first index, with the head of its second, to the part of its third: a thread
    for each key, then for each channel."""
    var its_own = task[dtype, n_channel, limited, cached](
        parts, q, k, v, n_past, rows, Int(n_head), Int(n_key), Int(shared), Int(block_idx.x), Int(block_idx.y)
    )
    var part, thread = Int(block_idx.z), Int(thread_idx.x)
    var n = its_own.keys_of(part)
    var scores = unsafe_stack_allocation[PART, Float32, address_space=AddressSpace.SHARED]()
    var weights = unsafe_stack_allocation[PART, Float32, address_space=AddressSpace.SHARED]()
    if thread < n:
        scores[unsafe_offset=thread] = its_own.score(part, thread)
    barrier()
    if thread < n:
        weights[unsafe_offset=thread] = weight(scores[unsafe_offset=thread], its_own.greatest(scores, part))
    barrier()
    if n > 0:
        for channel in range(thread, n_channel, PART):
            its_own.attend[1](weights, part, channel)


@__name(t"join_attention_{dtype}_{n_channel}_{limited}")
def join_on_gpu[
    dtype: DType, n_channel: Int, limited: Bool
](
    y: Stored[dtype],
    parts: Numbers,
    n_past: Stored[DType.int64],
    n_head: Int32,
    n_key: Int32,
):
    """Puts the parts of a head together, a thread for each channel."""
    var text, head, channel = Int(block_idx.x), Int(block_idx.y), Int(thread_idx.x)
    # Nothing but the parts is looked at.
    var its_own = task[dtype, n_channel, limited, False](
        parts, y, y, y, n_past, n_past, Int(n_head), Int(n_key), 1, text, head
    )
    y[unsafe_offset=(text * Int(n_head) + head) * n_channel + channel] = its_own.result[1](channel)[0]


def attend[
    dtype: DType, n_channel: Int, limited: Bool, cached: Bool, target: StaticString
](
    y: Stored[dtype],
    parts: Numbers,
    q: Stored[dtype],
    k: Stored[dtype],
    v: Stored[dtype],
    n_past: Stored[DType.int64],
    rows: Stored[DType.int64],
    room: Int,
    n_text: Int,
    n_row: Int,
    n_key: Int,
    n_head: Int,
    ctx: DeviceContext,
) raises:
    """Attends from every text's query; room: how many numbers the parts may have."""
    if room != n_text * n_head * ceildiv(n_key, PART) * (n_channel + 2):
        raise Error("split attention: parts are of another number, or size")
    if n_text == 0:
        return
    var shared = n_text // n_row
    comptime if is_cpu[target]():
        var scores = unsafe_stack_allocation[PART, Float32]()
        var weights = unsafe_stack_allocation[PART, Float32]()
        for text in range(n_text):
            for head in range(n_head):
                var its_own = task[dtype, n_channel, limited, cached](
                    parts, q, k, v, n_past, rows, n_head, n_key, shared, text, head
                )
                for part in range(its_own.n_part()):
                    var n = its_own.keys_of(part)
                    for key in range(n):
                        scores[unsafe_offset=key] = its_own.score(part, key)
                    var greatest = its_own.greatest(scores, part)
                    for key in range(n):
                        weights[unsafe_offset=key] = weight(scores[unsafe_offset=key], greatest)
                    its_own.attend[n_channel](weights, part, 0)
                y.unsafe_store((text * n_head + head) * n_channel, its_own.result[n_channel](0))
    else:
        ctx.enqueue_function[attend_on_gpu[dtype, n_channel, limited, cached]](
            parts,
            q,
            k,
            v,
            n_past,
            rows,
            Int32(n_head),
            Int32(n_key),
            Int32(shared),
            grid_dim=(n_text, n_head, ceildiv(n_key, PART)),  # of the first there may be millions
            block_dim=PART,
        )
        ctx.enqueue_function[join_on_gpu[dtype, n_channel, limited]](
            y, parts, n_past, Int32(n_head), Int32(n_key), grid_dim=(n_text, n_head), block_dim=n_channel
        )


@extensibility.register("maxwhisper.split_attention")
struct SplitAttention:
    """Attends to every key.

    y, q: (text, 1, head * channel). parts: float32 (text, head, key / 64, channel + 2), room.
    k, v: (row, key, head, channel); consecutive texts share a row.
    """

    @staticmethod
    def execute[
        target: StaticString, n_channel: Int
    ](
        y: OutputTensor[rank=3, ...],
        parts: OutputTensor[dtype=DType.float32, rank=4, ...],
        q: InputTensor[dtype=y.dtype, rank=3, ...],
        k: InputTensor[dtype=y.dtype, rank=4, ...],
        v: InputTensor[dtype=y.dtype, rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        attend[y.dtype, n_channel, False, False, target](
            stored[y.dtype](y),
            numbers(parts),
            stored[y.dtype](q),
            stored[y.dtype](k),
            stored[y.dtype](v),
            stored[DType.int64](q),  # which nobody looks at
            stored[DType.int64](q),
            parts.size(),
            q.dim_size(0),
            k.dim_size(0),
            k.dim_size(1),
            k.dim_size(2),
            ctx,
        )


@extensibility.register("maxwhisper.limited_split_attention")
struct LimitedSplitAttention:
    """Attends to as many first keys as `n_past`, (text,), says, and to the next one; otherwise as `SplitAttention`."""

    @staticmethod
    def execute[
        target: StaticString, n_channel: Int
    ](
        y: OutputTensor[rank=3, ...],
        parts: OutputTensor[dtype=DType.float32, rank=4, ...],
        q: InputTensor[dtype=y.dtype, rank=3, ...],
        k: InputTensor[dtype=y.dtype, rank=4, ...],
        v: InputTensor[dtype=y.dtype, rank=4, ...],
        n_past: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        attend[y.dtype, n_channel, True, False, target](
            stored[y.dtype](y),
            numbers(parts),
            stored[y.dtype](q),
            stored[y.dtype](k),
            stored[y.dtype](v),
            stored[DType.int64](n_past),
            stored[DType.int64](n_past),  # which nobody looks at
            parts.size(),
            q.dim_size(0),
            k.dim_size(0),
            k.dim_size(1),
            k.dim_size(2),
            ctx,
        )


@extensibility.register("maxwhisper.cached_split_attention")
struct CachedSplitAttention:
    """Attends to as many first keys of a cache as a text has filled, and to the next, which is its own.

    As `SplitAttention`, but of keys and values each in the row that `rows`, (text, key), has for it; n_past: (text,),
    how many first ones are filled. What other positions hold is never read.
    """

    @staticmethod
    def execute[
        target: StaticString, n_channel: Int
    ](
        y: OutputTensor[rank=3, ...],
        parts: OutputTensor[dtype=DType.float32, rank=4, ...],
        q: InputTensor[dtype=y.dtype, rank=3, ...],
        k: InputTensor[dtype=y.dtype, rank=4, ...],
        v: InputTensor[dtype=y.dtype, rank=4, ...],
        n_past: InputTensor[dtype=DType.int64, rank=1, ...],
        rows: InputTensor[dtype=DType.int64, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        attend[y.dtype, n_channel, True, True, target](
            stored[y.dtype](y),
            numbers(parts),
            stored[y.dtype](q),
            stored[y.dtype](k),
            stored[y.dtype](v),
            stored[DType.int64](n_past),
            stored[DType.int64](rows),
            parts.size(),
            q.dim_size(0),
            k.dim_size(0),
            k.dim_size(1),
            k.dim_size(2),
            ctx,
        )
