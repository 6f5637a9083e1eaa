"""What a decoder's rough copy needs beside the decoder's own operations: logits by a matrix of four bits a number, and
keys and values in int8."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from max.runtime.asyncrt import parallelism_level
from std.math import align_up, ceildiv, round
from std.memory import bitcast
from std.sys import llvm_intrinsic
from std.sys.info import CompilationTarget, simd_width_of

import extensibility
from extensibility import InputTensor, OutputTensor

from .linear import products
from .pick import write_best
from .tiles import WIDTH

comptime BYTES = 4 * WIDTH  # in a vector
comptime INT8_MAX = 127
comptime MIDDLE = 8  # stands for zero in four bits
comptime SURE = 4  # tokens of a part whose logits are computed exactly
comptime PARTS_OF_THREAD = 8  # so that they end at the same time
comptime TOGETHER = 8  # rows of keys for a task at least, which reads and writes them

comptime Bytes = SIMD[DType.uint8, BYTES]
comptime Sums = SIMD[DType.int32, WIDTH]


@always_inline
def multiply_add(a: Bytes, b: SIMD[DType.int8, BYTES], sums: Sums) -> Sums:
    """Adds four products to every sum; a is below 128."""
    comptime if WIDTH == 16 and CompilationTarget._has_feature["avx512vnni"]():
        return llvm_intrinsic["llvm.x86.avx512.vpdpbusd.512", Sums](sums, a, b)
    var all = sums
    var x, y = bitcast[DType.int32, WIDTH](a), bitcast[DType.int32, WIDTH](b)
    comptime for i in range(4):
        comptime up = Int32(24 - 8 * i)
        all += ((x << up) >> 24) * ((y << up) >> 24)
    return all


def quantise(x: Pointer[Float32, _], into: Pointer[mut=True, Int8, _], number: Int) -> Float32:
    """Writes numbers, which fill vectors, as multiples of a number between -127 and 127, and returns that."""
    var highest = SIMD[DType.float32, WIDTH](0)
    for i in range(0, number, WIDTH):
        highest = max(highest, abs(x.unsafe_load[width=WIDTH](i)))
    var greatest = highest.reduce_max()
    var factor = INT8_MAX / greatest if greatest > 0 else Float32(0)
    for i in range(0, number, WIDTH):
        into.unsafe_store(i, round(x.unsafe_load[width=WIDTH](i) * factor).cast[DType.int8]())
    return greatest / INT8_MAX


@extensibility.register("maxwhisper.rough_logits")
struct RoughLogits:
    """Computes logits nearly, and exactly where they are highest.

    y: (batch, 1, vocab). x: (batch, 1, state).
    rough: (vocab, state / 2 + 4), in a byte the numbers of the first half of a row, and above them those of the second
        half, each from 0 to 15 for -8 to 7; then the float32 that they are multiples of.
    weight: (vocab, state).
    """

    @staticmethod
    def execute(
        y: OutputTensor[dtype=DType.float32, rank=3, ...],
        x: InputTensor[dtype=DType.float32, rank=3, ...],
        rough: InputTensor[dtype=DType.uint8, rank=2, ...],
        weight: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var n_text, n_in = x.dim_size(0), x.dim_size(2)
        var n_vocab = rough.dim_size(0)
        var half = n_in // 2
        var xs, ys = x.unsafe_ptr(), y.unsafe_ptr()
        var nearly, exactly = rough.unsafe_ptr(), weight.unsafe_ptr()
        var int8s = List[Int8](length=n_text * align_up(n_in, BYTES), fill=0)
        var rounded = int8s.unsafe_ptr()
        var units = List[Float32](length=n_text, fill=0)
        var totals = List[Int32](length=n_text, fill=0)
        for text in range(n_text):
            units[text] = quantise(xs.unsafe_offset(text * n_in), rounded.unsafe_offset(text * n_in), n_in)
            for i in range(n_in):
                totals[text] += rounded[unsafe_offset=text * n_in + i].cast[DType.int32]()
        var all_units, all_totals = units.unsafe_ptr(), totals.unsafe_ptr()

        @always_inline
        @__parameter
        def logit(text: Int, token: Int) -> Float32:
            var row = nearly.unsafe_offset(token * (half + 4))
            var own = rounded.unsafe_offset(text * n_in)
            var sums = Sums(0)
            var others = Sums(0)
            var i = 0
            while i + BYTES <= half:
                var pairs = row.unsafe_load[width=BYTES](i)
                sums = multiply_add(pairs & 15, own.unsafe_load[width=BYTES](i), sums)
                others = multiply_add(pairs >> 4, own.unsafe_load[width=BYTES](half + i), others)
                i += BYTES
            var sum = (sums + others).reduce_add()
            for rest in range(i, half):
                var pair = row[unsafe_offset=rest]
                sum += (pair & 15).cast[DType.int32]() * own[unsafe_offset=rest].cast[DType.int32]()
                sum += (pair >> 4).cast[DType.int32]() * own[unsafe_offset=half + rest].cast[DType.int32]()
            var unit = row.unsafe_offset(half).unsafe_bitcast[Float32]()[unsafe_offset=0]
            var whole = (sum - MIDDLE * all_totals[unsafe_offset=text]).cast[DType.float32]()
            return whole * unit * all_units[unsafe_offset=text]

        var n_task = PARTS_OF_THREAD * parallelism_level(None)
        var share = ceildiv(n_vocab, n_task)

        def task(number: Int) raises {imm}:
            var first, end = number * share, min((number + 1) * share, n_vocab)
            var tokens = Array[Int64, SURE](fill=0)
            var scores = Array[Float32, SURE](fill=0)
            for text in range(n_text):
                var own = ys.unsafe_offset(text * n_vocab)
                for token in range(first, end):
                    own[unsafe_offset=token] = logit(text, token)
                write_best(own, first, end, SURE, tokens.unsafe_ptr(), scores.unsafe_ptr())
                for place in range(min(SURE, end - first)):
                    var token = Int(tokens[place])
                    own[unsafe_offset=token] = products[1](
                        xs.unsafe_offset(text * n_in), exactly.unsafe_offset(token * n_in), n_in
                    )[0]

        sync_parallelize(task, n_task)


@extensibility.register("maxwhisper.rough_keys")
struct RoughKeys:
    """Rounds keys or values (row, head, key, channel) to int8, (row, head, key, channel + 4): behind the channels of
    each stands the float32 that they are multiples of."""

    @staticmethod
    def execute(
        y: OutputTensor[dtype=DType.int8, rank=4, ...],
        x: InputTensor[rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        var n_channel = x.dim_size(3)
        var n_row = x.dim_size(0) * x.dim_size(1) * x.dim_size(2)
        var xs, ys = x.unsafe_ptr(), y.unsafe_ptr()
        var share = max(TOGETHER, ceildiv(n_row, parallelism_level(None)))

        def task(number: Int) raises {imm}:
            var exact = List[Float32](length=n_channel, fill=0)
            for row in range(number * share, min((number + 1) * share, n_row)):
                for channel in range(0, n_channel, WIDTH):
                    var some = xs.unsafe_load[width=WIDTH](row * n_channel + channel)
                    exact.unsafe_ptr().unsafe_store(channel, some.cast[DType.float32]())
                var into = ys.unsafe_offset(row * (n_channel + 4))
                var unit = quantise(exact.unsafe_ptr(), into, n_channel)
                into.unsafe_offset(n_channel).unsafe_bitcast[Float32]()[unsafe_offset=0] = unit

        sync_parallelize(task, ceildiv(n_row, share))
