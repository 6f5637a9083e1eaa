"""GELU."""

from std.math import erf


@always_inline
def gelu[width: SIMDLength](x: SIMD[DType.float32, width]) -> SIMD[DType.float32, width]:
    return 0.5 * x * (1 + erf(x * Float32(0.5**0.5)))
