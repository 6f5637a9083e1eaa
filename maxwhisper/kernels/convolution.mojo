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

from .pointers import Stored, stored
from .team import even_shares
from .tiles import PANEL, ROWS, VECTORS, WIDTH, long_tile, packed_index, side_by_side

comptime BLOCK = 2 * WIDTH  # channels of a row that are copied at a time: a line of the cache or two
comptime CHUNK = 128  # rows of the input that are worth another copy of a panel


@no_inline
def pack[
    taps: Int, dtype: DType, stored: DType
](panel: Pointer[mut=True, Scalar[dtype], _], weights: Pointer[Scalar[stored], _], n_weight: Int, n_in: Int):
    """Copies `n_weight` rows of weights, each (n_in, taps), to the columns of a panel (taps * n_in, PANEL)."""
    comptime together = BLOCK * taps  # numbers in a row that are read and then written
    var whole = n_in // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):  # of all rows, whose columns then stay in the cache
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
        var n_frame = x.dim_size(1)
        var n_in = x.dim_size(2)
        var n_out = weight.dim_size(0)
        var n_y = (n_frame - taps) // stride + 1
        var n_term = n_in * taps
        if n_out % WIDTH != 0:
            raise Error("maxwhisper.convolution: outputs must fill vectors")
        if n_in % side_by_side[dtype]() != 0:
            raise Error("maxwhisper.convolution: inputs must fill pairs")
        var xs, weights = stored[dtype](x), stored[weight.dtype](weight)
        var n_panel = ceildiv(n_out, PANEL)
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
            for window in range(x.dim_size(0)):
                var row = first
                while row < end:
                    var rows = xs.unsafe_offset((window * n_frame + row * stride) * n_in)
                    var n_done = some_rows(
                        values.unsafe_ptr(), rows, stride * n_in, end - row, panel.unsafe_ptr(), n_term
                    )
                    for r in range(n_done):
                        for c in range(0, n_weight, WIDTH):
                            var some = values.unsafe_ptr().unsafe_load[width=WIDTH](r * PANEL + c)
                            y._lambda_store[width=WIDTH](IndexList[3](window, row + r, column + c), some)
                    row += n_done

        sync_parallelize(task, n_panel * ceildiv(n_y, share))
