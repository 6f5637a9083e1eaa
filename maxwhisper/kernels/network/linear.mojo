"""Products of a few rows with a large matrix, which MAX's own kernels pack, and so copy, at every call."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.sys.info import simd_width_of
from std.utils.index import IndexList

import extensibility
from extensibility import InputTensor, _FusedOutputTensor

comptime WIDTH = simd_width_of[DType.float32]()
comptime ROWS = 4  # of x at a time
comptime COLUMNS = 4  # of y at a time: ROWS * COLUMNS sums fit the registers
comptime TASK = 1 << 18  # multiplications that are worth a task of their own
comptime MOST_TASKS = 64


@always_inline
def tile[
    rows: Int, columns: Int, dtype: DType
](
    x: Pointer[Float32, _],
    weight: Pointer[Scalar[dtype], _],
    n_in: Int,
) -> Array[SIMD[DType.float32, columns], rows]:
    """Returns rows times columns values of y; x and weight point at the first row of each."""
    var sums = Array[SIMD[DType.float32, WIDTH], rows * columns](fill=0)
    var whole = n_in // WIDTH * WIDTH
    for k in range(0, whole, WIDTH):
        var ws = Array[SIMD[DType.float32, WIDTH], columns](fill=0)
        comptime for c in range(columns):
            ws[c] = weight.unsafe_load[width=WIDTH](c * n_in + k).cast[DType.float32]()
        comptime for r in range(rows):
            var xs = x.unsafe_load[width=WIDTH](r * n_in + k)
            comptime for c in range(columns):
                sums[r * columns + c] = xs.fma(ws[c], sums[r * columns + c])
    var y = Array[SIMD[DType.float32, columns], rows](fill=0)
    comptime for r in range(rows):
        comptime for c in range(columns):
            var total = sums[r * columns + c].reduce_add()
            for k in range(whole, n_in):
                total += x[unsafe_offset=r * n_in + k] * weight[unsafe_offset=c * n_in + k].cast[DType.float32]()
            y[r][c] = total
    return y^


@extensibility.register("maxwhisper.linear")
struct Linear:
    """Computes y[..., row, out], the sum over in of x[..., row, in] * weight[out, in], in float32."""

    @staticmethod
    def execute(
        y: _FusedOutputTensor[dtype=DType.float32, rank=3, ...],
        x: InputTensor[dtype=DType.float32, rank=3, ...],
        weight: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) capturing raises:
        var n_token = x.dim_size(1)
        var n_row = x.dim_size(0) * n_token
        var n_in = x.dim_size(2)
        var n_out = weight.dim_size(0)
        var by = x.unsafe_ptr()
        var weights = weight.unsafe_ptr()
        var n_task = max(1, min(n_out // COLUMNS, n_row * n_in * n_out // TASK, MOST_TASKS))
        var share = ceildiv(ceildiv(n_out, n_task), COLUMNS) * COLUMNS

        @always_inline
        @__parameter
        def block[rows: Int, columns: Int](row: Int, column: Int):
            var values = tile[rows, columns](by.unsafe_offset(row * n_in), weights.unsafe_offset(column * n_in), n_in)
            comptime for r in range(rows):
                y._lambda_store[width=columns](
                    IndexList[3]((row + r) // n_token, (row + r) % n_token, column), values[r]
                )

        @always_inline
        @__parameter
        def every_row[columns: Int](column: Int):
            # The weights of these columns come from memory once, and then from the cache.
            var row = 0
            while row + ROWS <= n_row:
                block[ROWS, columns](row, column)
                row += ROWS
            comptime for rest in range(1, ROWS):
                if n_row - row == rest:
                    block[rest, columns](row, column)

        def task(number: Int) raises {imm}:
            var column = number * share
            var end = min(column + share, n_out)
            while column + COLUMNS <= end:
                every_row[COLUMNS](column)
                column += COLUMNS
            while column < end:
                every_row[1](column)
                column += 1

        sync_parallelize(task, ceildiv(n_out, share))
