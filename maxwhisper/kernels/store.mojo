"""Operations for any device, GPUs among them."""

from max.algorithm import elementwise
from max.gpu.host import DeviceContext
from layout import Coord

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor


@extensibility.register("maxwhisper.store")
struct Store:
    """Puts the key and value of one token of each text into a cache, behind those that are filled.

    queries: (text, 1, state). What takes these comes after the key and value were put there.
    k, v: (text, position, head, channel).
    qkv: (text, 1, 3 * state), queries, keys and values side by side.
    n_past: (text,), how many positions of each text are filled.
    """

    @staticmethod
    def execute[
        target: StaticString
    ](
        queries: OutputTensor[rank=3, ...],
        k: _MutableInputTensor[dtype=queries.dtype, rank=4, ...],
        v: _MutableInputTensor[dtype=queries.dtype, rank=4, ...],
        qkv: InputTensor[dtype=queries.dtype, rank=3, ...],
        n_past: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var n_position, n_state = k.dim_size(1), queries.dim_size(2)
        var into, given = queries.unsafe_ptr(), qkv.unsafe_ptr()
        var ks, vs, lengths = k.unsafe_ptr(), v.unsafe_ptr(), n_past.unsafe_ptr()

        # A GPU cannot follow references to what is on the stack of the CPU.
        @always_inline
        @__copy_capture(n_position, n_state, into, given, ks, vs, lengths)
        @__parameter
        def one[width: Int, alignment: Int = 1](index: Coord):
            var number = Int(index[0].value())
            var text, channel = divmod(number, n_state)
            var its = text * 3 * n_state + channel
            var at = (text * n_position + Int(lengths[unsafe_offset=text])) * n_state + channel
            into[unsafe_offset=number] = given[unsafe_offset=its]
            ks[unsafe_offset=at] = given[unsafe_offset=its + n_state]
            vs[unsafe_offset=at] = given[unsafe_offset=its + 2 * n_state]

        elementwise[one, simd_width=1, target=target](queries.size(), ctx)


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
