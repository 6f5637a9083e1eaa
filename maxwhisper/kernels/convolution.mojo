"""Products of many rows with a matrix, as a linear layer over audio and a convolution over time have them.

A panel of weights is copied once, transposed and in the dtype of the input, and then multiplied with every row of that
while it lies in the cache. A tile of the output stays in registers; each of its values is summed in the same order
whatever the rows around it, so that a window of a batch is bitwise what it is alone.
"""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import align_up, ceildiv
from std.utils.index import IndexList

import extensibility
from extensibility import InputTensor, _FusedOutputTensor

from .amx import (
    BLOCK,
    HAS_AMX,
    Packed,
    block_size,
    column_dtype,
    configure,
    multiply,
    pack_columns,
    pack_row,
    packed,
    release,
    room,
)
from .pointers import Stored, stored, untracked
from .team import even_shares, thread_count
from .tiles import PANEL, ROWS, TERMS, VECTORS, WIDTH, Floats, long_tile, packed_index, side_by_side

comptime CHANNELS = 2 * WIDTH  # channels of a row that are copied at a time: a line of the cache or two
comptime CACHED = 320 << 10  # packed numbers of rows that stay in a core's own cache, beside a panel's and sums
comptime BLOCKS = 8  # of rows at a time, beside the sums of which those of all columns fit the cache
comptime SUMS = BLOCK * BLOCK // WIDTH  # vectors of a block's sums
comptime CHUNK = 128  # rows of the input that are worth another copy of a panel


@no_inline
def pack[
    taps: Int, dtype: DType, stored: DType
](panel: Pointer[mut=True, Scalar[dtype], _], weights: Pointer[Scalar[stored], _], n_weight: Int, n_in: Int):
    """Copies `n_weight` rows of weights, each (n_in, taps), to the columns of a panel (taps * n_in, PANEL)."""
    comptime together = CHANNELS * taps  # numbers in a row that are read and then written
    var whole = n_in // CHANNELS * CHANNELS
    for first in range(0, whole, CHANNELS):  # of all rows, whose columns then stay in the cache
        for j in range(n_weight):
            var row = weights.unsafe_offset((j * n_in + first) * taps)
            comptime for v in range(0, together, WIDTH):
                var ws = row.unsafe_load[width=WIDTH](v).cast[dtype]()
                # Numbers of a pair lie side by side where they came so.
                comptime side = side_by_side[dtype]() if taps == 1 else 1
                comptime for i in range(0, WIDTH, side):
                    var term = (v + i) % taps * n_in + first + (v + i) // taps
                    panel.unsafe_store(packed_index[dtype](term, j, PANEL), ws.slice[side, offset=i]())
    for c in range(whole, n_in):
        comptime for tap in range(taps):
            for j in range(n_weight):
                var w = weights[unsafe_offset=(j * n_in + c) * taps + tap].cast[dtype]()
                panel[unsafe_offset=packed_index[dtype](tap * n_in + c, j, PANEL)] = w


@no_inline
def some_rows[
    dtype: DType
](
    into: Pointer[mut=True, Float32, _],
    x: Stored[dtype],
    apart: Int,
    n_row: Int,
    panel: Pointer[Scalar[dtype], _],
    n_term: Int,
) -> Int:
    """Writes the products (row, PANEL) of the next rows of x, `apart` numbers apart, ROWS or else one, with a panel of
    weights, and returns of how many rows."""

    @always_inline
    @__parameter
    def block[rows: Int]():
        var offsets = Array[Int, rows](fill=0)
        comptime for r in range(rows):
            offsets[r] = r * apart
        var values = long_tile[dtype, rows, VECTORS](x, offsets, panel, n_term, PANEL)
        comptime for i in range(rows * VECTORS):
            into.unsafe_store(i * WIDTH, values[i])

    if n_row < ROWS:
        block[1]()
        return 1
    block[ROWS]()
    return ROWS


@no_inline
def block_share(n_window: Int, n_block: Int, size: Int) -> Int:
    """Returns how many blocks of a window's rows, of `size` numbers, a task takes: at most what the cache holds, and as
    few as give every thread as many tasks, if that is possible."""
    var n_task = n_window * ceildiv(n_block, max(1, min(BLOCKS, CACHED // size)))
    return ceildiv(n_window * n_block, min(align_up(n_task, thread_count()), n_window * n_block))


@no_inline
def pack_outputs[
    taps: Int, dtype: DType, stored: DType
](into: Packed, weights: Pointer[Scalar[stored], _], n_weight: Int, n_in: Int):
    """Packs at most BLOCK rows of weights, each (n_in, taps), as the columns of a block, for AMX."""
    comptime if taps == 1:
        pack_columns[dtype](into, weights, n_weight, n_in)
        return
    var n_term = taps * n_in
    var by_tap = List[Scalar[stored]](unsafe_uninit_length=n_weight * n_term)
    for j in range(n_weight):
        for c in range(n_in):
            comptime for tap in range(taps):
                by_tap[j * n_term + tap * n_in + c] = weights[unsafe_offset=j * n_term + c * taps + tap]
    pack_columns[dtype](into, by_tap.unsafe_ptr(), n_weight, n_term)


@fieldwise_init
struct Sizes(TrivialRegisterPassable):
    """Those of x (window, frame, n_in) and y (window, n_y, n_out)."""

    var n_window: Int
    var n_frame: Int
    var n_in: Int
    var n_y: Int
    var n_out: Int


@always_inline
def convolve_by_amx[
    dtype: DType, weight_dtype: DType, //, taps: Int, stride: Int, put: def(Int, Int, Int, Floats) capturing -> None
](x: Stored[dtype], weights: Stored[weight_dtype], sizes: Sizes) raises:
    """Calls `put` with window, row, column and WIDTH values, for all of y."""
    var n_in, n_y, n_out = sizes.n_in, sizes.n_y, sizes.n_out
    comptime packed_dtype = column_dtype[dtype, weight_dtype]()
    var n_term, n_panel = n_in * taps, ceildiv(n_out, BLOCK)
    var size = block_size[packed_dtype](n_term)
    var room_of_columns = room[packed_dtype](n_panel, n_term)
    var columns = packed(room_of_columns)

    def pack_panel(number: Int) raises {imm}:
        var first = number * BLOCK
        var n_weight = min(BLOCK, n_out - first)
        pack_outputs[taps, packed_dtype](
            columns.unsafe_offset(number * size), weights.unsafe_offset(first * n_term), n_weight, n_in
        )

    sync_parallelize(pack_panel, n_panel)
    var at_once = min(TERMS, n_term)
    var share = BLOCK * block_share(sizes.n_window, ceildiv(n_y, BLOCK), block_size[dtype](at_once))
    var n_share = ceildiv(n_y, share)

    def some_blocks(number: Int) raises {imm}:
        var window, first = number // n_share, number % n_share * share
        var n_row = min(share, n_y - first)
        var n_block = ceildiv(n_row, BLOCK)
        var rows = x.unsafe_offset((window * sizes.n_frame + first * stride) * n_in)
        var room_of_blocks = room[dtype](n_block, at_once)
        # Sums of some terms are needed again with the next ones, if there are any.
        var room_of_sums = List[Floats](unsafe_uninit_length=SUMS * (1 if at_once == n_term else n_block * n_panel))
        var blocks, sums = packed(room_of_blocks), untracked(room_of_sums).unsafe_bitcast[Float32]()
        configure()
        for term in range(0, n_term, TERMS):
            var n_some = min(TERMS, n_term - term)
            var block_of_some = block_size[dtype](n_some)
            for row in range(n_row):
                var block = blocks.unsafe_offset(row // BLOCK * block_of_some)
                pack_row(block, row % BLOCK, rows.unsafe_offset(row * stride * n_in + term), n_some)
            for panel in range(n_panel):
                var its_columns = columns.unsafe_offset(panel * size + block_size[packed_dtype](term))
                for block in range(n_block):
                    var into = sums
                    if at_once < n_term:
                        into = sums.unsafe_offset((panel * n_block + block) * BLOCK * BLOCK)
                    var its_rows = blocks.unsafe_offset(block * block_of_some)
                    if term == 0:
                        multiply[dtype, packed_dtype](into, BLOCK, its_rows, its_columns, n_some)
                    else:
                        multiply[dtype, packed_dtype, add=True](into, BLOCK, its_rows, its_columns, n_some)
                    if term + n_some < n_term:
                        continue
                    for row in range(min(BLOCK, n_row - block * BLOCK)):
                        for column in range(0, min(BLOCK, n_out - panel * BLOCK), WIDTH):
                            var values = into.unsafe_load[width=WIDTH](row * BLOCK + column)
                            put(window, first + block * BLOCK + row, panel * BLOCK + column, values)
        release()
        _ = room_of_blocks^  # which nothing else says are still used
        _ = room_of_sums^

    sync_parallelize(some_blocks, sizes.n_window * n_share)
    _ = room_of_columns^


@always_inline
def convolve_by_vectors[
    dtype: DType, weight_dtype: DType, //, taps: Int, stride: Int, put: def(Int, Int, Int, Floats) capturing -> None
](x: Stored[dtype], weights: Stored[weight_dtype], sizes: Sizes) raises:
    """Calls `put` with window, row, column and WIDTH values, for all of y."""
    var n_in, n_y, n_out = sizes.n_in, sizes.n_y, sizes.n_out
    var n_term, n_panel = n_in * taps, ceildiv(n_out, PANEL)
    # Each copies its panel anew.
    var n_chunk = even_shares(n_panel, n_y // CHUNK)
    var share = align_up(ceildiv(n_y, n_chunk), ROWS)

    def task(number: Int) raises {imm}:
        var column = number % n_panel * PANEL
        var first = number // n_panel * share
        var end = min(first + share, n_y)
        var panel = List[Scalar[dtype]](unsafe_uninit_length=n_term * PANEL)
        var n_weight = min(PANEL, n_out - column)
        pack[taps](panel.unsafe_ptr(), weights.unsafe_offset(column * n_term), n_weight, n_in)
        var values = Array[Float32, ROWS * PANEL](fill=0)
        for window in range(sizes.n_window):
            var row = first
            while row < end:
                var rows = x.unsafe_offset((window * sizes.n_frame + row * stride) * n_in)
                var n_done = some_rows(values.unsafe_ptr(), rows, stride * n_in, end - row, panel.unsafe_ptr(), n_term)
                for r in range(n_done):
                    for c in range(0, n_weight, WIDTH):
                        put(window, row + r, column + c, values.unsafe_ptr().unsafe_load[width=WIDTH](r * PANEL + c))
                row += n_done

    sync_parallelize(task, n_panel * ceildiv(n_y, share))


@extensibility.register("maxwhisper.convolution")
struct Convolution:
    """Computes y[b, t, out], the sum over tap and in of x[b, t * stride + tap, in] * weight[out, in, tap], in float32.

    x: (batch, frame, n_in), padded; in bfloat16 n_in must be even.
    weight: (n_out, n_in * taps), rounded to the dtype of x; n_out a multiple of the vectors' width.
    """

    @staticmethod
    def execute[
        dtype: DType, //, taps: Int, stride: Int
    ](
        y: _FusedOutputTensor[dtype=DType.float32, rank=3, ...],
        x: InputTensor[dtype=dtype, rank=3, ...],
        weight: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) capturing raises:
        var n_frame, n_in, n_out = x.dim_size(1), x.dim_size(2), weight.dim_size(0)
        if n_out % WIDTH != 0:
            raise Error("maxwhisper.convolution: outputs must fill vectors")
        if n_in % side_by_side[dtype]() != 0:
            raise Error("maxwhisper.convolution: inputs must fill pairs")
        var sizes = Sizes(x.dim_size(0), n_frame, n_in, (n_frame - taps) // stride + 1, n_out)

        @always_inline
        @__parameter
        def put(window: Int, row: Int, column: Int, values: Floats):
            y._lambda_store[width=WIDTH](IndexList[3](window, row, column), values)

        comptime if HAS_AMX:
            convolve_by_amx[taps, stride, put](stored[dtype](x), stored[weight.dtype](weight), sizes)
        else:
            convolve_by_vectors[taps, stride, put](stored[dtype](x), stored[weight.dtype](weight), sizes)
