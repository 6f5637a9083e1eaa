"""Attention of one query per text, over keys and values that are read once and not copied; and the cache of those."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import ceildiv

import extensibility
from extensibility import InputTensor, ManagedTensorSlice, OutputTensor, _MutableInputTensor

from .linear import row_size
from .pointers import Numbers, Stored, numbers, stored
from .softmax import exponentials
from .team import task_count
from .tiles import WIDTH

comptime QUERIES = 4  # at a time, or else one: their sums fit the registers
comptime KEYS = 64  # added up at a time: a sum of sums rounds less than one long sum
comptime TASK = 1 << 17  # numbers in keys and values that are worth a task of their own


trait Keys(Sized, TrivialRegisterPassable):
    """Keys or values of a head, each (channel,)."""

    def load[n_channel: Int](self, key: Int, channel: Int) -> SIMD[DType.float32, WIDTH]:
        """Returns some channels of one of them."""
        ...


@fieldwise_init
struct Rows[dtype: DType, origin: Origin](Keys):
    """One behind the other; behind each in int8 stands the float32 that its channels are multiples of."""

    var first: Pointer[Scalar[Self.dtype], Self.origin]
    var number: Int

    @always_inline
    def __len__(self) -> Int:
        return self.number

    @always_inline
    def load[n_channel: Int](self, key: Int, channel: Int) -> SIMD[DType.float32, WIDTH]:
        comptime size = row_size[Self.dtype](n_channel)
        var its_own = self.first.unsafe_offset(key * size)
        var values = its_own.unsafe_load[width=WIDTH](channel).cast[DType.float32]()
        comptime if Self.dtype == DType.int8:
            values *= its_own.unsafe_offset(n_channel).unsafe_bitcast[Float32]()[unsafe_offset=0]
        return values


@fieldwise_init
struct ScatteredRows[dtype: DType, origin: Origin, row_origin: Origin](Keys):
    """Those of a cache, each in a row of its own: that of a position lies in row `rows[position]`. The cache's rows are
    `cache_row` numbers apart, and `first` is where the head begins in row 0."""

    var first: Pointer[Scalar[Self.dtype], Self.origin]
    var number: Int
    var rows: Pointer[Int64, Self.row_origin]
    var cache_row: Int

    @always_inline
    def __len__(self) -> Int:
        return self.number

    @always_inline
    def load[n_channel: Int](self, key: Int, channel: Int) -> SIMD[DType.float32, WIDTH]:
        var at = Int(self.rows[unsafe_offset=key]) * self.cache_row + key * n_channel + channel
        return self.first.unsafe_load[width=WIDTH](at).cast[DType.float32]()


@fieldwise_init
struct ContinuedRows[
    dtype: DType, origin: Origin, row_origin: Origin, new_origin: Origin
](Keys):
    """Those of a cache, then `n_new` that are not in it yet, `new_row_size` numbers apart, as if they were."""

    var cached: ScatteredRows[Self.dtype, Self.origin, Self.row_origin]
    var new: Pointer[Float32, Self.new_origin]
    var n_new: Int
    var new_row_size: Int

    @always_inline
    def __len__(self) -> Int:
        return len(self.cached) + self.n_new

    @always_inline
    def load[n_channel: Int](self, key: Int, channel: Int) -> SIMD[DType.float32, WIDTH]:
        var number = key - len(self.cached)
        if number < 0:
            return self.cached.load[n_channel](key, channel)
        var values = self.new.unsafe_load[width=WIDTH](number * self.new_row_size + channel)
        return values.cast[Self.dtype]().cast[DType.float32]()


def scale[n_channel: Int]() -> Float32:
    return Float32(Float64(n_channel) ** -0.5)


@no_inline
def score[
    n_channel: Int, queries: Int
](q: Pointer[Float32, _], n_state: Int, keys: Some[Keys], scores: Pointer[mut=True, Float32, _], n_key: Int):
    """Writes the scaled products of some queries, `n_state` apart, with every key; scores is (queries, n_key)."""
    comptime vectors = n_channel // WIDTH
    var qs = Array[SIMD[DType.float32, WIDTH], queries * vectors](fill=0)
    comptime for i in range(queries):
        comptime for c in range(vectors):
            qs[i * vectors + c] = q.unsafe_load[width=WIDTH](i * n_state + c * WIDTH)
    for key in range(len(keys)):
        var sums = Array[SIMD[DType.float32, WIDTH], queries](fill=0)
        comptime for c in range(vectors):
            var ks = keys.load[n_channel](key, c * WIDTH)
            comptime for i in range(queries):
                sums[i] = ks.fma(qs[i * vectors + c], sums[i])
        comptime for i in range(queries):
            scores[unsafe_offset=i * n_key + key] = sums[i].reduce_add() * scale[n_channel]()


@no_inline
def add_weighted[
    n_channel: Int, queries: Int
](
    weights: Pointer[Float32, _],
    n_key: Int,
    values: Some[Keys],
    mut totals: Array[SIMD[DType.float32, WIDTH], queries * (n_channel // WIDTH)],
):
    """Adds the values times every query's weights (queries, n_key) to its total."""
    comptime vectors = n_channel // WIDTH
    for first in range(0, len(values), KEYS):
        var sums = Array[SIMD[DType.float32, WIDTH], queries * vectors](fill=0)
        for key in range(first, min(first + KEYS, len(values))):
            comptime for c in range(vectors):
                var vs = values.load[n_channel](key, c * WIDTH)
                comptime for i in range(queries):
                    sums[i * vectors + c] = vs.fma(weights[unsafe_offset=i * n_key + key], sums[i * vectors + c])
        comptime for i in range(queries * vectors):
            totals[i] += sums[i]


@always_inline
def store[
    n_channel: Int, queries: Int
](
    y: Pointer[mut=True, Float32, _],
    n_state: Int,
    totals: Array[SIMD[DType.float32, WIDTH], queries * (n_channel // WIDTH)],
    sums: Array[Float32, queries],
):
    """Writes every query's total, divided by the sum of its weights; n_state apart."""
    comptime vectors = n_channel // WIDTH
    comptime for i in range(queries):
        comptime for c in range(vectors):
            y.unsafe_store(i * n_state + c * WIDTH, totals[i * vectors + c] / sums[i])


@always_inline
def attend_together[
    n_channel: Int, queries: Int
](
    y: Pointer[mut=True, Float32, _],
    q: Pointer[Float32, _],
    n_state: Int,
    keys: Rows,
    values: Rows,
    scores: Pointer[mut=True, Float32, _],
    weights: Pointer[mut=True, Float32, _],
):
    """Computes the attention of some queries, `n_state` apart, over the same keys."""
    var n_key = len(keys)
    score[n_channel, queries](q, n_state, keys, scores, n_key)
    var sums = Array[Float32, queries](fill=0)
    comptime for i in range(queries):
        sums[i] = exponentials(scores.unsafe_offset(i * n_key), weights.unsafe_offset(i * n_key), n_key)
    var totals = Array[SIMD[DType.float32, WIDTH], queries * (n_channel // WIDTH)](fill=0)
    add_weighted[n_channel, queries](weights, n_key, values, totals)
    store[n_channel, queries](y, n_state, totals, sums)


def attend_to_window[
    n_channel: Int
](
    y: Pointer[mut=True, Float32, _],
    q: Pointer[Float32, _],
    n_query: Int,
    n_state: Int,
    keys: Rows,
    values: Rows,
    scores: Pointer[mut=True, Float32, _],
    weights: Pointer[mut=True, Float32, _],
):
    """Computes the attention of a head of all queries, `n_state` apart, over the same keys; scores and weights hold
    QUERIES values for each key."""
    var query = 0
    while query + QUERIES <= n_query:
        attend_together[n_channel, QUERIES](
            y.unsafe_offset(query * n_state), q.unsafe_offset(query * n_state), n_state, keys, values, scores, weights
        )
        query += QUERIES
    for rest in range(query, n_query):
        attend_together[n_channel, 1](
            y.unsafe_offset(rest * n_state), q.unsafe_offset(rest * n_state), n_state, keys, values, scores, weights
        )


def attend_to_text[
    n_channel: Int, new_dtype: DType
](
    y: Pointer[mut=True, Float32, _],
    q: Pointer[Float32, _],
    keys: Some[Keys],
    values: Some[Keys],
    new_key: Pointer[Scalar[new_dtype], _],
    new_value: Pointer[Scalar[new_dtype], _],
    scores: Pointer[mut=True, Float32, _],
    weights: Pointer[mut=True, Float32, _],
):
    """Computes the attention of a head of one query over the text before it and its own key; scores and weights hold a
    value for each key."""
    var n_past = len(keys)
    score[n_channel, 1](q, 0, keys, scores, 0)
    score[n_channel, 1](q, 0, Rows(new_key, 1), scores.unsafe_offset(n_past), 0)
    var sums = Array[Float32, 1](fill=exponentials(scores, weights, n_past + 1))
    var totals = Array[SIMD[DType.float32, WIDTH], n_channel // WIDTH](fill=0)
    add_weighted[n_channel, 1](weights, 0, values, totals)
    add_weighted[n_channel, 1](weights.unsafe_offset(n_past), 0, Rows(new_value, 1), totals)
    store[n_channel, 1](y, 0, totals, sums)


def share_of(n_head: Int, n_key: Int, n_channel: Int) -> Int:
    """Returns how many of n_head heads, which have n_key keys together, a task computes."""
    return ceildiv(n_head, task_count(n_head, n_key * n_channel * 2 // TASK))


@fieldwise_init
struct AttentionSizes(TrivialRegisterPassable):
    """The sizes of the queries of some texts, and of the keys they attend to, in rows that consecutive texts share."""

    var n_text: Int
    var n_query: Int
    var n_state: Int
    var n_row: Int
    var n_head: Int
    var n_key: Int

    @always_inline
    @staticmethod
    def of(q: ManagedTensorSlice[rank=3, ...], k: ManagedTensorSlice[rank=4, ...]) -> Self:
        """Returns the sizes of q (text, query, state) and k (row, head, key, channel)."""
        return Self(q.dim_size(0), q.dim_size(1), q.dim_size(2), k.dim_size(0), k.dim_size(1), k.dim_size(2))


@no_inline
def attend_to_windows[
    n_channel: Int, dtype: DType
](y: Numbers, q: Numbers, k: Stored[dtype], v: Stored[dtype], sizes: AttentionSizes) raises:
    """Computes the attention of one query per text over the keys of its window, which consecutive texts share.

    y, q: (text, state). k, v: (row, head, key, channel).
    """
    comptime assert n_channel % WIDTH == 0, "channels must fill vectors"
    var n_query = sizes.n_text // sizes.n_row
    var n_key, n_state = sizes.n_key, sizes.n_state
    var n_pair = sizes.n_row * sizes.n_head
    var share = share_of(n_pair, n_pair * n_key, n_channel)

    def task(number: Int) raises {imm}:
        var scores = List[Float32](length=QUERIES * n_key, fill=0)
        var weights = List[Float32](length=QUERIES * n_key, fill=0)
        for head in range(number * share, min((number + 1) * share, n_pair)):
            var at = head // sizes.n_head * n_query * n_state + head % sizes.n_head * n_channel
            attend_to_window[n_channel](
                y.unsafe_offset(at),
                q.unsafe_offset(at),
                n_query,
                n_state,
                Rows(k.unsafe_offset(head * n_key * n_channel), n_key),
                Rows(v.unsafe_offset(head * n_key * n_channel), n_key),
                scores.unsafe_ptr(),
                weights.unsafe_ptr(),
            )

    sync_parallelize(task, ceildiv(n_pair, share))


@no_inline
def attend_to_texts[
    n_channel: Int, dtype: DType, new_dtype: DType
](
    y: Numbers,
    q: Numbers,
    k: Stored[dtype],
    v: Stored[dtype],
    lengths: Stored[DType.int64],
    rows: Stored[DType.int64],
    k_new: Stored[new_dtype],
    v_new: Stored[new_dtype],
    sizes: AttentionSizes,
) raises:
    """Computes the attention of one query per text over the cached keys of the text before, and its own new key.

    y, q: (text, state). k, v: (row, head, position, channel). lengths: (text,), how many positions are filled.
    rows: (text, position), the row of a text's key and value of a position. k_new, v_new: (text, head, channel).
    """
    comptime assert n_channel % WIDTH == 0, "channels must fill vectors"
    var n_head, n_position = sizes.n_head, sizes.n_key
    var n_pair = sizes.n_text * n_head
    var cache_row = n_head * n_position * n_channel
    var n_key, longest = 0, 0
    for text in range(sizes.n_text):
        n_key += n_head * (Int(lengths[unsafe_offset=text]) + 1)
        longest = max(longest, Int(lengths[unsafe_offset=text]) + 1)
    var share = share_of(n_pair, n_key, n_channel)

    def task(number: Int) raises {imm}:
        var scores = List[Float32](length=longest, fill=0)
        var weights = List[Float32](length=longest, fill=0)
        for each in range(number * share, min((number + 1) * share, n_pair)):
            var text, head = divmod(each, n_head)
            var at = head * n_position * n_channel
            var length = Int(lengths[unsafe_offset=text])
            var its_rows = rows.unsafe_offset(text * n_position)
            attend_to_text[n_channel](
                y.unsafe_offset(each * n_channel),
                q.unsafe_offset(each * n_channel),
                ScatteredRows(k.unsafe_offset(at), length, its_rows, cache_row),
                ScatteredRows(v.unsafe_offset(at), length, its_rows, cache_row),
                k_new.unsafe_offset(each * n_channel),
                v_new.unsafe_offset(each * n_channel),
                scores.unsafe_ptr(),
                weights.unsafe_ptr(),
            )

    sync_parallelize(task, ceildiv(n_pair, share))


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
        v: InputTensor[dtype=k.dtype, rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        var ks, vs = stored[k.dtype](k), stored[k.dtype](v)
        attend_to_windows[n_channel](numbers(y), numbers(q), ks, vs, AttentionSizes.of(q, k))


@extensibility.register("maxwhisper.cached_attention")
struct CachedAttention:
    """Computes softmax(q @ k.T / sqrt(n_channel)) @ v for one query per text, over a cache and one new key and value of
    the text.

    y, q: (batch, 1, head * channel).
    k, v: (row, head, position, channel), of which the first `n_past` positions of a text are filled; n_past: (batch,).
    rows: (batch, position), the row of the cache in which a text's key and value of a position are.
    k_new, v_new: (batch, head, 1, channel).
    """

    @staticmethod
    def execute[
        n_channel: Int
    ](
        y: OutputTensor[dtype=DType.float32, rank=3, ...],
        q: InputTensor[dtype=DType.float32, rank=3, ...],
        k: InputTensor[rank=4, ...],
        v: InputTensor[dtype=k.dtype, rank=4, ...],
        n_past: InputTensor[dtype=DType.int64, rank=1, ...],
        rows: InputTensor[dtype=DType.int64, rank=2, ...],
        k_new: InputTensor[rank=4, ...],
        v_new: InputTensor[dtype=k_new.dtype, rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        attend_to_texts[n_channel](
            numbers(y),
            numbers(q),
            stored[k.dtype](k),
            stored[k.dtype](v),
            stored[DType.int64](n_past),
            stored[DType.int64](rows),
            stored[k_new.dtype](k_new),
            stored[k_new.dtype](v_new),
            AttentionSizes.of(q, k),
        )


@extensibility.register("maxwhisper.append")
struct Append:
    """Puts new keys and values of each text into its own row of a cache, behind those that are filled.

    k, v: (row, head, position, channel), of which the first `n_past` positions of a text are filled; n_past: (batch,).
    k_new, v_new: (batch, token, head * channel).
    """

    @staticmethod
    def execute(
        k: _MutableInputTensor[rank=4, ...],
        v: _MutableInputTensor[dtype=k.dtype, rank=4, ...],
        k_new: InputTensor[dtype=k.dtype, rank=3, ...],
        v_new: InputTensor[dtype=k.dtype, rank=3, ...],
        n_past: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var n_head, n_position, n_channel = k.dim_size(1), k.dim_size(2), k.dim_size(3)
        var ks, vs = k.unsafe_ptr(), v.unsafe_ptr()
        var ks_new, vs_new = k_new.unsafe_ptr(), v_new.unsafe_ptr()
        var n_token = k_new.dim_size(1)
        for row in range(k_new.dim_size(0) * n_token):
            var text, token = divmod(row, n_token)
            var position = Int(n_past.unsafe_ptr()[unsafe_offset=text]) + token
            for head in range(n_head):
                for channel in range(n_channel):
                    var at = ((text * n_head + head) * n_position + position) * n_channel + channel
                    var new_at = (row * n_head + head) * n_channel + channel
                    ks[unsafe_offset=at] = ks_new[unsafe_offset=new_at]
                    vs[unsafe_offset=at] = vs_new[unsafe_offset=new_at]
