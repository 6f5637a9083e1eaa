"""The likeliest next tokens under openai-whisper's rules, found without leaving the graph."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import exp, iota, log
from std.sys.info import simd_width_of
from std.utils.numerics import neg_inf

import extensibility
from extensibility import InputTensor, OutputTensor

comptime WIDTH = simd_width_of[DType.float32]()
comptime NEVER = neg_inf[DType.float32]()


struct Row[given: Origin[mut=False], excluded: Origin[mut=False], ranges: Origin[mut=False]]:
    """The logits of one text, those that the rules exclude read as minus infinity."""

    var logits: Pointer[Float32, Self.given]
    var suppressed: Pointer[Scalar[DType.bool], Self.excluded]
    var forbidden: Pointer[Int64, Self.ranges]  # two ranges of tokens: first, end, first, end

    def __init__(
        out self,
        logits: Pointer[Float32, Self.given],
        suppressed: Pointer[Scalar[DType.bool], Self.excluded],
        forbidden: Pointer[Int64, Self.ranges],
    ):
        self.logits = logits
        self.suppressed = suppressed
        self.forbidden = forbidden

    @always_inline
    def load[width: Int](self, token: Int) -> SIMD[DType.float32, width]:
        var tokens = iota[DType.int64, width](Int64(token))
        var out = self.suppressed.unsafe_load[width=width](token)
        comptime for i in range(2):
            var first = SIMD[DType.int64, width](self.forbidden[unsafe_offset=2 * i])
            var end = SIMD[DType.int64, width](self.forbidden[unsafe_offset=2 * i + 1])
            out = out | (tokens.ge(first) & tokens.lt(end))
        return out.select(SIMD[DType.float32, width](NEVER), self.logits.unsafe_load[width=width](token))

    def maximum(self, first: Int, end: Int) -> Float32:
        var greatest = SIMD[DType.float32, WIDTH](NEVER)
        var token = first
        while token + WIDTH <= end:
            greatest = max(greatest, self.load[WIDTH](token))
            token += WIDTH
        var one = greatest.reduce_max()
        while token < end:
            one = max(one, self.load[1](token))
            token += 1
        return one

    def log_sum_exp(self, first: Int, end: Int) -> Float32:
        """Returns minus infinity where every token is excluded, and NaN where a logit is."""
        var greatest = self.maximum(first, end)
        if greatest == NEVER:
            greatest = 0
        var sums = SIMD[DType.float32, WIDTH](0)
        var token = first
        while token + WIDTH <= end:
            sums += exp(self.load[WIDTH](token) - greatest)
            token += WIDTH
        var total = sums.reduce_add()
        while token < end:
            total += exp(self.load[1](token) - greatest)
            token += 1
        return greatest + log(total)

    def best(
        self,
        first: Int,
        end: Int,
        n_best: Int,
        tokens: Pointer[mut=True, Int64, _],
        scores: Pointer[mut=True, Float32, _],
    ):
        """Writes the `n_best` likeliest tokens and their logits, in falling order, equal ones by number; where the
        rules leave fewer, excluded ones with minus infinity."""
        for place in range(n_best):
            scores[unsafe_offset=place] = NEVER
        var token = first
        while token < end:
            var width = WIDTH if token + WIDTH <= end else 1
            var highest = self.load[WIDTH](token).reduce_max() if width == WIDTH else self.load[1](token)
            if highest > scores[unsafe_offset=n_best - 1]:
                for each in range(token, token + width):
                    insert(each, self.load[1](each), n_best, tokens, scores)
            token += width
        var rest = 0
        for place in range(n_best):
            if scores[unsafe_offset=place] == NEVER:
                while rest >= first and self.load[1](rest) > NEVER:
                    rest += 1
                tokens[unsafe_offset=place] = Int64(rest)
                rest += 1


def insert(
    token: Int,
    score: Float32,
    n_best: Int,
    tokens: Pointer[mut=True, Int64, _],
    scores: Pointer[mut=True, Float32, _],
):
    """Puts a token in its place among the `n_best` so far, if it has one."""
    if not score > scores[unsafe_offset=n_best - 1]:
        return
    var place = n_best - 1
    while place > 0 and score > scores[unsafe_offset=place - 1]:
        scores[unsafe_offset=place] = scores[unsafe_offset=place - 1]
        tokens[unsafe_offset=place] = tokens[unsafe_offset=place - 1]
        place -= 1
    scores[unsafe_offset=place] = score
    tokens[unsafe_offset=place] = Int64(token)


@extensibility.register("maxwhisper.candidates")
struct Candidates:
    """Finds the likeliest next tokens of every text and their log-probabilities.

    tokens, logprobs: (batch, candidate), in falling order.
    logits: (batch, vocab).
    suppressed: (vocab,), tokens that no text may have next.
    forbidden: (batch, 2, 2), two ranges of tokens that a text may not have next, as first and end.
    timestamp_begin: (1,), the first timestamp; text is excluded where all timestamps together are likelier than the
        likeliest token of text. The size of the vocabulary where there are no timestamps.
    """

    @staticmethod
    def execute(
        tokens: OutputTensor[dtype=DType.int64, rank=2, ...],
        logprobs: OutputTensor[dtype=DType.float32, rank=2, ...],
        logits: InputTensor[dtype=DType.float32, rank=2, ...],
        suppressed: InputTensor[dtype=DType.bool, rank=1, ...],
        forbidden: InputTensor[dtype=DType.int64, rank=3, ...],
        timestamp_begin: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var n_vocab = logits.dim_size(1)
        var n_best = tokens.dim_size(1)
        var given = logits.unsafe_ptr()
        var excluded = suppressed.unsafe_ptr()
        var ranges = forbidden.unsafe_ptr()
        var found = tokens.unsafe_ptr()
        var scores = logprobs.unsafe_ptr()
        var begin = Int(timestamp_begin.unsafe_ptr()[unsafe_offset=0])

        def one(text: Int) raises {imm}:
            var row = Row(given.unsafe_offset(text * n_vocab), excluded, ranges.unsafe_offset(text * 4))
            var timestamps = row.log_sum_exp(begin, n_vocab)
            var timestamp_is_next = timestamps > row.maximum(0, begin)
            var total = timestamps
            if not timestamp_is_next:
                total = row.log_sum_exp(0, n_vocab)
            var own_tokens = found.unsafe_offset(text * n_best)
            var own_scores = scores.unsafe_offset(text * n_best)
            row.best(begin if timestamp_is_next else 0, n_vocab, n_best, own_tokens, own_scores)
            for place in range(n_best):
                own_scores[unsafe_offset=place] -= total

        sync_parallelize(one, logits.dim_size(0))
