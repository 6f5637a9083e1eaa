"""A layer of the decoder for a few tokens of every text, with one start of threads for all of it."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import align_up, ceildiv

import extensibility
from extensibility import InputTensor, OutputTensor

from .attention import QUERIES, ContinuedRows, Rows, ScatteredRows, attend_to_text, attend_to_window
from .gelu import gelu
from .layer_norm import normalize
from .linear import COLUMNS, by_columns, multiply, row_size
from .pointers import Numbers, Stored, numbers, stored, untracked
from .team import COUNTERS, phase, thread_count
from .tiles import WIDTH

comptime PIECES = 4  # of a product for every thread, so that they end at the same time
comptime N_PHASE = 11


@fieldwise_init
struct Sizes(TrivialRegisterPassable):
    """The sizes of a layer of the decoder, and of some texts with as many new tokens each."""

    var n_text: Int
    var n_token: Int
    var n_state: Int
    var n_hidden: Int
    var n_head: Int
    var n_position: Int
    var n_audio: Int
    var n_audio_ctx: Int
    var n_thread: Int


@fieldwise_init
struct Weights[dtype: DType](TrivialRegisterPassable):
    """The weights of a layer of the decoder, in the order of its submodules; matrices are (n_out, n_in)."""

    var attn_ln_weight: Numbers
    var attn_ln_bias: Numbers
    var query_weight: Stored[Self.dtype]
    var query_bias: Numbers
    var key_weight: Stored[Self.dtype]
    var value_weight: Stored[Self.dtype]
    var value_bias: Numbers
    var out_weight: Stored[Self.dtype]
    var out_bias: Numbers
    var cross_attn_ln_weight: Numbers
    var cross_attn_ln_bias: Numbers
    var cross_query_weight: Stored[Self.dtype]
    var cross_query_bias: Numbers
    var cross_out_weight: Stored[Self.dtype]
    var cross_out_bias: Numbers
    var mlp_ln_weight: Numbers
    var mlp_ln_bias: Numbers
    var hidden_weight: Stored[Self.dtype]
    var hidden_bias: Numbers
    var mlp_weight: Stored[Self.dtype]
    var mlp_bias: Numbers


@fieldwise_init
struct Context[cached: DType, crossed: DType](TrivialRegisterPassable):
    """What a layer attends to: keys and values of texts, of which `lengths` positions are filled, and of audio."""

    var k: Stored[Self.cached]
    var v: Stored[Self.cached]
    var lengths: Stored[DType.int64]
    var rows: Stored[DType.int64]
    var k_cross: Stored[Self.crossed]
    var v_cross: Stored[Self.crossed]


@fieldwise_init
struct Values(TrivialRegisterPassable):
    """What a layer computes, from x: each (text, token, width). Before `key` and `value` there may be those of
    `n_before` tokens that are not in the cache yet, of all texts together, if every text has one token."""

    var x: Numbers
    var y: Numbers
    var attn_ln: Numbers
    var query: Numbers
    var key: Numbers
    var value: Numbers
    var attn: Numbers
    var cross_attn_ln: Numbers
    var cross_query: Numbers
    var cross_attn: Numbers
    var mlp_ln: Numbers
    var hidden: Numbers
    var mlp: Numbers
    var active: Numbers
    var attended: Numbers
    var attn_sum: Numbers
    var cross_attended: Numbers
    var cross_attn_sum: Numbers
    var n_before: Int


@no_inline
def project[
    dtype: DType
](
    into: Numbers,
    of: Numbers,
    weight: Stored[dtype],
    bias: Optional[Numbers],
    n_row: Int,
    n_in: Int,
    n_out: Int,
    first: Int,
    share: Int,
    sum: Optional[Numbers] = None,
    to: Optional[Numbers] = None,
    active: Optional[Numbers] = None,
):
    """Computes at most `share` columns of a linear layer, from the first on; also what they give with `to`, as `sum`,
    and with GELU, as `active`, where there is such."""
    var n_column = min(share, n_out - first)
    var its_weight = weight.unsafe_offset(first * row_size[dtype](n_in))
    multiply(into.unsafe_offset(first), n_out, of, its_weight, n_row, n_in, n_column)
    for row in range(n_row):

        @always_inline
        @__parameter
        def put[width: Int](column: Int):
            var at = row * n_out + first + column
            var y = into.unsafe_load[width=width](at)
            if bias:
                y += bias.value().unsafe_load[width=width](first + column)
                into.unsafe_store(at, y)
            if sum:
                sum.value().unsafe_store(at, to.value().unsafe_load[width=width](at) + y)
            if active:
                active.value().unsafe_store(at, gelu(y))

        by_columns[put](n_column)


@no_inline
def compute_layer[
    n_channel: Int, dtype: DType, cached: DType, crossed: DType
](
    counters: Stored[DType.int64],
    scores: Numbers,
    weights: Numbers,
    sizes: Sizes,
    its: Weights[dtype],
    context: Context[cached, crossed],
    values: Values,
):
    """Computes a layer together with the other threads that call this.

    counters: zeros for N_PHASE phases, the same for all threads. scores, weights: a thread's own room for as many
    numbers as there are keys to attend to, QUERIES times as many for those of the audio.
    """
    comptime assert n_channel % WIDTH == 0, "channels must fill vectors"
    var n_state, n_head, n_token = sizes.n_state, sizes.n_head, sizes.n_token
    var n_row = sizes.n_text * n_token
    var share = align_up(ceildiv(n_state, PIECES * sizes.n_thread), COLUMNS)  # of the columns of a product
    var hidden_share = align_up(ceildiv(sizes.n_hidden, PIECES * sizes.n_thread), COLUMNS)
    var n_piece = ceildiv(n_state, share)

    @always_inline
    @__parameter
    def norm[number: Int](into: Numbers, of: Numbers, weight: Numbers, bias: Numbers):
        @always_inline
        @__parameter
        def one(row: Int):
            normalize(into.unsafe_offset(row * n_state), of.unsafe_offset(row * n_state), weight, bias, n_state)

        phase[one](counters, number, n_row)

    @always_inline
    @__parameter
    def project_and_add[
        number: Int
    ](into: Numbers, sum: Numbers, to: Numbers, of: Numbers, weight: Stored[dtype], bias: Numbers, n_in: Int):
        """Computes a linear layer to state, and the residual around it."""

        @always_inline
        @__parameter
        def some(piece: Int):
            project(into, of, weight, bias, n_row, n_in, n_state, piece * share, share, sum=sum, to=to)

        phase[some](counters, number, n_piece)

    @always_inline
    @__parameter
    def query_key_value(piece: Int):
        var matrix, part = divmod(piece, n_piece)
        var into, weight, bias = values.query, its.query_weight, Optional(its.query_bias)
        if matrix == 1:
            into, weight, bias = values.key, its.key_weight, None
        elif matrix == 2:
            into, weight, bias = values.value, its.value_weight, Optional(its.value_bias)
        project(into, values.attn_ln, weight, bias, n_row, n_state, n_state, part * share, share)

    @always_inline
    @__parameter
    def head_of_text(piece: Int):
        var row, head = divmod(piece, n_head)
        var text, token = divmod(row, n_token)
        var at = head * sizes.n_position * n_channel
        var length = Int(context.lengths[unsafe_offset=text])
        var rows = context.rows.unsafe_offset(text * sizes.n_position)
        var cache_row = n_head * sizes.n_position * n_channel
        var n_new = values.n_before + token
        var apart = sizes.n_text * n_state if values.n_before else n_state  # a text's tokens
        var first_new = text * n_token * n_state - values.n_before * apart + head * n_channel
        attend_to_text[n_channel](
            values.attended.unsafe_offset(piece * n_channel),
            values.query.unsafe_offset(piece * n_channel),
            ContinuedRows(
                ScatteredRows(context.k.unsafe_offset(at), length, rows, cache_row),
                values.key.unsafe_offset(first_new),
                n_new,
                apart,
            ),
            ContinuedRows(
                ScatteredRows(context.v.unsafe_offset(at), length, rows, cache_row),
                values.value.unsafe_offset(first_new),
                n_new,
                apart,
            ),
            values.key.unsafe_offset(piece * n_channel),
            values.value.unsafe_offset(piece * n_channel),
            scores,
            weights,
        )

    @always_inline
    @__parameter
    def cross_query_columns(piece: Int):
        var weight, bias = its.cross_query_weight, its.cross_query_bias
        project(
            values.cross_query, values.cross_attn_ln, weight, bias, n_row, n_state, n_state, piece * share, share
        )

    @always_inline
    @__parameter
    def head_of_window(piece: Int):
        var window, head = divmod(piece, n_head)
        var n_query = n_row // sizes.n_audio
        var at = window * n_query * n_state + head * n_channel
        var first = piece * sizes.n_audio_ctx * row_size[crossed](n_channel)
        attend_to_window[n_channel](
            values.cross_attended.unsafe_offset(at),
            values.cross_query.unsafe_offset(at),
            n_query,
            n_state,
            Rows(context.k_cross.unsafe_offset(first), sizes.n_audio_ctx),
            Rows(context.v_cross.unsafe_offset(first), sizes.n_audio_ctx),
            scores,
            weights,
        )

    @always_inline
    @__parameter
    def hidden_columns(piece: Int):
        var into, weight, first = values.hidden, its.hidden_weight, piece * hidden_share
        var bias, active = its.hidden_bias, values.active
        project(
            into, values.mlp_ln, weight, bias, n_row, n_state, sizes.n_hidden, first, hidden_share, active=active
        )

    norm[0](values.attn_ln, values.x, its.attn_ln_weight, its.attn_ln_bias)
    phase[query_key_value](counters, 1, 3 * n_piece)
    phase[head_of_text](counters, 2, n_row * n_head)
    project_and_add[3](
        values.attn, values.attn_sum, values.x, values.attended, its.out_weight, its.out_bias, n_state
    )
    norm[4](values.cross_attn_ln, values.attn_sum, its.cross_attn_ln_weight, its.cross_attn_ln_bias)
    phase[cross_query_columns](counters, 5, n_piece)
    phase[head_of_window](counters, 6, sizes.n_audio * n_head)
    project_and_add[7](
        values.cross_attn,
        values.cross_attn_sum,
        values.attn_sum,
        values.cross_attended,
        its.cross_out_weight,
        its.cross_out_bias,
        n_state,
    )
    norm[8](values.mlp_ln, values.cross_attn_sum, its.mlp_ln_weight, its.mlp_ln_bias)
    phase[hidden_columns](counters, 9, ceildiv(sizes.n_hidden, hidden_share))
    project_and_add[10](
        values.mlp, values.y, values.cross_attn_sum, values.active, its.mlp_weight, its.mlp_bias, sizes.n_hidden
    )


@no_inline
def run_layer[
    n_channel: Int, dtype: DType, cached: DType, crossed: DType
](sizes: Sizes, its: Weights[dtype], context: Context[cached, crossed], values: Values) raises:
    """Computes a layer, with as many threads as there are."""
    var n_key = sizes.n_audio_ctx * QUERIES
    for text in range(sizes.n_text):
        n_key = max(n_key, Int(context.lengths[unsafe_offset=text]) + sizes.n_token)
    var phases = List[Int64](length=N_PHASE * COUNTERS, fill=0)
    var counters = untracked(phases)

    def member(number: Int) raises {imm}:
        var scores = List[Float32](length=n_key, fill=0)
        var weights = List[Float32](length=n_key, fill=0)
        compute_layer[n_channel](counters, untracked(scores), untracked(weights), sizes, its, context, values)
        _ = scores^  # which nothing else says are still used
        _ = weights^

    sync_parallelize(member, sizes.n_thread)
    _ = phases^  # which nothing else says is still used


@extensibility.register("maxwhisper.decoder_block")
struct DecoderBlock:
    """Computes a decoder's layer for the next tokens of each text: for several, bitwise what it computes for one at a
    time.

    Outputs, each (batch, token, width): the layer's, those of its submodules with weights in their order, GELU's, and
    what is computed in between.
    x: (batch, token, state).
    k, v: (row, head, position, channel), of which the first `n_past` positions of a text are filled; n_past: (batch,).
    rows: (batch, position), the row of the cache in which a text's key and value of a position are.
    k_cross, v_cross: (audio, head, n_audio_ctx, channel); batch / audio consecutive texts share a window of audio.
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
        rows: InputTensor[dtype=DType.int64, rank=2, ...],
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
        var sizes = Sizes(
            n_text=x.dim_size(0),
            n_token=x.dim_size(1),
            n_state=x.dim_size(2),
            n_hidden=hidden.dim_size(2),
            n_head=k.dim_size(1),
            n_position=k.dim_size(2),
            n_audio=k_cross.dim_size(0),
            n_audio_ctx=k_cross.dim_size(2),
            n_thread=thread_count(),
        )
        var context = Context[k.dtype, k_cross.dtype](
            k=stored[k.dtype](k),
            v=stored[k.dtype](v),
            lengths=stored[DType.int64](n_past),
            rows=stored[DType.int64](rows),
            k_cross=stored[k_cross.dtype](k_cross),
            v_cross=stored[k_cross.dtype](v_cross),
        )
        comptime dtype = query_weight.dtype
        var its = Weights[dtype](
            attn_ln_weight=numbers(attn_ln_weight),
            attn_ln_bias=numbers(attn_ln_bias),
            query_weight=stored[dtype](query_weight),
            query_bias=numbers(query_bias),
            key_weight=stored[dtype](key_weight),
            value_weight=stored[dtype](value_weight),
            value_bias=numbers(value_bias),
            out_weight=stored[dtype](out_weight),
            out_bias=numbers(out_bias),
            cross_attn_ln_weight=numbers(cross_attn_ln_weight),
            cross_attn_ln_bias=numbers(cross_attn_ln_bias),
            cross_query_weight=stored[dtype](cross_query_weight),
            cross_query_bias=numbers(cross_query_bias),
            cross_out_weight=stored[dtype](cross_out_weight),
            cross_out_bias=numbers(cross_out_bias),
            mlp_ln_weight=numbers(mlp_ln_weight),
            mlp_ln_bias=numbers(mlp_ln_bias),
            hidden_weight=stored[dtype](hidden_weight),
            hidden_bias=numbers(hidden_bias),
            mlp_weight=stored[dtype](mlp_weight),
            mlp_bias=numbers(mlp_bias),
        )
        var values = Values(
            x=numbers(x),
            y=numbers(y),
            attn_ln=numbers(attn_ln),
            query=numbers(query),
            key=numbers(key),
            value=numbers(value),
            attn=numbers(attn),
            cross_attn_ln=numbers(cross_attn_ln),
            cross_query=numbers(cross_query),
            cross_attn=numbers(cross_attn),
            mlp_ln=numbers(mlp_ln),
            hidden=numbers(hidden),
            mlp=numbers(mlp),
            active=numbers(active),
            attended=numbers(attended),
            attn_sum=numbers(attn_sum),
            cross_attended=numbers(cross_attended),
            cross_attn_sum=numbers(cross_attn_sum),
            n_before=0,
        )
        run_layer[n_channel](sizes, its, context, values)
