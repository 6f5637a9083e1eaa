"""Products of some rows with a panel of columns, in registers: what products of many rows are made of.

In bfloat16 two terms stand side by side, as processors with an instruction for that take them; sums are float32.
"""

from std.memory import bitcast
from std.sys import llvm_intrinsic
from std.sys.info import CompilationTarget, simd_width_of

comptime WIDTH = simd_width_of[DType.float32]()
comptime ROWS = 6  # of a tile, or else one
comptime VECTORS = 4 if WIDTH >= 16 else 2  # of a row of a tile; with ROWS what fits the registers
comptime PANEL = VECTORS * WIDTH  # columns
comptime TERMS = 512  # summed at a time: a sum of sums rounds less than one long sum

comptime Floats = SIMD[DType.float32, WIDTH]
comptime Pairs = SIMD[DType.bfloat16, 2 * WIDTH]


def side_by_side[dtype: DType]() -> Int:
    """Returns how many terms of a product stand side by side: columns (term, column) lie in memory as (term //
    side_by_side, column, term % side_by_side)."""
    return 2 if dtype == DType.bfloat16 else 1


@always_inline
def packed_index[dtype: DType](term: Int, column: Int, stride: Int) -> Int:
    """Returns where a term of a column lies, if the first terms of columns are `stride` numbers apart."""
    comptime side = side_by_side[dtype]()
    return (term // side * stride + column) * side + term % side


@always_inline
def multiply_add(a: Pairs, b: Pairs, sums: Floats) -> Floats:
    """Adds two products to every sum."""
    comptime if WIDTH == 16 and CompilationTarget._has_feature["avx512bf16"]():
        return llvm_intrinsic["llvm.x86.avx512bf16.dpbf16ps.512", Floats](sums, a, b)
    comptime Bits = SIMD[DType.uint32, WIDTH]
    var x, y = bitcast[DType.uint32, WIDTH](a), bitcast[DType.uint32, WIDTH](b)
    var second = bitcast[DType.float32, WIDTH](x & Bits(0xFFFF0000)).fma(
        bitcast[DType.float32, WIDTH](y & Bits(0xFFFF0000)), sums
    )
    return bitcast[DType.float32, WIDTH](x << 16).fma(bitcast[DType.float32, WIDTH](y << 16), second)


@always_inline
def tile[
    dtype: DType, rows: Int, vectors: Int
](
    x: Pointer[Scalar[dtype], _],
    offsets: Array[Int, rows],
    panel: Pointer[Scalar[dtype], _],
    n_term: Int,
    stride: Int,
) -> Array[Floats, rows * vectors]:
    """Returns the products of some rows of x, (n_term,) at the offsets, with a panel of columns, (n_term, vectors *
    WIDTH), packed as by `packed_index`. Each is summed in the same order whatever the rows around it.

    In bfloat16 n_term must be even.
    """
    comptime side = side_by_side[dtype]()
    var sums = Array[Floats, rows * vectors](fill=0)
    for k in range(0, n_term, side):
        var columns = panel.unsafe_offset(k * stride)
        var ws = Array[SIMD[dtype, side * WIDTH], vectors](fill=0)
        comptime for v in range(vectors):
            ws[v] = columns.unsafe_load[width=side * WIDTH](v * side * WIDTH)
        comptime for r in range(rows):
            var terms = x.unsafe_load[width=side](offsets[r] + k)
            comptime for v in range(vectors):
                comptime i = r * vectors + v
                comptime if dtype == DType.bfloat16:
                    var pair = SIMD[DType.uint32, WIDTH](bitcast[DType.uint32, 1](terms))
                    sums[i] = multiply_add(bitcast[DType.bfloat16, 2 * WIDTH](pair), rebind[Pairs](ws[v]), sums[i])
                else:
                    var value = rebind[Scalar[dtype]](terms).cast[DType.float32]()
                    sums[i] = rebind[SIMD[dtype, WIDTH]](ws[v]).cast[DType.float32]().fma(value, sums[i])
    return sums^


@always_inline
def long_tile[
    dtype: DType, rows: Int, vectors: Int
](
    x: Pointer[Scalar[dtype], _],
    offsets: Array[Int, rows],
    panel: Pointer[Scalar[dtype], _],
    n_term: Int,
    stride: Int,
) -> Array[Floats, rows * vectors]:
    """Returns what `tile` does, of any number of terms: at most TERMS are summed at a time."""
    if n_term <= TERMS:
        return tile[dtype, rows, vectors](x, offsets, panel, n_term, stride)
    var totals = Array[Floats, rows * vectors](fill=0)
    for first in range(0, n_term, TERMS):
        var sums = tile[dtype, rows, vectors](
            x.unsafe_offset(first), offsets, panel.unsafe_offset(first * stride), min(TERMS, n_term - first), stride
        )
        comptime for i in range(rows * vectors):
            totals[i] += sums[i]
    return totals^
