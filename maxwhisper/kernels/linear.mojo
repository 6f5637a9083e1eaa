"""Products of a few rows with a large matrix, which MAX's own kernels pack, and so copy, at every call.

One row of weights at a time, from its beginning to its end, so that a thread reads memory in one direction: processors
fetch ahead along few directions only.

A row of int8 weights ends with the float32 that they are multiples of, in SCALE_SIZE more bytes.
"""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.sys.info import size_of
from std.sys.intrinsics import PrefetchOptions, prefetch
from std.utils.index import IndexList

import extensibility
from extensibility import InputTensor, _FusedOutputTensor

from .pointers import Numbers, Stored, stored, untracked
from .team import task_count
from .tiles import WIDTH

comptime SUMS = 4  # vectors of running sums for a row: as many for any number of rows, so that a row of a batch is
# bitwise what it is alone
comptime ROWS = 4  # of x at a time, or else one: every number in between would be code of its own to compile
comptime UNROLL = 8  # vectors of weights
comptime COLUMNS = 8  # of y at a time, so that they are stored as a vector
comptime AT_ONCE = 4 * COLUMNS  # whose products wait together for what is fused with them
comptime CACHE_LINE = 64  # bytes
comptime TASK = 1 << 18  # multiplications that are worth a task of their own
comptime SCALE_SIZE = size_of[DType.float32]()  # bytes behind quantized numbers, of what they are multiples of


@always_inline
def row_size[stored: DType](n_in: Int) -> Int:
    """Returns how many numbers a row of n_in takes."""
    return n_in + SCALE_SIZE if stored == DType.int8 else n_in


@always_inline
def products[
    rows: Int, dtype: DType, stored: DType, ahead: Bool = False
](x: Pointer[Scalar[dtype], _], weights: Pointer[Scalar[stored], _], n_in: Int) -> Array[Float32, rows]:
    """Returns the products of a row of weights with some rows of x, each (n_in,), one behind the other.

    ahead: fetches the weights COLUMNS rows further on meanwhile.
    """
    var sums = Array[SIMD[DType.float32, WIDTH], rows * SUMS](fill=0)

    @always_inline
    @__parameter
    def add[count: Int](k: Int):
        comptime for u in range(count):
            comptime if ahead and u * WIDTH * size_of[stored]() % CACHE_LINE == 0:
                prefetch[PrefetchOptions().for_read().high_locality().to_data_cache()](
                    weights.unsafe_offset(COLUMNS * row_size[stored](n_in) + k + u * WIDTH)
                )
            var ws = weights.unsafe_load[width=WIDTH](k + u * WIDTH).cast[dtype]().cast[DType.float32]()
            comptime for r in range(rows):
                comptime i = r * SUMS + u % SUMS
                var xs = x.unsafe_load[width=WIDTH](r * n_in + k + u * WIDTH).cast[DType.float32]()
                sums[i] = xs.fma(ws, sums[i])

    var k = 0
    while k + UNROLL * WIDTH <= n_in:
        add[UNROLL](k)
        k += UNROLL * WIDTH
    while k + WIDTH <= n_in:
        add[1](k)
        k += WIDTH
    var y = Array[Float32, rows](fill=0)
    comptime for r in range(rows):
        comptime for i in range(1, SUMS):
            sums[r * SUMS] += sums[r * SUMS + i]
        y[r] = sums[r * SUMS].reduce_add()
        for rest in range(k, n_in):
            var w = weights[unsafe_offset=rest].cast[dtype]().cast[DType.float32]()
            y[r] += x[unsafe_offset=r * n_in + rest].cast[DType.float32]() * w
        comptime if stored == DType.int8:
            y[r] *= weights.unsafe_offset(n_in).unsafe_bitcast[Float32]()[unsafe_offset=0]
    return y^


@no_inline
def multiply[
    dtype: DType, weight_dtype: DType
](into: Numbers, apart: Int, x: Stored[dtype], weights: Stored[weight_dtype], n_row: Int, n_in: Int, n_column: Int):
    """Writes the products of every row of x with some rows of weights, which are rounded to the dtype of x: (row,
    column), whose rows are `apart` numbers apart."""

    @always_inline
    @__parameter
    def block[rows: Int, ahead: Bool = False](row: Int, first: Int, end: Int):
        for column in range(first, end):
            var its_weights = weights.unsafe_offset(column * row_size[weight_dtype](n_in))
            var one = products[rows, ahead=ahead](x.unsafe_offset(row * n_in), its_weights, n_in)
            comptime for r in range(rows):
                into[unsafe_offset=(row + r) * apart + column] = one[r]

    for first in range(0, n_column, COLUMNS):
        # The weights of these columns come from memory once, and then from the cache.
        var end = min(first + COLUMNS, n_column)
        var row = 0
        while row + ROWS <= n_row:
            if row == ROWS:  # which is arithmetic alone, so that memory has time for the next columns
                block[ROWS, ahead=True](row, first, end)
            else:
                block[ROWS](row, first, end)
            row += ROWS
        for rest in range(row, n_row):
            block[1](rest, first, end)


@always_inline
def by_columns[put: def[width: Int](Int) capturing -> None](n_column: Int):
    """Calls `put` with a column and how many from there on it is to take, until it had all of them."""
    var whole = n_column // COLUMNS * COLUMNS
    for column in range(0, whole, COLUMNS):
        put[COLUMNS](column)
    for rest in range(whole, n_column):
        put[1](rest)


@extensibility.register("maxwhisper.linear")
struct Linear:
    """Computes y[..., row, out], the sum over in of x[..., row, in] * weight[out, in], in float32, where weights are
    rounded to the dtype of x."""

    @staticmethod
    def execute(
        y: _FusedOutputTensor[dtype=DType.float32, rank=3, ...],
        x: InputTensor[rank=3, ...],
        weight: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) capturing raises:
        var n_token = x.dim_size(1)
        var n_row = x.dim_size(0) * n_token
        var n_in = x.dim_size(2)
        var n_out = weight.dim_size(0)
        var by, weights = stored[x.dtype](x), stored[weight.dtype](weight)
        # More tasks than threads would cost more than they even out.
        var n_task = task_count(n_out // COLUMNS, n_row * n_in * n_out // TASK)
        var share = ceildiv(ceildiv(n_out, n_task), COLUMNS) * COLUMNS

        def task(number: Int) raises {imm}:
            var values = List[Float32](unsafe_uninit_length=n_row * AT_ONCE)
            var some = untracked(values)
            var end = min((number + 1) * share, n_out)
            for first in range(number * share, end, AT_ONCE):
                var n_column = min(AT_ONCE, end - first)
                var its_weights = weights.unsafe_offset(first * row_size[weight.dtype](n_in))
                multiply(some, AT_ONCE, by, its_weights, n_row, n_in, n_column)
                for row in range(n_row):

                    @always_inline
                    @__parameter
                    def put[width: Int](column: Int):
                        var at = IndexList[3](row // n_token, row % n_token, first + column)
                        y._lambda_store[width=width](at, some.unsafe_load[width=width](row * AT_ONCE + column))

                    by_columns[put](n_column)
            _ = values^  # which nothing else says are still used

        sync_parallelize(task, ceildiv(n_out, share))
