"""Products of some rows with a panel of columns, in registers: what products of many rows are made of."""

from std.sys.info import simd_width_of

comptime WIDTH = simd_width_of[DType.float32]()
comptime ROWS = 6  # of a tile, or else one
comptime VECTORS = 4 if WIDTH >= 16 else 2  # of a row of a tile; with ROWS what fits the registers
comptime PANEL = VECTORS * WIDTH  # columns
comptime TERMS = 512  # summed at a time: a sum of sums rounds less than one long sum


@always_inline
def tile[
    rows: Int, vectors: Int
](
    x: Pointer[Float32, _], offsets: Array[Int, rows], panel: Pointer[Float32, _], n_term: Int, stride: Int
) -> Array[SIMD[DType.float32, WIDTH], rows * vectors]:
    """Returns the products of some rows of x, (n_term,) at the offsets, with a panel (n_term, vectors * WIDTH) whose
    rows are `stride` apart. Each value is summed in the same order whatever the rows around it."""
    var totals = Array[SIMD[DType.float32, WIDTH], rows * vectors](fill=0)
    for first in range(0, n_term, TERMS):
        var sums = Array[SIMD[DType.float32, WIDTH], rows * vectors](fill=0)
        for k in range(first, min(first + TERMS, n_term)):
            var ws = Array[SIMD[DType.float32, WIDTH], vectors](fill=0)
            comptime for v in range(vectors):
                ws[v] = panel.unsafe_load[width=WIDTH](k * stride + v * WIDTH)
            comptime for r in range(rows):
                var value = SIMD[DType.float32, WIDTH](x[unsafe_offset=offsets[r] + k])
                comptime for v in range(vectors):
                    sums[r * vectors + v] = ws[v].fma(value, sums[r * vectors + v])
        comptime for i in range(rows * vectors):
            totals[i] += sums[i]
    return totals^
