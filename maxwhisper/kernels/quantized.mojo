"""Numbers in a few bits each: products of those in four with those in eight, and how they are made."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import ceildiv, round
from std.memory import bitcast
from std.sys import llvm_intrinsic
from std.sys.info import CompilationTarget
from std.utils.numerics import isfinite

import extensibility
from extensibility import InputTensor, _MutableInputTensor

from .linear import row_size
from .pointers import Stored, stored
from .team import thread_count
from .tiles import WIDTH

comptime BYTES = 4 * WIDTH  # in a vector
comptime INT8_MAX = 127
comptime ZERO_POINT = 8  # stands for zero in four bits

comptime Bytes = SIMD[DType.uint8, BYTES]
comptime Sums = SIMD[DType.int32, WIDTH]


@always_inline
def add_products(a: Bytes, b: SIMD[DType.int8, BYTES], sums: Sums) -> Sums:
    """Adds four products to every sum; a is below 128."""
    comptime if WIDTH == 16 and CompilationTarget._has_feature["avx512vnni"]():
        return llvm_intrinsic["llvm.x86.avx512.vpdpbusd.512", Sums](sums, a, b)
    var all = sums
    var x, y = bitcast[DType.int32, WIDTH](a), bitcast[DType.int32, WIDTH](b)
    comptime for i in range(4):
        comptime up = Int32(24 - 8 * i)
        all += ((x << up) >> 24) * ((y << up) >> 24)
    return all


@no_inline
def quantize(x: Pointer[Float32, _], into: Pointer[mut=True, Int8, _], number: Int) -> Float32:
    """Writes numbers, which fill vectors, as multiples of a number between -127 and 127, and returns that; zeros where
    they are not all finite."""
    var highest = SIMD[DType.float32, WIDTH](0)
    for i in range(0, number, WIDTH):
        highest = max(highest, abs(x.unsafe_load[width=WIDTH](i)))
    var greatest = highest.reduce_max()
    if not (greatest > 0 and isfinite(INT8_MAX / greatest)):
        for i in range(0, number, WIDTH):
            into.unsafe_store(i, SIMD[DType.int8, WIDTH](0))
        return 0
    var factor = INT8_MAX / greatest
    for i in range(0, number, WIDTH):
        into.unsafe_store(i, round(x.unsafe_load[width=WIDTH](i) * factor).cast[DType.int8]())
    return greatest / INT8_MAX


@fieldwise_init
struct Quantized(TrivialRegisterPassable):
    """Numbers in int8: multiples of `scale`, `total` together."""

    var numbers: Stored[DType.int8]
    var scale: Float32
    var total: Int32


@always_inline
def quantized_logits[
    texts: Int
](
    logits: Pointer[mut=True, Float32, _],
    n_vocab: Int,
    row: Stored[DType.uint8],
    states: Pointer[Quantized, _],
    half: Int,
):
    """Writes the products of a row in four bits a number with the quantized states of some texts, n_vocab apart."""
    var sums = Array[Sums, 2 * texts](fill=0)
    var i = 0
    while i + BYTES <= half:
        var pairs = row.unsafe_load[width=BYTES](i)
        var first, second = pairs & 15, pairs >> 4
        comptime for text in range(texts):
            var x = states[unsafe_offset=text].numbers
            sums[2 * text] = add_products(first, x.unsafe_load[width=BYTES](i), sums[2 * text])
            sums[2 * text + 1] = add_products(second, x.unsafe_load[width=BYTES](half + i), sums[2 * text + 1])
        i += BYTES
    var scale = row.unsafe_offset(half).unsafe_bitcast[Float32]()[unsafe_offset=0]
    comptime for text in range(texts):
        var x = states[unsafe_offset=text]
        var sum = (sums[2 * text] + sums[2 * text + 1]).reduce_add() - ZERO_POINT * x.total
        for rest in range(i, half):
            var pair = row[unsafe_offset=rest]
            sum += (pair & 15).cast[DType.int32]() * x.numbers[unsafe_offset=rest].cast[DType.int32]()
            sum += (pair >> 4).cast[DType.int32]() * x.numbers[unsafe_offset=half + rest].cast[DType.int32]()
        logits[unsafe_offset=text * n_vocab] = sum.cast[DType.float32]() * x.scale * scale


@no_inline
def quantize_rows[
    dtype: DType
](y: Stored[DType.int8], x: Stored[dtype], n_row: Int, n_channel: Int) raises:
    """Quantizes rows x (row, channel) to y (row, channel + SCALE_SIZE)."""
    var size = row_size[DType.int8](n_channel)
    var share = ceildiv(n_row, thread_count())

    def task(part: Int) raises {imm}:
        var exact = List[Float32](length=n_channel, fill=0)
        for row in range(part * share, min((part + 1) * share, n_row)):
            for channel in range(0, n_channel, WIDTH):
                var some = x.unsafe_load[width=WIDTH](row * n_channel + channel)
                exact.unsafe_ptr().unsafe_store(channel, some.cast[DType.float32]())
            var into = y.unsafe_offset(row * size)
            var scale = quantize(exact.unsafe_ptr(), into, n_channel)
            into.unsafe_offset(n_channel).unsafe_bitcast[Float32]()[unsafe_offset=0] = scale

    sync_parallelize(task, thread_count())


@extensibility.register("maxwhisper.quantize_keys")
struct QuantizeKeys:
    """Quantizes keys or values x (row, head, key, channel) to int8, into y[number], from the row `first` on, both (1,).

    y: (number, row, head, key, channel + SCALE_SIZE); behind the channels stands what they are multiples of.
    """

    @staticmethod
    def execute(
        y: _MutableInputTensor[dtype=DType.int8, rank=5, ...],
        x: InputTensor[rank=4, ...],
        first: InputTensor[dtype=DType.int64, rank=1, ...],
        number: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var n_channel, n_each = x.dim_size(3), x.dim_size(1) * x.dim_size(2)
        var row = Int(number.unsafe_ptr()[unsafe_offset=0]) * y.dim_size(1) + Int(first.unsafe_ptr()[unsafe_offset=0])
        var into = stored[DType.int8](y).unsafe_offset(row * n_each * row_size[DType.int8](n_channel))
        quantize_rows(into, stored[x.dtype](x), x.dim_size(0) * n_each, n_channel)
