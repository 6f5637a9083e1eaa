"""A linear layer of a decoder's step with what stands around it, for any device: the layer norm before it, GELU or the
residual behind it.

Of a few rows it is one kernel for a GPU, whose blocks have a warp for each output: what a step waits for is memory, and
the launch of kernels. What a thread does between two barriers is a method of `Layer`, which a CPU calls for one thread
after the other: all but how threads share the work is tested without a GPU. Of more rows the product is MAX's, or the
vendor's, between kernels for the rest.
"""

from max.algorithm import elementwise
from max.gpu import barrier, block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu
from max.gpu.memory import AddressSpace
from layout import Coord
from linalg.matmul import matmul
from linalg.matmul.vendor.blas import matmul as vendor_matmul
from std.math import ceildiv, sqrt
from std.memory import unsafe_stack_allocation
from std.sys import size_of

import extensibility
from extensibility import InputTensor, ManagedTensorSlice, OutputTensor

from .gelu import gelu
from .layer_norm import EPSILON
from .pointers import Numbers, Stored, numbers, stored

comptime ROWS = 8  # of x at most; more are MAX's
comptime LANES = 32  # threads of a warp, which share out the terms of one output
comptime THREADS = 128
comptime OUTPUTS = THREADS // LANES  # of a block
comptime MOST_SHARED = 40960  # bytes of a block's memory for rows of x, of 49152
comptime CHUNK = 8  # numbers that one thread adds up
comptime CHUNKS = THREADS // CHUNK


@fieldwise_init
struct Layer[dtype: DType, y_dtype: DType, n_in: Int, n_row: Int, biased: Bool, activated: Bool, added: Bool](
    TrivialRegisterPassable
):
    """A linear layer: where its numbers are. n_row: rows of x, of which the first `rows` are there."""

    var y: Stored[Self.y_dtype]
    var x: Stored[Self.dtype]
    var weight: Stored[Self.dtype]
    var bias: Numbers
    var norm_weight: Numbers
    var norm_bias: Numbers
    var residual: Stored[Self.dtype]
    var n_out: Int
    var rows: Int

    comptime width = 16 // size_of[Self.dtype]()  # the most that a thread of a GPU loads at once

    def of_rows[
        number: Int
    ](self) -> Layer[Self.dtype, Self.y_dtype, Self.n_in, number, Self.biased, Self.activated, Self.added]:
        """Returns the same for another number of rows."""
        return {
            self.y,
            self.x,
            self.weight,
            self.bias,
            self.norm_weight,
            self.norm_bias,
            self.residual,
            self.n_out,
            self.rows,
        }

    # ---- the layer norm

    @always_inline
    def add_up(self, partial: Pointer[mut=True, Float32, _, address_space=_], thread: Int):
        """Leaves a thread's share of the sum of every row."""
        comptime for row in range(Self.n_row):
            var total = Float32(0)
            if row < self.rows:
                for i in range(thread, Self.n_in, THREADS):
                    total += self.x[unsafe_offset=row * Self.n_in + i].cast[DType.float32]()
            partial[unsafe_offset=row * THREADS + thread] = total

    @always_inline
    def add_up_squares(
        self,
        partial: Pointer[mut=True, Float32, _, address_space=_],
        chunks: Pointer[Float32, _, address_space=_],
        thread: Int,
    ):
        """Leaves a thread's share of the sum of the squares of every row, each less the row's mean."""
        comptime for row in range(Self.n_row):
            var mean, total = mean_of[Self.n_in](chunks, row), Float32(0)
            if row < self.rows:
                for i in range(thread, Self.n_in, THREADS):
                    var centred = self.x[unsafe_offset=row * Self.n_in + i].cast[DType.float32]() - mean
                    total = centred.fma(centred, total)
            partial[unsafe_offset=row * THREADS + thread] = total

    @always_inline
    def normalize(
        self,
        into: Pointer[mut=True, Scalar[Self.dtype], _, address_space=_],
        means: Pointer[Float32, _, address_space=_],
        squares: Pointer[Float32, _, address_space=_],
        thread: Int,
    ):
        comptime for row in range(Self.n_row):
            if row < self.rows:
                var mean = mean_of[Self.n_in](means, row)
                var deviation = sqrt(mean_of[Self.n_in](squares, row) + Float32(EPSILON))
                for i in range(thread, Self.n_in, THREADS):
                    var centred = self.x[unsafe_offset=row * Self.n_in + i].cast[DType.float32]() - mean
                    var scaled = (centred / deviation).fma(
                        self.norm_weight[unsafe_offset=i], self.norm_bias[unsafe_offset=i]
                    )
                    into[unsafe_offset=row * Self.n_in + i] = scaled.cast[Self.dtype]()

    # ---- the product

    @always_inline
    def multiply(
        self,
        partial: Pointer[mut=True, Float32, _, address_space=_],
        x: Pointer[Scalar[Self.dtype], _, address_space=_],
        block: Int,
        thread: Int,
    ):
        """Leaves a lane's share of one output of every row."""
        comptime width = Self.width
        var output, lane = block * OUTPUTS + thread // LANES, thread % LANES
        var sums = Array[SIMD[DType.float32, width], Self.n_row](fill=0)
        if output < self.n_out:
            var weights = self.weight.unsafe_offset(output * Self.n_in)
            for i in range(lane * width, Self.n_in, LANES * width):
                var some = weights.unsafe_load[width=width, alignment=16](i).cast[DType.float32]()
                comptime for row in range(Self.n_row):
                    if row < self.rows:
                        var numbers = x.unsafe_load[width=width, alignment=16](row * Self.n_in + i)
                        sums[row] = numbers.cast[DType.float32]().fma(some, sums[row])
        comptime for row in range(Self.n_row):
            partial[unsafe_offset=row * THREADS + thread] = sums[row].reduce_add()

    @always_inline
    def finish(self, partial: Pointer[Float32, _, address_space=_], block: Int, thread: Int):
        """Writes an output of a row."""
        var row, output = thread // OUTPUTS, block * OUTPUTS + thread % OUTPUTS
        if row >= self.rows or output >= self.n_out:
            return
        var total = Float32(0)
        for lane in range(LANES):
            total += partial[unsafe_offset=row * THREADS + thread % OUTPUTS * LANES + lane]
        finish_sum[Self.dtype, Self.y_dtype, 1, Self.biased, Self.activated, Self.added](
            self.y, total, self.bias, self.residual, row * self.n_out + output, output
        )


@always_inline
def mean_of[number: Int](chunks: Pointer[Float32, _, address_space=_], row: Int) -> Float32:
    """Returns the mean of so many numbers, from the sums of a row."""
    var total = Float32(0)
    for chunk in range(CHUNKS):
        total += chunks[unsafe_offset=row * CHUNKS + chunk]
    return total / Float32(number)


@always_inline
def sum_chunk(
    chunks: Pointer[mut=True, Float32, _, address_space=_], partial: Pointer[Float32, _, address_space=_], number: Int
):
    var total = Float32(0)
    for i in range(number * CHUNK, (number + 1) * CHUNK):
        total += partial[unsafe_offset=i]
    chunks[unsafe_offset=number] = total


@always_inline
def finish_sum[
    dtype: DType, y_dtype: DType, width: SIMDLength, biased: Bool, activated: Bool, added: Bool
](
    y: Stored[y_dtype],
    sum: SIMD[DType.float32, width],
    bias: Numbers,
    residual: Stored[dtype],
    at: Int,
    output: Int,
):
    """Writes what becomes of sums, outputs from one on of a row."""
    var total = sum
    comptime if biased:
        total += bias.unsafe_load[width=width](output)
    comptime if activated:
        total = gelu(total)
    comptime if added:
        total += residual.unsafe_load[width=width](at).cast[DType.float32]()
    y.unsafe_store(at, total.cast[y_dtype]())


@always_inline
def normalize_rows(
    layer: Layer,
    into: Pointer[mut=True, Scalar[layer.dtype], _, address_space=_],
    partial: Pointer[mut=True, Float32, _, address_space=_],
    means: Pointer[mut=True, Float32, _, address_space=_],
    squares: Pointer[mut=True, Float32, _, address_space=_],
):
    """Computes layer norm of the rows of x, by all threads of a block of a GPU."""
    var thread = Int(thread_idx.x)
    layer.add_up(partial, thread)
    barrier()
    if thread < layer.n_row * CHUNKS:
        sum_chunk(means, partial, thread)
    barrier()
    layer.add_up_squares(partial, means, thread)
    barrier()
    if thread < layer.n_row * CHUNKS:
        sum_chunk(squares, partial, thread)
    barrier()
    layer.normalize(into, means, squares, thread)
    barrier()


@__name(t"step_norm_{dtype}_{n_in}")
def normalize_on_gpu[
    dtype: DType, n_in: Int
](into: Stored[dtype], x: Stored[dtype], norm_weight: Numbers, norm_bias: Numbers):
    """Computes layer norm of the row of the block's index."""
    var row = Int(block_idx.x) * n_in
    var layer = Layer[dtype, dtype, n_in, 1, False, False, False](
        into, x.unsafe_offset(row), into, norm_weight, norm_weight, norm_bias, into, 0, 1
    )
    var partial = unsafe_stack_allocation[THREADS, Float32, address_space=AddressSpace.SHARED]()
    var means = unsafe_stack_allocation[CHUNKS, Float32, address_space=AddressSpace.SHARED]()
    var squares = unsafe_stack_allocation[CHUNKS, Float32, address_space=AddressSpace.SHARED]()
    normalize_rows(layer, into.unsafe_offset(row), partial, means, squares)


@__name(t"step_product_{dtype}_{n_in}_{n_row}_{normed}_{biased}_{activated}_{added}")
def multiply_on_gpu[
    dtype: DType, y_dtype: DType, n_in: Int, n_row: Int, normed: Bool, biased: Bool, activated: Bool, added: Bool
](
    y: Stored[y_dtype],
    x: Stored[dtype],
    weight: Stored[dtype],
    bias: Numbers,
    norm_weight: Numbers,
    norm_bias: Numbers,
    residual: Stored[dtype],
    n_out: Int32,
    rows: Int32,
):
    """Computes the outputs of the block's index, a warp for each, of all rows."""
    var layer = Layer[dtype, y_dtype, n_in, n_row, biased, activated, added](
        y, x, weight, bias, norm_weight, norm_bias, residual, Int(n_out), Int(rows)
    )
    var partial = unsafe_stack_allocation[n_row * THREADS, Float32, address_space=AddressSpace.SHARED]()
    var block, thread = Int(block_idx.x), Int(thread_idx.x)
    comptime if normed:
        var means = unsafe_stack_allocation[n_row * CHUNKS, Float32, address_space=AddressSpace.SHARED]()
        var squares = unsafe_stack_allocation[n_row * CHUNKS, Float32, address_space=AddressSpace.SHARED]()
        var normed_x = unsafe_stack_allocation[
            n_row * n_in, Scalar[dtype], alignment=16, address_space=AddressSpace.SHARED
        ]()
        normalize_rows(layer, normed_x, partial, means, squares)
        layer.multiply(partial, normed_x, block, thread)
    else:
        layer.multiply(partial, x, block, thread)
    barrier()
    layer.finish(partial, block, thread)


def normalize_on_cpu(layer: Layer, into: Stored[layer.dtype]):
    """Does what `normalize_rows` does, one thread after the other."""
    var partial = unsafe_stack_allocation[layer.n_row * THREADS, Float32]()
    var means = unsafe_stack_allocation[layer.n_row * CHUNKS, Float32]()
    var squares = unsafe_stack_allocation[layer.n_row * CHUNKS, Float32]()
    for thread in range(THREADS):
        layer.add_up(partial, thread)
    for number in range(layer.n_row * CHUNKS):
        sum_chunk(means, partial, number)
    for thread in range(THREADS):
        layer.add_up_squares(partial, means, thread)
    for number in range(layer.n_row * CHUNKS):
        sum_chunk(squares, partial, number)
    for thread in range(THREADS):
        layer.normalize(into, means, squares, thread)


def multiply_on_cpu(layer: Layer, x: Stored[layer.dtype]):
    """Does what `multiply_on_gpu` does behind the layer norm, one block and one thread after the other."""
    var partial = unsafe_stack_allocation[layer.n_row * THREADS, Float32]()
    for block in range(ceildiv(layer.n_out, OUTPUTS)):
        for thread in range(THREADS):
            layer.multiply(partial, x, block, thread)
        for thread in range(layer.rows * OUTPUTS):
            layer.finish(partial, block, thread)


def multiply_few[
    normed: Bool, target: StaticString
](layer: Layer, normed_x: Stored[layer.dtype], ctx: DeviceContext) raises:
    """Computes the layer for as many rows as it has at most."""
    comptime if is_cpu[target]():
        var x = layer.x
        comptime if normed:
            normalize_on_cpu(layer, normed_x)
            x = normed_x
        multiply_on_cpu(layer, x)
    else:
        ctx.enqueue_function[
            multiply_on_gpu[
                layer.dtype,
                layer.y_dtype,
                layer.n_in,
                layer.n_row,
                normed,
                layer.biased,
                layer.activated,
                layer.added,
            ]
        ](
            layer.y,
            layer.x,
            layer.weight,
            layer.bias,
            layer.norm_weight,
            layer.norm_bias,
            layer.residual,
            Int32(layer.n_out),
            Int32(layer.rows),
            grid_dim=ceildiv(layer.n_out, OUTPUTS),
            block_dim=THREADS,
        )


def normalize_many[target: StaticString](layer: Layer, into: Stored[layer.dtype], ctx: DeviceContext) raises:
    """Computes layer norm of any number of rows."""
    comptime if is_cpu[target]():
        for row in range(layer.rows):
            var one = layer
            one.x, one.rows = layer.x.unsafe_offset(row * layer.n_in), 1
            normalize_on_cpu(one, into.unsafe_offset(row * layer.n_in))
    else:
        ctx.enqueue_function[normalize_on_gpu[layer.dtype, layer.n_in]](
            into, layer.x, layer.norm_weight, layer.norm_bias, grid_dim=layer.rows, block_dim=THREADS
        )


def multiply_many[
    target: StaticString
](
    layer: Layer,
    products: ManagedTensorSlice,
    rows: ManagedTensorSlice,
    weight: ManagedTensorSlice,
    ctx: DeviceContext,
) raises:
    """Computes the layer of rows by MAX's product, or the vendor's, which for float32 must not be in TF32."""
    var into, bias, residual, n_out = layer.y, layer.bias, layer.residual, layer.n_out
    var sums, their_rows = products.to_tile_tensor[DType.int64](), rows.to_tile_tensor[DType.int64]()
    var weights = weight.to_tile_tensor[DType.int64]()

    # A GPU cannot follow references to what is on the stack of the CPU.
    @always_inline
    @__copy_capture(into, bias, residual, n_out)
    @__parameter
    def finish[dtype: DType, width: SIMDLength, *, alignment: Int = 1](at: Coord, sum: SIMD[dtype, width]):
        var row, column = Int(at[0].value()), Int(at[1].value())
        finish_sum[layer.dtype, layer.y_dtype, width, layer.biased, layer.activated, layer.added](
            into, sum.cast[DType.float32](), bias, residual, row * n_out + column, column
        )

    comptime if layer.dtype == DType.float16:
        matmul[transpose_b=True, elementwise_lambda_fn=finish, target=target](sums, their_rows, weights, ctx)
        return
    comptime if layer.dtype == DType.float32 and not is_cpu[target]():
        vendor_matmul[use_tf32=False](ctx, sums, their_rows, weights, c_row_major=True, transpose_b=True)
    else:
        matmul[transpose_b=True, target=target](sums, their_rows, weights, ctx)
    var found = stored[layer.dtype](products)

    @always_inline
    @__copy_capture(into, bias, residual, n_out, found)
    @__parameter
    def one[width: Int, alignment: Int = 1](index: Coord):
        var at = Int(index[0].value())
        var sum = found[unsafe_offset=at].cast[DType.float32]()
        finish_sum[layer.dtype, layer.y_dtype, 1, layer.biased, layer.activated, layer.added](
            into, sum, bias, residual, at, at % n_out
        )

    elementwise[one, simd_width=1, target=target](layer.rows * n_out, ctx)


@extensibility.register("maxwhisper.step_product")
struct StepProduct:
    """Computes a linear layer, with a bias if `biased`: of the layer norm of x if `normed`, with GELU behind it if
    `activated`, and with a residual added if `added`. Of few rows it is rounded once.

    y: (row, n_out). normed_x: (row, n_in), room. products: (row, n_out), room, float32 for float16, else as x.
    x: (row, n_in). weight: (n_out, n_in). bias: float32 (n_out,). norm_weight, norm_bias: float32 (n_in,).
    residual: (row, n_out). What is not asked for may be anything.
    """

    @staticmethod
    def execute[
        target: StaticString, n_in: Int, normed: Bool, biased: Bool, activated: Bool, added: Bool
    ](
        y: OutputTensor[rank=2, ...],
        normed_x: OutputTensor[rank=2, ...],
        products: OutputTensor[rank=2, ...],
        x: InputTensor[dtype=normed_x.dtype, rank=2, ...],
        weight: InputTensor[dtype=normed_x.dtype, rank=2, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        norm_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        residual: InputTensor[dtype=normed_x.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        comptime dtype = normed_x.dtype
        comptime row_size = n_in * size_of[dtype]()
        comptime assert row_size % 16 == 0, "rows of weights begin where 16 bytes do"
        comptime most = ROWS if row_size * ROWS <= MOST_SHARED or not normed else ROWS // 2
        var layer = Layer[dtype, y.dtype, n_in, most, biased, activated, added](
            stored[y.dtype](y),
            stored[dtype](x),
            stored[dtype](weight),
            numbers(bias),
            numbers(norm_weight),
            numbers(norm_bias),
            stored[dtype](residual),
            weight.dim_size(0),
            x.dim_size(0),
        )
        if layer.rows == 0:
            return
        if layer.rows == 1:
            multiply_few[normed, target](layer.of_rows[1](), stored[dtype](normed_x), ctx)
            return
        if layer.rows <= most:
            multiply_few[normed, target](layer, stored[dtype](normed_x), ctx)
            return
        comptime if normed:
            normalize_many[target](layer, stored[dtype](normed_x), ctx)
            multiply_many[target](layer, products, normed_x, weight, ctx)
        else:
            multiply_many[target](layer, products, x, weight, ctx)
