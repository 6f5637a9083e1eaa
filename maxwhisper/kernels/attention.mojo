"""Attention of one query per text, over keys and values that are read once and not copied."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from max.runtime.asyncrt import parallelism_level
from std.math import ceildiv, exp

import extensibility
from extensibility import InputTensor, OutputTensor

from .tiles import WIDTH

comptime QUERIES = 4  # at a time, or else one: their sums fit the registers
comptime KEYS = 64  # added up at a time: a sum of sums rounds less than one long sum
comptime TASK = 1 << 17  # numbers in keys and values that are worth a task of their own


struct Rows[dtype: DType, origin: Origin[mut=False]](TrivialRegisterPassable):
    """Consecutive keys or values of a head, each (channel,)."""

    var first: Pointer[Scalar[Self.dtype], Self.origin]
    var number: Int

    def __init__(out self, first: Pointer[Scalar[Self.dtype], Self.origin], number: Int):
        self.first = first
        self.number = number


def scale[n_channel: Int]() -> Float32:
    return Float32(Float64(n_channel) ** -0.5)


@always_inline
def score[
    n_channel: Int, queries: Int
](q: Pointer[Float32, _], n_state: Int, keys: Rows, scores: Pointer[mut=True, Float32, _], n_key: Int):
    """Writes the scaled products of some queries, `n_state` apart, with every key; scores is (queries, n_key)."""
    comptime vectors = n_channel // WIDTH
    var qs = Array[SIMD[DType.float32, WIDTH], queries * vectors](fill=0)
    comptime for i in range(queries):
        comptime for c in range(vectors):
            qs[i * vectors + c] = q.unsafe_load[width=WIDTH](i * n_state + c * WIDTH)
    for key in range(keys.number):
        var sums = Array[SIMD[DType.float32, WIDTH], queries](fill=0)
        comptime for c in range(vectors):
            var ks = keys.first.unsafe_load[width=WIDTH](key * n_channel + c * WIDTH).cast[DType.float32]()
            comptime for i in range(queries):
                sums[i] = ks.fma(qs[i * vectors + c], sums[i])
        comptime for i in range(queries):
            scores[unsafe_offset=i * n_key + key] = sums[i].reduce_add() * scale[n_channel]()


@always_inline
def exponentials[
    dtype: DType
](scores: Pointer[Float32, _], weights: Pointer[mut=True, Scalar[dtype], _], n_key: Int) -> Float32:
    """Writes softmax's weights before they are divided by their sum, which it returns."""
    var whole = n_key // WIDTH * WIDTH
    var highest = SIMD[DType.float32, WIDTH](scores[unsafe_offset=0])
    for key in range(0, whole, WIDTH):
        highest = max(highest, scores.unsafe_load[width=WIDTH](key))
    var greatest = highest.reduce_max()
    for key in range(whole, n_key):
        greatest = max(greatest, scores[unsafe_offset=key])
    var sums = SIMD[DType.float32, WIDTH](0)
    for key in range(0, whole, WIDTH):
        var some = exp(scores.unsafe_load[width=WIDTH](key) - greatest)
        weights.unsafe_store(key, some.cast[dtype]())
        sums += some
    var total = sums.reduce_add()
    for key in range(whole, n_key):
        var weight = exp(scores[unsafe_offset=key] - greatest)
        weights[unsafe_offset=key] = weight.cast[dtype]()
        total += weight
    return total


@always_inline
def add_weighted[
    n_channel: Int, queries: Int
](
    weights: Pointer[Float32, _],
    n_key: Int,
    values: Rows,
    mut totals: Array[SIMD[DType.float32, WIDTH], queries * (n_channel // WIDTH)],
):
    """Adds the values times every query's weights (queries, n_key) to its total."""
    comptime vectors = n_channel // WIDTH
    for first in range(0, values.number, KEYS):
        var sums = Array[SIMD[DType.float32, WIDTH], queries * vectors](fill=0)
        for key in range(first, min(first + KEYS, values.number)):
            comptime for c in range(vectors):
                var vs = values.first.unsafe_load[width=WIDTH](key * n_channel + c * WIDTH).cast[DType.float32]()
                comptime for i in range(queries):
                    sums[i * vectors + c] = vs.fma(weights[unsafe_offset=i * n_key + key], sums[i * vectors + c])
        comptime for i in range(queries * vectors):
            totals[i] += sums[i]


@always_inline
def attend[
    n_channel: Int, queries: Int
](
    y: Pointer[mut=True, Float32, _],
    q: Pointer[Float32, _],
    n_state: Int,
    past_keys: Rows,
    past_values: Rows,
    new_keys: Rows,
    new_values: Rows,
    scores: Pointer[mut=True, Float32, _],
    weights: Pointer[mut=True, Float32, _],
):
    """The attention of some queries, `n_state` apart, over past and new keys; scores and weights hold a value for each
    of both."""
    comptime vectors = n_channel // WIDTH
    var n_past = past_keys.number
    var n_key = n_past + new_keys.number
    score[n_channel, queries](q, n_state, past_keys, scores, n_key)
    score[n_channel, queries](q, n_state, new_keys, scores.unsafe_offset(n_past), n_key)
    var sums = Array[Float32, queries](fill=0)
    comptime for i in range(queries):
        sums[i] = exponentials(scores.unsafe_offset(i * n_key), weights.unsafe_offset(i * n_key), n_key)
    var totals = Array[SIMD[DType.float32, WIDTH], queries * vectors](fill=0)
    add_weighted[n_channel, queries](weights, n_key, past_values, totals)
    add_weighted[n_channel, queries](weights.unsafe_offset(n_past), n_key, new_values, totals)
    comptime for i in range(queries):
        comptime for c in range(vectors):
            y.unsafe_store(i * n_state + c * WIDTH, totals[i * vectors + c] / sums[i])


def attention[
    n_channel: Int
](
    y: OutputTensor[dtype=DType.float32, rank=3, ...],
    q: InputTensor[dtype=DType.float32, rank=3, ...],
    k: InputTensor[rank=4, ...],
    v: InputTensor[rank=4, ...],
    n_past: List[Int],
    k_new: InputTensor[rank=4, ...],
    v_new: InputTensor[rank=4, ...],
    n_new: Int,
) raises:
    """Attends to the first `n_past` places of each row of k and v, and to the first `n_new` of k_new and v_new."""
    comptime assert n_channel % WIDTH == 0, "channels must fill vectors"
    var n_row = k.dim_size(0)
    var n_head = k.dim_size(1)
    var n_place = k.dim_size(2)
    var n_query = q.dim_size(0) // n_row  # texts that share a row
    var n_state = q.dim_size(2)
    var qs, ys = q.unsafe_ptr(), y.unsafe_ptr()
    var ks, vs = k.unsafe_ptr(), v.unsafe_ptr()
    var ks_new, vs_new = k_new.unsafe_ptr(), v_new.unsafe_ptr()

    @always_inline
    @__parameter
    def head(number: Int, scores: Pointer[mut=True, Float32, _], weights: Pointer[mut=True, Float32, _]):
        var row = number // n_head
        var past = number * n_place * n_channel
        var new = number * n_new * n_channel

        @always_inline
        @__parameter
        def some[queries: Int](query: Int):
            var at = (row * n_query + query) * n_state + number % n_head * n_channel
            attend[n_channel, queries](
                ys.unsafe_offset(at),
                qs.unsafe_offset(at),
                n_state,
                Rows(ks.unsafe_offset(past), n_past[row]),
                Rows(vs.unsafe_offset(past), n_past[row]),
                Rows(ks_new.unsafe_offset(new), n_new),
                Rows(vs_new.unsafe_offset(new), n_new),
                scores,
                weights,
            )

        var query = 0
        while query + QUERIES <= n_query:
            some[QUERIES](query)
            query += QUERIES
        for rest in range(query, n_query):
            some[1](rest)

    var n_key, longest = n_row * n_new, 0
    for row in range(n_row):
        n_key += n_past[row]
        longest = max(longest, n_past[row])
    var n_task = max(1, min(n_key * n_head * n_channel * 2 // TASK, parallelism_level(None)))
    var share = ceildiv(n_row * n_head, n_task)

    def task(number: Int) raises {imm}:
        var scores = List[Float32](length=QUERIES * (longest + n_new), fill=0)
        var weights = List[Float32](length=QUERIES * (longest + n_new), fill=0)
        for each in range(number * share, min((number + 1) * share, n_row * n_head)):
            head(each, scores.unsafe_ptr(), weights.unsafe_ptr())

    sync_parallelize(task, ceildiv(n_row * n_head, share))


@extensibility.register("maxwhisper.attention")
struct Attention:
    """Computes softmax(q @ k.T / sqrt(n_channel)) @ v for one query per text.

    y, q: (batch, 1, head * channel).
    k, v: (row, head, key, channel); batch / row consecutive texts share a row.
    """

    @staticmethod
    def execute[
        n_channel: Int
    ](
        y: OutputTensor[dtype=DType.float32, rank=3, ...],
        q: InputTensor[dtype=DType.float32, rank=3, ...],
        k: InputTensor[rank=4, ...],
        v: InputTensor[rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        attention[n_channel](y, q, k, v, List[Int](length=k.dim_size(0), fill=k.dim_size(2)), k, v, 0)


@extensibility.register("maxwhisper.cached_attention")
struct CachedAttention:
    """Computes the same over a cache and one new key and value for each text.

    y, q: (batch, 1, head * channel).
    k, v: (batch, head, place, channel), of which the first `n_past` places of a text are filled; n_past: (batch,).
    k_new, v_new: (batch, head, 1, channel).
    """

    @staticmethod
    def execute[
        n_channel: Int
    ](
        y: OutputTensor[dtype=DType.float32, rank=3, ...],
        q: InputTensor[dtype=DType.float32, rank=3, ...],
        k: InputTensor[rank=4, ...],
        v: InputTensor[rank=4, ...],
        n_past: InputTensor[dtype=DType.int64, rank=1, ...],
        k_new: InputTensor[rank=4, ...],
        v_new: InputTensor[rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        var lengths = List[Int](length=k.dim_size(0), fill=0)
        for row in range(k.dim_size(0)):
            lengths[row] = Int(n_past.unsafe_ptr()[unsafe_offset=row])
        attention[n_channel](y, q, k, v, lengths, k_new, v_new, 1)
