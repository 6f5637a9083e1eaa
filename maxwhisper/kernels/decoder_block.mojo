"""A layer of the decoder for a few tokens of every text, with one start of threads for all of it."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from max.runtime.asyncrt import parallelism_level
from std.math import align_up, ceildiv, erf, sqrt

import extensibility
from extensibility import InputTensor, ManagedTensorSlice, OutputTensor

from .attention import QUERIES, ContinuedRows, Rows, ScatteredRows, attend_to_text, attend_to_window
from .linear import COLUMNS, multiply
from .team import COUNTERS, phase
from .tiles import WIDTH

comptime EPSILON = 1e-5  # of a layer norm
comptime PIECES = 4  # of a product for every thread, so that they end at the same time
comptime N_PHASE = 11

comptime Numbers = Pointer[Float32, MutUnsafeAnyOrigin]


@always_inline
def numbers(tensor: ManagedTensorSlice) -> Numbers:
    """What a tensor of float32 holds; threads write and read it in turn."""
    return rebind[Numbers](tensor.unsafe_ptr().as_unsafe_any_origin())


@always_inline
def gelu[width: Int](x: SIMD[DType.float32, width]) -> SIMD[DType.float32, width]:
    return 0.5 * x * (1 + erf(x * Float32(0.5**0.5)))


def normalise(
    y: Pointer[mut=True, Float32, _],
    x: Pointer[Float32, _],
    weight: Pointer[Float32, _],
    bias: Pointer[Float32, _],
    number: Int,
):
    """Layer norm of one row of numbers; they fill vectors."""
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


@extensibility.register("maxwhisper.decoder_block")
struct DecoderBlock:
    """Computes a decoder's layer for the next tokens of each text: for several, bitwise what it computes for one at a
    time.

    Outputs, each (batch, token, width): the layer's, those of its submodules with weights in their order, GELU's, and
    what is computed in between.
    x: (batch, token, state).
    k, v, n_past, sources: as for maxwhisper.cached_attention.
    k_cross, v_cross: as for maxwhisper.attention.
    Then the weights, in the order of the submodules; matrices are (n_out, n_in).
    """

    @staticmethod
    def execute[
        n_channel: Int
    ](
        y: OutputTensor[dtype=DType.float32, rank=3, ...],
        attn_ln: OutputTensor[dtype=DType.float32, rank=3, ...],
        query: OutputTensor[dtype=DType.float32, rank=3, ...],
        key: OutputTensor[dtype=DType.float32, rank=3, ...],
        value: OutputTensor[dtype=DType.float32, rank=3, ...],
        attn: OutputTensor[dtype=DType.float32, rank=3, ...],
        cross_attn_ln: OutputTensor[dtype=DType.float32, rank=3, ...],
        cross_query: OutputTensor[dtype=DType.float32, rank=3, ...],
        cross_attn: OutputTensor[dtype=DType.float32, rank=3, ...],
        mlp_ln: OutputTensor[dtype=DType.float32, rank=3, ...],
        hidden: OutputTensor[dtype=DType.float32, rank=3, ...],
        mlp: OutputTensor[dtype=DType.float32, rank=3, ...],
        active: OutputTensor[dtype=DType.float32, rank=3, ...],
        attended: OutputTensor[dtype=DType.float32, rank=3, ...],
        attn_sum: OutputTensor[dtype=DType.float32, rank=3, ...],
        cross_attended: OutputTensor[dtype=DType.float32, rank=3, ...],
        cross_attn_sum: OutputTensor[dtype=DType.float32, rank=3, ...],
        x: InputTensor[dtype=DType.float32, rank=3, ...],
        k: InputTensor[rank=4, ...],
        v: InputTensor[dtype=k.dtype, rank=4, ...],
        n_past: InputTensor[dtype=DType.int64, rank=1, ...],
        sources: InputTensor[dtype=DType.int64, rank=2, ...],
        k_cross: InputTensor[rank=4, ...],
        v_cross: InputTensor[dtype=k_cross.dtype, rank=4, ...],
        attn_ln_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        attn_ln_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        query_weight: InputTensor[rank=2, ...],
        query_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        key_weight: InputTensor[dtype=query_weight.dtype, rank=2, ...],
        value_weight: InputTensor[dtype=query_weight.dtype, rank=2, ...],
        value_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        out_weight: InputTensor[dtype=query_weight.dtype, rank=2, ...],
        out_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        cross_attn_ln_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        cross_attn_ln_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        cross_query_weight: InputTensor[dtype=query_weight.dtype, rank=2, ...],
        cross_query_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        cross_out_weight: InputTensor[dtype=query_weight.dtype, rank=2, ...],
        cross_out_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        mlp_ln_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        mlp_ln_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        hidden_weight: InputTensor[dtype=query_weight.dtype, rank=2, ...],
        hidden_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        mlp_weight: InputTensor[dtype=query_weight.dtype, rank=2, ...],
        mlp_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime assert n_channel % WIDTH == 0, "channels must fill vectors"
        var n_text, n_token, n_state = x.dim_size(0), x.dim_size(1), x.dim_size(2)
        var n_row = n_text * n_token
        var n_head, n_place = k.dim_size(1), k.dim_size(2)
        var n_audio, n_audio_ctx = k_cross.dim_size(0), k_cross.dim_size(2)
        var window_size = n_audio_ctx * k_cross.dim_size(3)
        var n_query = n_row // n_audio
        var n_thread = parallelism_level(None)
        var lengths, all_sources = n_past.unsafe_ptr(), sources.unsafe_ptr()
        var n_key = n_audio_ctx * QUERIES
        for text in range(n_text):
            n_key = max(n_key, Int(lengths[unsafe_offset=text]) + n_token)

        var share = align_up(ceildiv(n_state, PIECES * n_thread), COLUMNS)  # of the columns of a product
        var n_piece = ceildiv(n_state, share)
        var n_hidden = hidden.dim_size(2)
        var hidden_share = align_up(ceildiv(n_hidden, PIECES * n_thread), COLUMNS)
        var phases = List[Int64](length=N_PHASE * COUNTERS, fill=0)
        var counters = phases.unsafe_ptr().as_unsafe_any_origin()

        @always_inline
        @__parameter
        def norm[
            number: Int
        ](into: OutputTensor[rank=3, ...], of: Numbers, weight: InputTensor[rank=1, ...], bias: InputTensor[rank=1, ...]):
            @always_inline
            @__parameter
            def one(row: Int):
                var at = row * n_state
                normalise(
                    numbers(into).unsafe_offset(at), of.unsafe_offset(at), numbers(weight), numbers(bias), n_state
                )

            phase[one](counters, number, n_row)

        @always_inline
        @__parameter
        def project(
            piece: Int, into: OutputTensor[rank=3, ...], of: Numbers, weight: InputTensor[rank=2, ...], bias: Numbers
        ):
            """Some columns of a linear layer from state to state."""

            @always_inline
            @__parameter
            def put[width: Int](row: Int, column: Int, values: SIMD[DType.float32, width]):
                var sum = values + bias.unsafe_load[width=width](column)
                numbers(into).unsafe_store(row * n_state + column, sum)

            multiply[put](
                of, weight.unsafe_ptr(), n_row, n_state, piece * share, min((piece + 1) * share, n_state)
            )

        @always_inline
        @__parameter
        def project_and_add[
            number: Int
        ](
            into: OutputTensor[rank=3, ...],
            sum: OutputTensor[rank=3, ...],
            to: Numbers,
            of: Numbers,
            weight: InputTensor[rank=2, ...],
            bias: InputTensor[rank=1, ...],
            n_in: Int,
        ):
            """A linear layer to state, and the residual around it."""

            @always_inline
            @__parameter
            def put[width: Int](row: Int, column: Int, values: SIMD[DType.float32, width]):
                var at = row * n_state + column
                var update = values + numbers(bias).unsafe_load[width=width](column)
                numbers(into).unsafe_store(at, update)
                numbers(sum).unsafe_store(at, to.unsafe_load[width=width](at) + update)

            @always_inline
            @__parameter
            def some(piece: Int):
                multiply[put](
                    of, weight.unsafe_ptr(), n_row, n_in, piece * share, min((piece + 1) * share, n_state)
                )

            phase[some](counters, number, n_piece)

        def member(number: Int) raises {imm}:
            var scores = List[Float32](length=n_key, fill=0)
            var weights = List[Float32](length=n_key, fill=0)
            var no_bias = List[Float32](length=n_state, fill=0)

            @always_inline
            @__parameter
            def query_key_value(piece: Int):
                var matrix, part = divmod(piece, n_piece)
                if matrix == 0:
                    project(part, query, numbers(attn_ln), query_weight, numbers(query_bias))
                elif matrix == 1:
                    project(part, key, numbers(attn_ln), key_weight, no_bias.unsafe_ptr().as_unsafe_any_origin())
                else:
                    project(part, value, numbers(attn_ln), value_weight, numbers(value_bias))

            @always_inline
            @__parameter
            def head_of_text(piece: Int):
                var row, head = divmod(piece, n_head)
                var text, n_new = divmod(row, n_token)
                var at = head * n_place * n_channel
                var length = Int(lengths[unsafe_offset=text])
                var its_sources = all_sources.unsafe_offset(text * n_place)
                var row_size = n_head * n_place * n_channel
                var first_new = text * n_token * n_state + head * n_channel
                attend_to_text[n_channel](
                    numbers(attended).unsafe_offset(piece * n_channel),
                    numbers(query).unsafe_offset(piece * n_channel),
                    ContinuedRows(
                        ScatteredRows(k.unsafe_ptr().unsafe_offset(at), length, its_sources, row_size),
                        numbers(key).unsafe_offset(first_new),
                        n_new,
                        n_state,
                    ),
                    ContinuedRows(
                        ScatteredRows(v.unsafe_ptr().unsafe_offset(at), length, its_sources, row_size),
                        numbers(value).unsafe_offset(first_new),
                        n_new,
                        n_state,
                    ),
                    numbers(key).unsafe_offset(piece * n_channel),
                    numbers(value).unsafe_offset(piece * n_channel),
                    scores.unsafe_ptr(),
                    weights.unsafe_ptr(),
                )

            @always_inline
            @__parameter
            def cross_query_columns(piece: Int):
                project(piece, cross_query, numbers(cross_attn_ln), cross_query_weight, numbers(cross_query_bias))

            @always_inline
            @__parameter
            def head_of_window(piece: Int):
                var window, head = divmod(piece, n_head)
                var at = window * n_query * n_state + head * n_channel
                attend_to_window[n_channel](
                    numbers(cross_attended).unsafe_offset(at),
                    numbers(cross_query).unsafe_offset(at),
                    n_query,
                    n_state,
                    Rows(k_cross.unsafe_ptr().unsafe_offset(piece * window_size), n_audio_ctx),
                    Rows(v_cross.unsafe_ptr().unsafe_offset(piece * window_size), n_audio_ctx),
                    scores.unsafe_ptr(),
                    weights.unsafe_ptr(),
                )

            @always_inline
            @__parameter
            def hidden_columns(piece: Int):
                @always_inline
                @__parameter
                def put[width: Int](row: Int, column: Int, values: SIMD[DType.float32, width]):
                    var at = row * n_hidden + column
                    var sum = values + numbers(hidden_bias).unsafe_load[width=width](column)
                    numbers(hidden).unsafe_store(at, sum)
                    numbers(active).unsafe_store(at, gelu(sum))

                multiply[put](
                    numbers(mlp_ln),
                    hidden_weight.unsafe_ptr(),
                    n_row,
                    n_state,
                    piece * hidden_share,
                    min((piece + 1) * hidden_share, n_hidden),
                )

            norm[0](attn_ln, numbers(x), attn_ln_weight, attn_ln_bias)
            phase[query_key_value](counters, 1, 3 * n_piece)
            phase[head_of_text](counters, 2, n_row * n_head)
            project_and_add[3](attn, attn_sum, numbers(x), numbers(attended), out_weight, out_bias, n_state)
            norm[4](cross_attn_ln, numbers(attn_sum), cross_attn_ln_weight, cross_attn_ln_bias)
            phase[cross_query_columns](counters, 5, n_piece)
            phase[head_of_window](counters, 6, n_audio * n_head)
            project_and_add[7](
                cross_attn,
                cross_attn_sum,
                numbers(attn_sum),
                numbers(cross_attended),
                cross_out_weight,
                cross_out_bias,
                n_state,
            )
            norm[8](mlp_ln, numbers(cross_attn_sum), mlp_ln_weight, mlp_ln_bias)
            phase[hidden_columns](counters, 9, ceildiv(n_hidden, hidden_share))
            project_and_add[10](mlp, y, numbers(cross_attn_sum), numbers(active), mlp_weight, mlp_bias, n_hidden)

        sync_parallelize(member, n_thread)
