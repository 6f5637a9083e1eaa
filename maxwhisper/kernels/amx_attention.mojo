"""Attention of many queries by AMX: of some blocks of queries with some blocks of keys and their values at a time.

Scores and softmax's weights then never leave the cache. A query's greatest score is known after the last key only: what
was added up before a greater one is multiplied by what that makes of it.
"""

from max.algorithm import sync_parallelize
from std.math import align_up, ceildiv, iota
from std.utils.numerics import min_finite

from .amx import (
    BLOCK,
    STEP,
    TILE,
    Packed,
    block_size,
    configure,
    multiply,
    pack_columns,
    pack_row,
    pack_terms,
    packed,
    release,
    room,
    store,
)
from .attention import AttentionSizes, scale
from .pointers import Numbers, Stored, untracked
from .softmax import exponential, greatest
from .team import even_shares
from .tiles import Floats, WIDTH

comptime KEYS = 8 * BLOCK  # at a time
comptime BLOCKS = 4  # of queries, for which keys and values are read once
comptime SHARE = BLOCKS * BLOCK  # queries that are worth another copy of the keys


@fieldwise_init
struct Softmax(Copyable, Movable):
    """What is known of a query's weights: its greatest score, and the sum of exponentials so far."""

    var highest: Float32
    var sum: Float32


@no_inline
def weigh[
    n_channel: Int, dtype: DType
](weights: Packed, row: Int, scores: Numbers, n_key: Int, total: Numbers, mut softmax: Softmax):
    """Packs a query's exponentials of some scores, which it scales, and brings its total (n_channel,) to the greatest
    score now known."""
    comptime factor = scale[n_channel]()
    var highest = max(softmax.highest, greatest(scores, n_key) * factor)
    var ratio = exponential(Floats(softmax.highest - highest))
    var sums = Array[Floats, 2](fill=0)
    for step in range(ceildiv(n_key, STEP)):
        var both = Array[Floats, 2](fill=0)
        comptime for i in range(2):
            var at = step * STEP + i * WIDTH
            var some = exponential(scores.unsafe_load[width=WIDTH](at) * factor - highest)
            if at + WIDTH > n_key:
                some = iota[DType.int32, WIDTH]().lt(Int32(n_key - at)).select(some, Floats(0))
            sums[i] += some
            both[i] = some
        store(weights, row, step, rebind[SIMD[DType.float32, STEP]](both[0].join(both[1])).cast[dtype]())
    softmax.sum = softmax.sum * ratio[0] + (sums[0] + sums[1]).reduce_add()
    softmax.highest = highest
    comptime for c in range(0, n_channel, WIDTH):
        total.unsafe_store(c, total.unsafe_load[width=WIDTH](c) * ratio)


@no_inline
def attend[
    n_channel: Int, dtype: DType
](
    y: Stored[dtype],
    q: Stored[dtype],
    n_query: Int,
    n_state: Int,
    keys: Packed,
    values: Packed,
    n_key: Int,
    queries: Packed,
    weights: Packed,
    scores: Numbers,
    totals: Numbers,
):
    """Computes the attention of at most BLOCKS blocks of queries, `n_state` apart, over all keys, with room for packed
    queries, a block's packed weights and scores (BLOCK, KEYS), and totals (query, n_channel in blocks)."""
    comptime n_total = align_up(n_channel, BLOCK)
    var softmax = Array[Softmax, BLOCKS * BLOCK](fill=Softmax(min_finite[DType.float32](), 0))
    for row in range(n_query):
        var block = queries.unsafe_offset(row // BLOCK * block_size[dtype](n_channel))
        pack_row(block, row % BLOCK, q.unsafe_offset(row * n_state), n_channel)
        comptime for c in range(0, n_channel, WIDTH):
            totals.unsafe_store(row * n_total + c, Floats(0))
    configure()
    for first in range(0, n_key, KEYS):
        var n_some = min(KEYS, n_key - first)
        for query in range(0, n_query, BLOCK):
            var block = queries.unsafe_offset(query // BLOCK * block_size[dtype](n_channel))
            for key in range(0, n_some, BLOCK):
                var some = keys.unsafe_offset((first + key) // BLOCK * block_size[dtype](n_channel))
                multiply[dtype](scores.unsafe_offset(key), KEYS, block, some, n_channel)
            for row in range(min(BLOCK, n_query - query)):
                weigh[n_channel, dtype](
                    weights,
                    row,
                    scores.unsafe_offset(row * KEYS),
                    n_some,
                    totals.unsafe_offset((query + row) * n_total),
                    softmax[query + row],
                )
            comptime for channel in range(0, n_channel, BLOCK):
                var some = values.unsafe_offset(
                    channel // BLOCK * block_size[dtype](n_key) + first // STEP * block_size[dtype](STEP)
                )
                multiply[dtype, add=True](
                    totals.unsafe_offset(query * n_total + channel), n_total, weights, some, n_some
                )
    release()
    for row in range(n_query):
        comptime for c in range(0, n_channel, WIDTH):
            var total = totals.unsafe_load[width=WIDTH](row * n_total + c)
            y.unsafe_store(row * n_state + c, (total / softmax[row].sum).cast[dtype]())


@no_inline
def attend_by_amx[
    n_channel: Int, dtype: DType, key_dtype: DType
](y: Stored[dtype], q: Stored[dtype], k: Stored[key_dtype], v: Stored[key_dtype], sizes: AttentionSizes) raises:
    """Attends from every query to every key."""
    comptime assert n_channel % TILE == 0, "channels must fill registers"
    var n_query, n_state, n_head, n_key = sizes.n_query, sizes.n_state, sizes.n_head, sizes.n_key
    var n_text = sizes.n_text // sizes.n_row  # that share a row
    var n_pair = sizes.n_text * n_head
    var n_share = even_shares(n_pair, n_query // SHARE)  # each packs its keys and values anew
    var share = align_up(ceildiv(n_query, n_share), BLOCK)
    n_share = ceildiv(n_query, share)

    def task(number: Int) raises {imm}:
        var first = number % n_share * share
        var end = min(first + share, n_query)
        var text, head = divmod(number // n_share, n_head)
        var kv = (text // n_text * n_head + head) * n_key * n_channel
        var keys = room[dtype](ceildiv(n_key, BLOCK), n_channel)
        var values = room[dtype](ceildiv(n_channel, BLOCK), n_key)
        var queries = room[dtype](BLOCKS, n_channel)
        var weights = room[dtype](1, KEYS)
        var scores = List[Floats](unsafe_uninit_length=BLOCK * KEYS // WIDTH)
        var totals = List[Floats](unsafe_uninit_length=SHARE * align_up(n_channel, BLOCK) // WIDTH)
        for key in range(0, n_key, BLOCK):
            var into = packed(keys).unsafe_offset(key // BLOCK * block_size[dtype](n_channel))
            var its_keys = k.unsafe_offset(kv + key * n_channel)
            pack_columns[dtype](into, its_keys, min(BLOCK, n_key - key), n_channel)
        pack_terms[n_channel, dtype](packed(values), v.unsafe_offset(kv), n_key)
        for query in range(first, end, SHARE):
            var at = (text * n_query + query) * n_state + head * n_channel
            attend[n_channel](
                y.unsafe_offset(at),
                q.unsafe_offset(at),
                min(SHARE, end - query),
                n_state,
                packed(keys),
                packed(values),
                n_key,
                packed(queries),
                packed(weights),
                untracked(scores).unsafe_bitcast[Float32](),
                untracked(totals).unsafe_bitcast[Float32](),
            )
        # Which nothing else says are still used.
        _ = keys^
        _ = values^
        _ = queries^
        _ = weights^
        _ = scores^
        _ = totals^

    sync_parallelize(task, n_pair * n_share)
