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


@extensibility.register("maxwhisper.embed_last")
struct EmbedLast:
    """Embeds the last token of each text.

    x: (text, 1, state). n_past: (text,), how many tokens come before. A text that is longer than there are positions
    has ended, and it does not matter where its last token is computed again.
    texts: (text, capacity). lengths: (text,).
    token_embedding: (vocab, state). positional_embedding: (position, state).
    """

    @staticmethod
    def execute[
        target: StaticString
    ](
        x: OutputTensor[rank=3, ...],
        n_past: OutputTensor[dtype=DType.int64, rank=1, ...],
        texts: InputTensor[dtype=DType.int64, rank=2, ...],
        lengths: InputTensor[dtype=DType.int64, rank=1, ...],
        token_embedding: InputTensor[rank=2, ...],
        positional_embedding: InputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var n_state, capacity = x.dim_size(2), texts.dim_size(1)
        var n_vocab, n_position = token_embedding.dim_size(0), positional_embedding.dim_size(0)
        var into, past = x.unsafe_ptr(), n_past.unsafe_ptr()
        var tokens, n_token = texts.unsafe_ptr(), lengths.unsafe_ptr()
        var of_token, of_position = token_embedding.unsafe_ptr(), positional_embedding.unsafe_ptr()

        # A GPU cannot follow references to what is on the stack of the CPU.
        @always_inline
        @__copy_capture(
            n_state, capacity, n_vocab, n_position, into, past, tokens, n_token, of_token, of_position
        )
        @__parameter
        def one[width: Int, alignment: Int = 1](index: Coord):
            var at = Int(index[0].value())
            var text, channel = divmod(at, n_state)
            var last = Int(n_token[unsafe_offset=text]) - 1
            var token = Int(tokens[unsafe_offset=text * capacity + last])
            var row, position = max(0, min(token, n_vocab - 1)), min(last, n_position - 1)
            var sum = of_token[unsafe_offset=row * n_state + channel].cast[DType.float32]()
            sum += of_position[unsafe_offset=position * n_state + channel]
            into[unsafe_offset=at] = sum.cast[x.dtype]()
            if channel == 0:
                past[unsafe_offset=text] = Int64(position)

        elementwise[one, simd_width=1, target=target](x.dim_size(0) * n_state, ctx)
