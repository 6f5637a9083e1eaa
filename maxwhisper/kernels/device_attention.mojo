"""Attention of many queries by MAX's kernels for GPUs, and its scores."""

from max.algorithm import elementwise
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu
from layout import Coord
from nn.attention.gpu.mha import flash_attention
from nn.attention.mha_mask import CausalMask, MHAMask, NullMask
from nn.attention.mha_utils import FlashAttentionAlgorithm, MHAConfig

import extensibility
from extensibility import InputTensor, OutputTensor

from .pointers import numbers, stored
from .split_attention import product


@extensibility.register("maxwhisper.device_attention")
struct DeviceAttention:
    """Attends by MAX's flash attention for float16 and bfloat16, but never to parts of the keys, which MAX 26.7 puts
    together wrongly; its graphs cannot ask for that.

    y, q: (batch, token, head, channel). k, v: (batch, key, head, channel). causal: whether a query sees none of the
    keys behind its own place.
    """

    @staticmethod
    def execute[
        target: StaticString, n_head: Int, n_channel: Int, causal: Bool
    ](
        y: OutputTensor[rank=4, ...],
        q: InputTensor[dtype=y.dtype, rank=4, ...],
        k: InputTensor[dtype=y.dtype, rank=4, ...],
        v: InputTensor[dtype=y.dtype, rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        comptime if is_cpu[target]():
            raise Error("maxwhisper.device_attention: is for GPUs")
        else:
            # Of an H100's two, the kernel that takes float16; of bfloat16 the one that MAX chooses.
            comptime by_dtype = MHAConfig[q.dtype](n_head, n_channel)
            comptime of_float16 = MHAConfig[q.dtype](n_head, n_channel, algorithm=FlashAttentionAlgorithm(2))
            comptime config = by_dtype if q.dtype == DType.bfloat16 else of_float16

            @always_inline
            @__parameter
            def attend[Mask: MHAMask](mask: Mask) raises:
                flash_attention[config=config](
                    y.to_tile_tensor[DType.int64](),
                    q.to_tile_tensor[DType.int64](),
                    k.to_tile_tensor[DType.int64](),
                    v.to_tile_tensor[DType.int64](),
                    mask,
                    Float32(Float64(n_channel) ** -0.5),
                    ctx,
                    num_partitions=Optional[Int](1),
                )

            comptime if causal:
                attend(CausalMask())
            else:
                attend(NullMask())


@extensibility.register("maxwhisper.device_scores")
struct DeviceScores:
    """Computes the scores before softmax, for any device.

    scores: float32 (text, head, token, key). q: (text, token, head * channel).
    k: (row, key, head, channel); consecutive texts share a row.
    """

    @staticmethod
    def execute[
        target: StaticString, n_channel: Int
    ](
        scores: OutputTensor[dtype=DType.float32, rank=4, ...],
        q: InputTensor[rank=3, ...],
        k: InputTensor[dtype=q.dtype, rank=4, ...],
        ctx: DeviceContext,
    ) raises:
        var n_head, n_token, n_key = scores.dim_size(1), scores.dim_size(2), scores.dim_size(3)
        var shared = max(1, scores.dim_size(0) // max(1, k.dim_size(0)))
        var into, queries, keys = numbers(scores), stored[q.dtype](q), stored[q.dtype](k)

        # A GPU cannot follow references to what is on the stack of the CPU.
        @always_inline
        @__copy_capture(n_head, n_token, n_key, shared, into, queries, keys)
        @__parameter
        def one[width: Int, alignment: Int = 1](index: Coord):
            var at = Int(index[0].value())
            var row, key = divmod(at, n_key)
            var head_row, token = divmod(row, n_token)
            var text, head = divmod(head_row, n_head)
            var its_query = queries.unsafe_offset(((text * n_token + token) * n_head + head) * n_channel)
            var its_key = keys.unsafe_offset(((text // shared * n_key + key) * n_head + head) * n_channel)
            var scale = Float32(Float64(n_channel) ** -0.5)
            into[unsafe_offset=at] = product[q.dtype, n_channel](its_query, its_key) * scale

        elementwise[one, simd_width=1, target=target](scores.size(), ctx)
