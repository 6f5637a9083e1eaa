"""Matrix products by MAX's kernels, or the vendor's, for any device."""

from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu
from layout import Coord
from linalg.matmul import matmul
from linalg.matmul.vendor.blas import matmul as vendor_matmul

import extensibility
from extensibility import InputTensor, OutputTensor


@extensibility.register("maxwhisper.biased_product")
struct BiasedProduct:
    """x @ weight.T + bias, which is rounded once: MAX's graphs round a product before anything is added to it.

    y: (row, n_out). sums: float32 (row, n_out), room that some of MAX's kernels need before they add the bias.
    x: (row, n_in). weight: (n_out, n_in). bias: float32 (n_out,).
    """

    @staticmethod
    def execute[
        target: StaticString
    ](
        y: OutputTensor[rank=2, ...],
        sums: OutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=y.dtype, rank=2, ...],
        weight: InputTensor[dtype=y.dtype, rank=2, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var n_out, into, biases = y.dim_size(1), y.unsafe_ptr(), bias.unsafe_ptr()

        # A GPU cannot follow references to what is on the stack of the CPU.
        @always_inline
        @__copy_capture(n_out, into, biases)
        @__parameter
        def finish[dtype: DType, width: SIMDLength, *, alignment: Int = 1](at: Coord, sum: SIMD[dtype, width]):
            var row, column = Int(at[0].value()), Int(at[1].value())
            var total = sum.cast[DType.float32]() + biases.unsafe_load[width=width](column)
            into.unsafe_store(row * n_out + column, total.cast[y.dtype]())

        matmul[transpose_b=True, elementwise_lambda_fn=finish, target=target](
            sums.to_tile_tensor[DType.int64](), x.to_tile_tensor[DType.int64](), weight.to_tile_tensor[DType.int64](), ctx
        )


@extensibility.register("maxwhisper.float32_product")
struct Float32Product:
    """x @ weight.T in float32, which MAX's own kernels for GPUs compute in TF32; by the vendor's library there.

    y: (row, n_out). x: (row, n_in). weight: (n_out, n_in).
    """

    @staticmethod
    def execute[
        target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        weight: InputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var product = y.to_tile_tensor[DType.int64]()
        var rows, columns = x.to_tile_tensor[DType.int64](), weight.to_tile_tensor[DType.int64]()
        comptime if is_cpu[target]():
            matmul[transpose_b=True, target=target](product, rows, columns, ctx)
        else:
            vendor_matmul[use_tf32=False](ctx, product, rows, columns, c_row_major=True, transpose_b=True)
