"""Softmax over the keys of one query."""

from std.memory import bitcast
from std.utils.numerics import min_or_neg_inf

from .tiles import WIDTH

comptime AT_ONCE = 8  # vectors of scores, so that exponentials do not wait for one another


@always_inline
def greatest(numbers: Pointer[Float32, _], n: Int) -> Float32:
    """Returns the greatest of some numbers; a NaN is passed over."""
    # By comparing, not by `max`, which minds a NaN and takes several times as long for it.
    comptime together = AT_ONCE * WIDTH
    var highest = Array[SIMD[DType.float32, WIDTH], AT_ONCE](fill=min_or_neg_inf[DType.float32]())
    if n >= together:
        for first in range(0, n, together):
            var at = min(first, n - together)  # the last ones with some of those before
            comptime for i in range(AT_ONCE):
                var some = numbers.unsafe_load[width=WIDTH](at + i * WIDTH)
                highest[i] = some.gt(highest[i]).select(some, highest[i])
    comptime for i in range(1, AT_ONCE):
        highest[0] = highest[i].gt(highest[0]).select(highest[i], highest[0])
    var found = highest[0].reduce_max()
    if n < together:
        for i in range(n):
            found = max(found, numbers[unsafe_offset=i])
    return found


@always_inline
def exponential(x: SIMD[DType.float32, WIDTH]) -> SIMD[DType.float32, WIDTH]:
    """Returns the exponentials of numbers up to 0, and of NaN NaN, where MAX's gives a number."""
    comptime LOG2E = Float32(1.44269504)
    comptime ROUND = Float32(3 << 22)  # numbers of this size have no fraction, and their last bits count by one
    # 2^(k + rest), the rest between -0.5 and 0.5, and k from -127 on, the power of which comes out as 0.
    var above = x.lt(-88).select(SIMD[DType.float32, WIDTH](-88), x)
    var k = above.fma(LOG2E, ROUND)
    var rest = above.fma(LOG2E, ROUND - k)
    # Fitted for the least relative error, 2e-9.
    var power = rest.fma(1.5353362e-4, 1.3398875e-3)
    power = power.fma(rest, 9.61843692e-3)
    power = power.fma(rest, 5.55033237e-2)
    power = power.fma(rest, 0.240226477)
    power = power.fma(rest, 0.693147182)
    power = power.fma(rest, 1)
    return power * bitcast[DType.float32, WIDTH]((bitcast[DType.uint32, WIDTH](k) + 127) << 23)


@no_inline
def exponentials[
    dtype: DType
](scores: Pointer[Float32, _], weights: Pointer[mut=True, Scalar[dtype], _], n_key: Int) -> Float32:
    """Writes softmax's weights before they are divided by their sum, which it returns."""
    var highest = greatest(scores, n_key)
    var sums = Array[SIMD[DType.float32, WIDTH], AT_ONCE](fill=0)

    @always_inline
    @__parameter
    def write[vectors: Int](key: Int):
        var some = Array[SIMD[DType.float32, WIDTH], vectors](fill=0)
        comptime for i in range(vectors):
            some[i] = exponential(scores.unsafe_load[width=WIDTH](key + i * WIDTH) - highest)
        comptime for i in range(vectors):
            weights.unsafe_store(key + i * WIDTH, some[i].cast[dtype]())
            sums[i] += some[i]

    var key = 0
    while key + AT_ONCE * WIDTH <= n_key:
        write[AT_ONCE](key)
        key += AT_ONCE * WIDTH
    while key + WIDTH <= n_key:
        write[1](key)
        key += WIDTH
    comptime for i in range(1, AT_ONCE):
        sums[0] += sums[i]
    var total = sums[0].reduce_add()
    var last = SIMD[DType.float32, WIDTH](highest)
    for rest in range(key, n_key):
        last[rest - key] = scores[unsafe_offset=rest]
    last = exponential(last - highest)
    for rest in range(key, n_key):
        weights[unsafe_offset=rest] = last[rest - key].cast[dtype]()
        total += last[rest - key]
    return total
