"""Operations for any device, GPUs among them."""

from max.algorithm import elementwise
from max.gpu.host import DeviceContext
from layout import Coord

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor


@extensibility.register("maxwhisper.store")
struct Store:
    """Puts the key and value of one token of each text into a cache, behind those that are filled.

    queries: (batch, 1, head * channel), a copy of q. What takes these comes after the key and value were put there.
    k, v: (batch, position, head, channel).
    q, k_new, v_new: (batch, 1, head * channel).
    n_past: (batch,), how many positions of each text are filled.
    """

    @staticmethod
    def execute[
        target: StaticString
    ](
        queries: OutputTensor[rank=3, ...],
        k: _MutableInputTensor[dtype=queries.dtype, rank=4, ...],
        v: _MutableInputTensor[dtype=queries.dtype, rank=4, ...],
        q: InputTensor[dtype=queries.dtype, rank=3, ...],
        k_new: InputTensor[dtype=queries.dtype, rank=3, ...],
        v_new: InputTensor[dtype=queries.dtype, rank=3, ...],
        n_past: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var n_position, n_state = k.dim_size(1), q.dim_size(2)
        var into, from_q = queries.unsafe_ptr(), q.unsafe_ptr()
        var ks, vs = k.unsafe_ptr(), v.unsafe_ptr()
        var ks_new, vs_new = k_new.unsafe_ptr(), v_new.unsafe_ptr()
        var lengths = n_past.unsafe_ptr()

        # A GPU cannot follow references to what is on the stack of the CPU.
        @always_inline
        @__copy_capture(n_position, n_state, into, from_q, ks, vs, ks_new, vs_new, lengths)
        @__parameter
        def one[width: Int, alignment: Int = 1](index: Coord):
            var new_at = Int(index[0].value())
            var text, channel = divmod(new_at, n_state)
            var at = (text * n_position + Int(lengths[unsafe_offset=text])) * n_state + channel
            ks[unsafe_offset=at] = ks_new[unsafe_offset=new_at]
            vs[unsafe_offset=at] = vs_new[unsafe_offset=new_at]
            into[unsafe_offset=new_at] = from_q[unsafe_offset=new_at]

        elementwise[one, simd_width=1, target=target](q.dim_size(0) * n_state, ctx)
