"""Attention of many queries, by tiles: a few queries with a panel of keys, and their weights with the values."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import align_up, ceildiv
from std.memory import unsafe_memcpy

import extensibility
from extensibility import InputTensor, OutputTensor

from .amx import HAS_AMX
from .amx_attention import attend_by_amx
from .attention import AttentionSizes, scale
from .pointers import Numbers, Stored, numbers, stored
from .softmax import exponentials
from .team import even_shares
from .tiles import PANEL, ROWS, VECTORS, WIDTH, packed_index, side_by_side, tile

comptime QUERIES = 4 * ROWS  # for which a panel of keys, or a block of values, is read from the cache
comptime KEYS = 128  # whose weighted values are added up at a time: a sum of sums rounds less than one long sum
comptime SHARE = 4 * QUERIES  # queries that are worth another copy of the keys


@no_inline
def pack_keys[
    dtype: DType, stored: DType, //, n_channel: Int
](panels: Pointer[mut=True, Scalar[dtype], _], keys: Pointer[Scalar[stored], _], n_key: Int):
    """Copies keys (n_key, n_channel) to panels (panel, n_channel, PANEL), whose last columns stay as they are."""
    comptime side = side_by_side[dtype]()
    for key in range(n_key):
        var panel = panels.unsafe_offset(key // PANEL * n_channel * PANEL)
        comptime for c in range(0, n_channel, WIDTH):
            var ks = keys.unsafe_load[width=WIDTH](key * n_channel + c).cast[dtype]()
            comptime for i in range(0, WIDTH, side):
                panel.unsafe_store(packed_index[dtype](c + i, key % PANEL, PANEL), ks.slice[side, offset=i]())


@no_inline
def pack_values[
    dtype: DType, stored: DType, //, n_channel: Int
](panel: Pointer[mut=True, Scalar[dtype], _], values: Pointer[Scalar[stored], _], n_key: Int):
    """Copies values (n_key, n_channel) to a panel of them, whose last terms are 0."""
    comptime side = side_by_side[dtype]()
    for key in range(0, n_key, side):
        comptime for c in range(0, n_channel, WIDTH):
            var some = values.unsafe_load[width=WIDTH](key * n_channel + c).cast[dtype]()
            comptime if side == 1:
                panel.unsafe_store(key * n_channel + c, some)
            else:
                var others = SIMD[dtype, WIDTH](0)
                if key + 1 < n_key:
                    others = values.unsafe_load[width=WIDTH]((key + 1) * n_channel + c).cast[dtype]()
                panel.unsafe_store(packed_index[dtype](key, c, n_channel), some.interleave(others))


@no_inline
def score[
    dtype: DType, n_channel: Int, rows: Int
](
    scores: Pointer[mut=True, Float32, _],
    n_padded: Int,
    q: Pointer[Scalar[dtype], _],
    n_state: Int,
    panel: Pointer[Scalar[dtype], _],
):
    """Writes the scaled products of some queries, `n_state` apart, with a panel of keys; scores are `n_padded` apart.
    """
    var offsets = Array[Int, rows](fill=0)
    comptime for r in range(rows):
        offsets[r] = r * n_state
    var products = tile[dtype, rows, VECTORS](q, offsets, panel, n_channel, PANEL)
    comptime for r in range(rows):
        comptime for v in range(VECTORS):
            scores.unsafe_store(r * n_padded + v * WIDTH, products[r * VECTORS + v] * scale[n_channel]())


@no_inline
def add_weighted[
    dtype: DType, n_channel: Int, rows: Int
](
    totals: Pointer[mut=True, Float32, _],
    weights: Pointer[Scalar[dtype], _],
    n_padded: Int,
    values: Pointer[Scalar[dtype], _],
    n_value: Int,
):
    """Adds values (n_value, n_channel) times the weights of some queries, `n_padded` apart, to their totals."""
    comptime vectors = VECTORS if n_channel % PANEL == 0 else 1
    var offsets = Array[Int, rows](fill=0)
    comptime for r in range(rows):
        offsets[r] = r * n_padded
    comptime for c in range(0, n_channel, vectors * WIDTH):
        var some = values.unsafe_offset(packed_index[dtype](0, c, n_channel))
        var sums = tile[dtype, rows, vectors](weights, offsets, some, n_value, n_channel)
        comptime for r in range(rows):
            comptime for v in range(vectors):
                var at = r * n_channel + c + v * WIDTH
                totals.unsafe_store(at, totals.unsafe_load[width=WIDTH](at) + sums[r * vectors + v])


@no_inline
def attend[
    dtype: DType, //, n_channel: Int
](
    y: Pointer[mut=True, Scalar[dtype], _],
    q: Pointer[Scalar[dtype], _],
    n_query: Int,
    n_state: Int,
    panels: Pointer[Scalar[dtype], _],
    values: Pointer[Scalar[dtype], _],
    n_key: Int,
    mask: Optional[Numbers],
    scores: Pointer[mut=True, Float32, _],
    weights: Pointer[mut=True, Scalar[dtype], _],
    totals: Pointer[mut=True, Float32, _],
):
    """Computes the attention of at most QUERIES queries, `n_state` apart, over all keys; for each, scores and weights
    have room for as many numbers as the panels have keys, totals for n_channel. Keys and values are taken a panel and a
    block at a time, for all these queries."""
    var n_padded = align_up(n_key, PANEL)
    var whole = n_query // ROWS * ROWS
    for key in range(0, n_key, PANEL):
        var panel = panels.unsafe_offset(key * n_channel)
        var out = scores.unsafe_offset(key)
        for row in range(0, whole, ROWS):
            score[dtype, n_channel, ROWS](
                out.unsafe_offset(row * n_padded), n_padded, q.unsafe_offset(row * n_state), n_state, panel
            )
        for row in range(whole, n_query):
            score[dtype, n_channel, 1](
                out.unsafe_offset(row * n_padded), n_padded, q.unsafe_offset(row * n_state), n_state, panel
            )
    var sums = Array[Float32, QUERIES](fill=0)
    for row in range(n_query):
        var of_query = scores.unsafe_offset(row * n_padded)
        if mask:
            for key in range(n_key):
                of_query[unsafe_offset=key] += mask.value()[unsafe_offset=row * n_key + key]
        sums[row] = exponentials(of_query, weights.unsafe_offset(row * n_padded), n_key)
        comptime for c in range(0, n_channel, WIDTH):
            totals.unsafe_store(row * n_channel + c, SIMD[DType.float32, WIDTH](0))
    for key in range(0, n_key, KEYS):
        var some = values.unsafe_offset(key * n_channel)
        var n_value = min(KEYS, align_up(n_key, side_by_side[dtype]()) - key)
        var of_some = weights.unsafe_offset(key)
        for row in range(0, whole, ROWS):
            add_weighted[dtype, n_channel, ROWS](
                totals.unsafe_offset(row * n_channel), of_some.unsafe_offset(row * n_padded), n_padded, some, n_value
            )
        for row in range(whole, n_query):
            add_weighted[dtype, n_channel, 1](
                totals.unsafe_offset(row * n_channel), of_some.unsafe_offset(row * n_padded), n_padded, some, n_value
            )
    for row in range(n_query):
        comptime for c in range(0, n_channel, WIDTH):
            var total = totals.unsafe_load[width=WIDTH](row * n_channel + c)
            y.unsafe_store(row * n_state + c, (total / sums[row]).cast[dtype]())


@no_inline
def attend_by_tiles[
    n_channel: Int, dtype: DType, key_dtype: DType
](
    y: Stored[dtype],
    q: Stored[dtype],
    k: Stored[key_dtype],
    v: Stored[key_dtype],
    mask: Optional[Numbers],
    sizes: AttentionSizes,
) raises:
    """Attends from every query to every key, with a mask, (token, key), added to the scaled products if there is one.
    """
    comptime assert n_channel % WIDTH == 0, "channels must fill vectors"
    var n_query, n_state, n_head, n_key = sizes.n_query, sizes.n_state, sizes.n_head, sizes.n_key
    var n_text = sizes.n_text // sizes.n_row  # that share a row
    var n_padded = align_up(n_key, PANEL)
    var n_pair = sizes.n_text * n_head
    var n_share = even_shares(n_pair, n_query // SHARE)  # each copies its keys and values anew
    var share = align_up(ceildiv(n_query, n_share), ROWS)
    n_share = ceildiv(n_query, share)

    def task(number: Int) raises {imm}:
        var first = number % n_share * share
        var end = min(first + share, n_query)
        var text = number // n_share // n_head
        var head = number // n_share % n_head
        var kv = (text // n_text * n_head + head) * n_key * n_channel
        var keys = List[Scalar[dtype]](length=n_padded * n_channel, fill=0)
        var values = List[Scalar[dtype]](length=n_padded * n_channel, fill=0)
        var scores = List[Float32](unsafe_uninit_length=QUERIES * n_padded)
        var weights = List[Scalar[dtype]](length=QUERIES * n_padded, fill=0)
        var totals = List[Float32](unsafe_uninit_length=QUERIES * n_channel)
        pack_keys[n_channel=n_channel](keys.unsafe_ptr(), k.unsafe_offset(kv), n_key)
        pack_values[n_channel=n_channel](values.unsafe_ptr(), v.unsafe_offset(kv), n_key)
        for query in range(first, end, QUERIES):
            var at = (text * n_query + query) * n_state + head * n_channel
            attend[n_channel=n_channel](
                y.unsafe_offset(at),
                q.unsafe_offset(at),
                min(QUERIES, end - query),
                n_state,
                keys.unsafe_ptr(),
                values.unsafe_ptr(),
                n_key,
                mask.value().unsafe_offset(query * n_key) if mask else mask,
                scores.unsafe_ptr(),
                weights.unsafe_ptr(),
                totals.unsafe_ptr(),
            )

    sync_parallelize(task, n_pair * n_share)


@extensibility.register("maxwhisper.tiled_attention")
struct TiledAttention:
    """Computes softmax(q @ k.T / sqrt(n_channel)) @ v, added up in float32.

    y, q: (batch, token, head * channel).
    k, v: (row, head, key, channel), rounded to the dtype of q, as softmax's weights are before they are divided by
    their sum; batch / row consecutive texts share a row.
    """

    @staticmethod
    def execute[
        dtype: DType, //, n_channel: Int, audio: Bool
    ](
        y: OutputTensor[dtype=dtype, rank=3, ...],
        q: InputTensor[dtype=dtype, rank=3, ...],
        k: InputTensor[rank=4, ...],
        v: InputTensor[dtype=k.dtype, rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        var ks, vs = stored[k.dtype](k), stored[k.dtype](v)
        var sizes = AttentionSizes.of(q, k)
        comptime if audio and HAS_AMX:
            attend_by_amx[n_channel](stored[dtype](y), stored[dtype](q), ks, vs, sizes)
        else:
            attend_by_tiles[n_channel](stored[dtype](y), stored[dtype](q), ks, vs, None, sizes)


@extensibility.register("maxwhisper.masked_attention")
struct MaskedAttention:
    """Computes softmax(q @ k.T / sqrt(n_channel) + mask) @ v, added up in float32.

    y, q: (batch, token, head * channel).
    k, v: (row, head, key, channel), rounded to the dtype of q, as softmax's weights are before they are divided by
    their sum; batch / row consecutive texts share a row.
    mask: (token, key).
    """

    @staticmethod
    def execute[
        dtype: DType, //, n_channel: Int
    ](
        y: OutputTensor[dtype=dtype, rank=3, ...],
        q: InputTensor[dtype=dtype, rank=3, ...],
        k: InputTensor[rank=4, ...],
        v: InputTensor[dtype=k.dtype, rank=4, ...],
        mask: InputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var ks, vs = stored[k.dtype](k), stored[k.dtype](v)
        var sizes = AttentionSizes.of(q, k)
        attend_by_tiles[n_channel](stored[dtype](y), stored[dtype](q), ks, vs, numbers(mask), sizes)


@no_inline
def write_scores[
    n_channel: Int, dtype: DType, key_dtype: DType
](qk: Numbers, q: Stored[dtype], k: Stored[key_dtype], sizes: AttentionSizes) raises:
    """Writes the scaled products of every query with every key."""
    comptime assert n_channel % WIDTH == 0, "channels must fill vectors"
    var n_query, n_state, n_head, n_key = sizes.n_query, sizes.n_state, sizes.n_head, sizes.n_key
    var n_text = sizes.n_text // sizes.n_row  # that share a row
    var n_padded = align_up(n_key, PANEL)

    def task(number: Int) raises {imm}:
        var text, head = divmod(number, n_head)
        var own_qs = q.unsafe_offset(text * n_query * n_state + head * n_channel)
        var own_ks = k.unsafe_offset((text // n_text * n_head + head) * n_key * n_channel)
        var keys = List[Scalar[dtype]](length=n_padded * n_channel, fill=0)
        var scores = List[Float32](length=n_padded, fill=0)
        pack_keys[n_channel=n_channel](keys.unsafe_ptr(), own_ks, n_key)
        for query in range(n_query):
            for key in range(0, n_key, PANEL):
                score[dtype, n_channel, 1](
                    scores.unsafe_ptr().unsafe_offset(key),
                    n_padded,
                    own_qs.unsafe_offset(query * n_state),
                    n_state,
                    keys.unsafe_ptr().unsafe_offset(key * n_channel),
                )
            unsafe_memcpy(
                dest=qk.unsafe_offset((number * n_query + query) * n_key), src=scores.unsafe_ptr(), count=n_key
            )

    sync_parallelize(task, sizes.n_text * n_head)


@extensibility.register("maxwhisper.attention_scores")
struct AttentionScores:
    """Computes q @ k.T / sqrt(n_channel), added up in float32.

    qk: (batch, head, token, key).
    q: (batch, token, head * channel).
    k: (row, head, key, channel), rounded to the dtype of q; batch / row consecutive texts share a row.
    """

    @staticmethod
    def execute[
        dtype: DType, //, n_channel: Int
    ](
        qk: OutputTensor[dtype=DType.float32, rank=4, ...],
        q: InputTensor[dtype=dtype, rank=3, ...],
        k: InputTensor[rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        write_scores[n_channel](numbers(qk), stored[dtype](q), stored[k.dtype](k), AttentionSizes.of(q, k))
