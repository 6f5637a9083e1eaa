"""The draft, a quantized copy of the decoder: it proposes the next tokens of texts, which the decoder then verifies.

All proposals share one start of threads. Nothing that the draft computes is kept.
"""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import align_up, ceildiv

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor

from .attention import QUERIES
from .decoder_block import N_PHASE, Context, Sizes, Values, Weights, compute_layer
from .layer_norm import normalize
from .linear import SCALE_SIZE, products, row_size
from .pointers import Numbers, Stored, numbers, stored, untracked
from .quantized import BYTES, Quantized, quantize, quantized_logits
from .select_tokens import END_OF_TEXT, NEVER, TIMESTAMP_BEGIN, LogSumExp, forbidden, permitted, write_top_tokens
from .team import COUNTERS, phase, thread_count
from .tiles import WIDTH

comptime SURE = 4  # tokens of a part, of text and of timestamps, whose logits are computed exactly
comptime PARTS = 8  # of the logits, for every thread, so that they end at the same time
comptime TEXTS = 4  # whose logits are computed from the same numbers, or else one
comptime N_OTHER_PHASE = 4  # of a step, beside those of the layers
comptime N_VALUE = 13  # of a token in `layer_values`, as wide as the state; two more are as wide as the MLP


struct Room(Movable):
    """What the threads share that propose tokens."""

    var layer: List[Float32]  # what a layer computes, as `layer_values` has it
    var new: List[Float32]  # keys and values of the tokens proposed
    var quantized: List[Int8]  # the state that logits are computed from
    var state: List[Quantized]  # of each text
    var ranges: List[Int]  # of tokens that cannot follow
    var logits: List[Float32]
    var sums: List[LogSumExp]  # of each text's timestamps, part by part
    var best_tokens: List[Int64]  # the likeliest of each of these parts' text, and of its timestamps
    var best_scores: List[Float32]
    var past: List[Int64]
    var phases: List[Int64]

    def __init__(out self, sizes: Sizes, n_layer: Int, n_proposed: Int, n_vocab: Int, n_part: Int):
        var n_text = sizes.n_text
        var width = align_up(sizes.n_state, BYTES)
        self.layer = List[Float32](unsafe_uninit_length=n_text * (N_VALUE * sizes.n_state + 2 * sizes.n_hidden))
        self.new = List[Float32](unsafe_uninit_length=n_layer * 2 * n_proposed * n_text * sizes.n_state)
        self.quantized = List[Int8](length=n_text * width, fill=0)
        var quantized = untracked(self.quantized)
        self.state = [Quantized(quantized.unsafe_offset(text * width), 0, 0) for text in range(n_text)]
        self.ranges = List[Int](length=n_text * 4, fill=0)
        self.logits = List[Float32](unsafe_uninit_length=n_text * n_vocab)
        self.sums = List[LogSumExp](length=n_text * n_part, fill=LogSumExp())
        self.best_tokens = List[Int64](length=n_text * n_part * 2, fill=0)
        self.best_scores = List[Float32](length=n_text * n_part * 2, fill=NEVER)
        self.past = List[Int64](length=n_text, fill=0)
        self.phases = List[Int64](length=n_proposed * (N_OTHER_PHASE + n_layer * N_PHASE) * COUNTERS, fill=0)


def layer_weights(matrices: Stored[DType.int8], vectors: Numbers, n_state: Int, n_hidden: Int) -> Weights[DType.int8]:
    """Returns a layer's weights: matrices one behind the other, in the order of `Weights`, and so the vectors."""
    var square = n_state * row_size[DType.int8](n_state)
    var hidden = 6 * square
    var mlp = hidden + n_hidden * row_size[DType.int8](n_state)
    return Weights[DType.int8](
        attn_ln_weight=vectors,
        attn_ln_bias=vectors.unsafe_offset(n_state),
        query_weight=matrices,
        query_bias=vectors.unsafe_offset(2 * n_state),
        key_weight=matrices.unsafe_offset(square),
        value_weight=matrices.unsafe_offset(2 * square),
        value_bias=vectors.unsafe_offset(3 * n_state),
        out_weight=matrices.unsafe_offset(3 * square),
        out_bias=vectors.unsafe_offset(4 * n_state),
        cross_attn_ln_weight=vectors.unsafe_offset(5 * n_state),
        cross_attn_ln_bias=vectors.unsafe_offset(6 * n_state),
        cross_query_weight=matrices.unsafe_offset(4 * square),
        cross_query_bias=vectors.unsafe_offset(7 * n_state),
        cross_out_weight=matrices.unsafe_offset(5 * square),
        cross_out_bias=vectors.unsafe_offset(8 * n_state),
        mlp_ln_weight=vectors.unsafe_offset(9 * n_state),
        mlp_ln_bias=vectors.unsafe_offset(10 * n_state),
        hidden_weight=matrices.unsafe_offset(hidden),
        hidden_bias=vectors.unsafe_offset(11 * n_state),
        mlp_weight=matrices.unsafe_offset(mlp),
        mlp_bias=vectors.unsafe_offset(11 * n_state + n_hidden),
    )


def layer_values(room: Numbers, new: Numbers, sizes: Sizes, n_proposed: Int, n_before: Int) -> Values:
    """Returns where a layer puts what it computes, which the next one overwrites, but for the keys and values of all
    tokens proposed, in `new`. It puts out where it found x."""
    var size, hidden_size = sizes.n_text * sizes.n_state, sizes.n_text * sizes.n_hidden
    return Values(
        x=room,
        y=room,
        attn_ln=room.unsafe_offset(size),
        query=room.unsafe_offset(2 * size),
        key=new.unsafe_offset(n_before * size),
        value=new.unsafe_offset((n_proposed + n_before) * size),
        attn=room.unsafe_offset(3 * size),
        cross_attn_ln=room.unsafe_offset(4 * size),
        cross_query=room.unsafe_offset(5 * size),
        cross_attn=room.unsafe_offset(6 * size),
        mlp_ln=room.unsafe_offset(7 * size),
        mlp=room.unsafe_offset(8 * size),
        attended=room.unsafe_offset(9 * size),
        attn_sum=room.unsafe_offset(10 * size),
        cross_attended=room.unsafe_offset(11 * size),
        cross_attn_sum=room.unsafe_offset(12 * size),
        hidden=room.unsafe_offset(N_VALUE * size),
        active=room.unsafe_offset(N_VALUE * size + hidden_size),
        n_before=n_before,
    )


@fieldwise_init
struct Draft[cached: DType, embedded: DType](TrivialRegisterPassable):
    """What maxwhisper.propose is given, and where it writes."""

    var proposed: Stored[DType.int64]
    var texts: Stored[DType.int64]
    var lengths: Stored[DType.int64]
    var begins: Stored[DType.int64]
    var suppressed: Stored[DType.uint8]
    var limits: Stored[DType.int64]
    var rows: Stored[DType.int64]
    var cache: Stored[Self.cached]
    var cross: Stored[DType.int8]
    var matrices: Stored[DType.int8]
    var vectors: Numbers
    var quantized_embedding: Stored[DType.uint8]
    var token_embedding: Stored[Self.embedded]
    var positional_embedding: Numbers
    var ln_weight: Numbers
    var ln_bias: Numbers
    var n_proposed: Int
    var n_layer: Int
    var n_vocab: Int
    var text_capacity: Int
    var n_position: Int
    var n_row: Int
    var n_cross_row: Int
    var matrices_size: Int
    var vectors_size: Int


@no_inline
def propose_tokens[
    n_channel: Int, cached: DType, embedded: DType
](its: Draft[cached, embedded], sizes: Sizes) raises:
    """Proposes the next tokens of texts, with as many threads as there are."""
    var n_text, n_state = sizes.n_text, sizes.n_state
    var n_proposed, n_layer, n_vocab = its.n_proposed, its.n_layer, its.n_vocab
    var cache_size = its.n_row * sizes.n_head * sizes.n_position * n_channel
    var cross_size = its.n_cross_row * sizes.n_head * sizes.n_audio_ctx * row_size[DType.int8](n_channel)
    var text_capacity = its.text_capacity
    var all_texts, found, all_lengths = its.texts, its.proposed, its.lengths
    var begin = Int(its.limits[unsafe_offset=TIMESTAMP_BEGIN])
    var end_of_text = Int(its.limits[unsafe_offset=END_OF_TEXT])
    var n_part = PARTS * sizes.n_thread
    var part_size = ceildiv(n_vocab, n_part)

    var kept = Room(sizes, n_layer, n_proposed, n_vocab, n_part)
    var room, new, all_logits = untracked(kept.layer), untracked(kept.new), untracked(kept.logits)
    var normed = room.unsafe_offset(n_text * n_state)
    var states, ranges = untracked(kept.state), untracked(kept.ranges)
    var sums, counters, past = untracked(kept.sums), untracked(kept.phases), untracked(kept.past)
    var best_tokens, best_scores = untracked(kept.best_tokens), untracked(kept.best_scores)
    var longest = 0
    for text in range(n_text):
        var length = Int(all_lengths[unsafe_offset=text])
        longest = max(longest, length)
        past[unsafe_offset=text] = Int64(length - 1)
        found[unsafe_offset=text * (1 + n_proposed)] = all_texts[unsafe_offset=text * text_capacity + length - 1]
    if longest + n_proposed > min(text_capacity, its.n_position):
        raise Error("maxwhisper.propose: a text has no place for as many tokens")

    def member(number: Int) raises {imm}:
        var n_key = max(sizes.n_audio_ctx * QUERIES, longest + n_proposed)
        var scores = List[Float32](length=n_key, fill=0)
        var weights = List[Float32](length=n_key, fill=0)
        for step in range(n_proposed):
            var own = counters.unsafe_offset(step * (N_OTHER_PHASE + n_layer * N_PHASE) * COUNTERS)

            @always_inline
            @__parameter
            def embed(text: Int):
                var position = Int(all_lengths[unsafe_offset=text]) + step - 1
                var token = Int(all_texts[unsafe_offset=text * text_capacity + position])
                var row = its.token_embedding.unsafe_offset(token * n_state)
                var at = its.positional_embedding.unsafe_offset(position * n_state)
                for i in range(0, n_state, WIDTH):
                    var values = row.unsafe_load[width=WIDTH](i).cast[DType.float32]()
                    room.unsafe_store(text * n_state + i, values + at.unsafe_load[width=WIDTH](i))

            @always_inline
            @__parameter
            def finish(text: Int):
                var its_own = normed.unsafe_offset(text * n_state)
                var x = room.unsafe_offset(text * n_state)
                normalize(its_own, x, its.ln_weight, its.ln_bias, n_state)
                var into = states[unsafe_offset=text].numbers
                var scale = quantize(its_own, into, n_state)
                var total = Int32(0)
                for i in range(n_state):
                    total += into[unsafe_offset=i].cast[DType.int32]()
                states[unsafe_offset=text] = Quantized(into, scale, total)
                var first = Int(its.begins[unsafe_offset=text])
                var n_sampled = Int(all_lengths[unsafe_offset=text]) + step - first
                var sampled = all_texts.unsafe_offset(text * text_capacity + first)
                var cannot = forbidden(sampled, n_sampled, begin, end_of_text, n_vocab)
                for i in range(4):
                    ranges[unsafe_offset=text * 4 + i] = cannot[i]

            @always_inline
            @__parameter
            def find_best(text: Int, piece: Int, first: Int, last: Int):
                """Finds the likeliest of a part of the vocabulary, of text and of timestamps."""
                var logits = all_logits.unsafe_offset(text * n_vocab)
                var cannot = ranges.unsafe_offset(text * 4)
                var token = first
                while token + WIDTH <= last:
                    logits.unsafe_store(token, permitted[WIDTH](token, logits, its.suppressed, cannot))
                    token += WIDTH
                for rest in range(token, last):
                    logits[unsafe_offset=rest] = permitted[1](rest, logits, its.suppressed, cannot)
                var middle = max(first, min(begin, last))
                var its_own = text * n_part + piece
                sums[unsafe_offset=its_own] = LogSumExp(logits.unsafe_offset(middle), last - middle)
                for kind in range(2):
                    var tokens = Array[Int64, SURE](fill=0)
                    var highest = Array[Float32, SURE](fill=0)
                    write_top_tokens(
                        logits,
                        middle if kind else first,
                        last if kind else middle,
                        SURE,
                        tokens.unsafe_ptr(),
                        highest.unsafe_ptr(),
                    )
                    var best, best_token = NEVER, Int64(0)
                    for rank in range(SURE):
                        if highest[rank] > NEVER:
                            var exact = products[1](
                                normed.unsafe_offset(text * n_state),
                                its.token_embedding.unsafe_offset(Int(tokens[rank]) * n_state),
                                n_state,
                            )[0]
                            if exact > best:
                                best, best_token = exact, tokens[rank]
                    best_scores[unsafe_offset=2 * its_own + kind] = best
                    best_tokens[unsafe_offset=2 * its_own + kind] = best_token

            @always_inline
            @__parameter
            def part(piece: Int):
                var first, last = min(piece * part_size, n_vocab), min((piece + 1) * part_size, n_vocab)
                var half = n_state // 2
                for token in range(first, last):
                    var row = its.quantized_embedding.unsafe_offset(token * (half + SCALE_SIZE))
                    var logits = all_logits.unsafe_offset(token)
                    var text = 0
                    while text + TEXTS <= n_text:
                        var some, into = states.unsafe_offset(text), logits.unsafe_offset(text * n_vocab)
                        quantized_logits[TEXTS](into, n_vocab, row, some, half)
                        text += TEXTS
                    for rest in range(text, n_text):
                        var some, into = states.unsafe_offset(rest), logits.unsafe_offset(rest * n_vocab)
                        quantized_logits[1](into, n_vocab, row, some, half)
                for text in range(n_text):
                    find_best(text, piece, first, last)

            @always_inline
            @__parameter
            def choose(text: Int):
                var timestamps = LogSumExp()
                var best = Array[Float32, 2](fill=NEVER)
                var tokens = Array[Int64, 2](fill=0)
                for each in range(text * n_part, (text + 1) * n_part):
                    timestamps = timestamps.joined(sums[unsafe_offset=each])
                    for kind in range(2):
                        if best_scores[unsafe_offset=2 * each + kind] > best[kind]:
                            best[kind] = best_scores[unsafe_offset=2 * each + kind]
                            tokens[kind] = best_tokens[unsafe_offset=2 * each + kind]
                var kind = 1 if timestamps.value() > best[0] or best[1] > best[0] else 0
                var length = Int(all_lengths[unsafe_offset=text]) + step
                all_texts[unsafe_offset=text * text_capacity + length] = tokens[kind]
                found[unsafe_offset=text * (1 + n_proposed) + step + 1] = tokens[kind]

            phase[embed](own, 0, n_text)
            for layer in range(n_layer):
                compute_layer[n_channel](
                    own.unsafe_offset((N_OTHER_PHASE + layer * N_PHASE) * COUNTERS),
                    untracked(scores),
                    untracked(weights),
                    sizes,
                    layer_weights(
                        its.matrices.unsafe_offset(layer * its.matrices_size),
                        its.vectors.unsafe_offset(layer * its.vectors_size),
                        n_state,
                        sizes.n_hidden,
                    ),
                    Context[cached, DType.int8](
                        k=its.cache.unsafe_offset(2 * layer * cache_size),
                        v=its.cache.unsafe_offset((2 * layer + 1) * cache_size),
                        lengths=past,
                        rows=its.rows,
                        k_cross=its.cross.unsafe_offset(2 * layer * cross_size),
                        v_cross=its.cross.unsafe_offset((2 * layer + 1) * cross_size),
                    ),
                    layer_values(
                        room, new.unsafe_offset(layer * 2 * n_proposed * n_text * n_state), sizes, n_proposed, step
                    ),
                )
            phase[finish](own, 1, n_text)
            phase[part](own, 2, n_part)
            phase[choose](own, 3, n_text)
        _ = scores^
        _ = weights^

    sync_parallelize(member, sizes.n_thread)
    _ = kept^  # which nothing else says is still used


@extensibility.register("maxwhisper.propose")
struct Propose:
    """Proposes the next tokens of texts: each one the likeliest under the rules of maxwhisper.select_tokens, as far as
    the draft knows.

    proposed: (batch, 1 + step), each text's last token, and those proposed, which are put behind the text too.
    texts: (batch, capacity), of which the first `lengths` hold tokens; lengths: (batch,).
    begins, suppressed, limits: (batch,), (vocab,) and (2,), the rules as maxwhisper.select_tokens takes them.
    rows: (batch, position), the row of the cache in which a text's key and value of a position are.
    cache: (2 * layer, row, head, position, channel), keys and values in turn.
    cross: (2 * layer, row, head, n_audio_ctx, channel + SCALE_SIZE), as maxwhisper.quantize_keys writes them, of each
        text its own.
    matrices: (layer, number), those of a layer one behind the other, in the order of the submodules; vectors too.
    quantized_embedding: (vocab, state / 2 + SCALE_SIZE), in a byte the numbers of the first half of a row, and above
        them those of the second half, each ZERO_POINT too high; then the float32 that they are multiples of.
    token_embedding, positional_embedding, ln_weight, ln_bias: the decoder's own.
    """

    @staticmethod
    def execute[
        n_channel: Int
    ](
        proposed: OutputTensor[dtype=DType.int64, rank=2, ...],
        texts: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        lengths: InputTensor[dtype=DType.int64, rank=1, ...],
        begins: InputTensor[dtype=DType.int64, rank=1, ...],
        suppressed: InputTensor[dtype=DType.bool, rank=1, ...],
        limits: InputTensor[dtype=DType.int64, rank=1, ...],
        rows: InputTensor[dtype=DType.int64, rank=2, ...],
        cache: InputTensor[rank=5, ...],
        cross: InputTensor[dtype=DType.int8, rank=5, ...],
        matrices: InputTensor[dtype=DType.int8, rank=2, ...],
        vectors: InputTensor[dtype=DType.float32, rank=2, ...],
        quantized_embedding: InputTensor[dtype=DType.uint8, rank=2, ...],
        token_embedding: InputTensor[rank=2, ...],
        positional_embedding: InputTensor[dtype=DType.float32, rank=2, ...],
        ln_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        ln_bias: InputTensor[dtype=DType.float32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var n_state = token_embedding.dim_size(1)
        var sizes = Sizes(
            n_text=proposed.dim_size(0),
            n_token=1,
            n_state=n_state,
            n_hidden=vectors.dim_size(1) - 12 * n_state,
            n_head=cache.dim_size(2),
            n_position=cache.dim_size(3),
            n_audio=proposed.dim_size(0),
            n_audio_ctx=cross.dim_size(3),
            n_thread=thread_count(),
        )
        var draft = Draft[cache.dtype, token_embedding.dtype](
            proposed=stored[DType.int64](proposed),
            texts=stored[DType.int64](texts),
            lengths=stored[DType.int64](lengths),
            begins=stored[DType.int64](begins),
            suppressed=stored[DType.uint8](suppressed),
            limits=stored[DType.int64](limits),
            rows=stored[DType.int64](rows),
            cache=stored[cache.dtype](cache),
            cross=stored[DType.int8](cross),
            matrices=stored[DType.int8](matrices),
            vectors=numbers(vectors),
            quantized_embedding=stored[DType.uint8](quantized_embedding),
            token_embedding=stored[token_embedding.dtype](token_embedding),
            positional_embedding=numbers(positional_embedding),
            ln_weight=numbers(ln_weight),
            ln_bias=numbers(ln_bias),
            n_proposed=proposed.dim_size(1) - 1,
            n_layer=matrices.dim_size(0),
            n_vocab=token_embedding.dim_size(0),
            text_capacity=texts.dim_size(1),
            n_position=positional_embedding.dim_size(0),
            n_row=cache.dim_size(1),
            n_cross_row=cross.dim_size(1),
            matrices_size=matrices.dim_size(1),
            vectors_size=vectors.dim_size(1),
        )
        propose_tokens[n_channel](draft, sizes)
