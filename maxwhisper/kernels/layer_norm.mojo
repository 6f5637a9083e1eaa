"""Layer norm."""

from std.math import sqrt

from .tiles import WIDTH

comptime EPSILON = 1e-5


@no_inline
def normalize(
    y: Pointer[mut=True, Float32, _],
    x: Pointer[Float32, _],
    weight: Pointer[Float32, _],
    bias: Pointer[Float32, _],
    number: Int,
):
    """Computes layer norm of one row of numbers, which fill vectors."""
    var total = SIMD[DType.float32, WIDTH](0)
    for i in range(0, number, WIDTH):
        total += x.unsafe_load[width=WIDTH](i)
    var mean = total.reduce_add() / Float32(number)
    var squares = SIMD[DType.float32, WIDTH](0)
    for i in range(0, number, WIDTH):
        var centred = x.unsafe_load[width=WIDTH](i) - mean
        squares = centred.fma(centred, squares)
    var deviation = sqrt(squares.reduce_add() / Float32(number) + EPSILON)
    for i in range(0, number, WIDTH):
        var normed = (x.unsafe_load[width=WIDTH](i) - mean) / deviation
        y.unsafe_store(i, normed.fma(weight.unsafe_load[width=WIDTH](i), bias.unsafe_load[width=WIDTH](i)))
