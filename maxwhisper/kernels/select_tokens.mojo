"""The likeliest next tokens under openai-whisper's rules, found without leaving the graph."""

from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import ceildiv, exp, iota, log
from std.utils.numerics import isfinite, neg_inf

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor

from .pointers import Numbers, Stored, numbers, stored, untracked
from .team import thread_count
from .tiles import WIDTH

comptime PARTS = 16  # of a text's logits: as many for any texts and threads, so that a text is bitwise what it is alone
comptime TIMESTAMP_BEGIN = 0  # where in the limits this token is
comptime END_OF_TEXT = 1  # and this one
comptime NEVER = neg_inf[DType.float32]()


struct LogSumExp(TrivialRegisterPassable):
    """The logarithm of a sum of exponentials, in parts that can be joined."""

    var greatest: Float32
    var total: Float32  # of exponentials, each divided by that of the greatest

    def __init__(out self):
        self.greatest = NEVER
        self.total = 0

    @no_inline
    def __init__(out self, logits: Pointer[Float32, _], number: Int):
        """Adds up some logits: of minus infinity alone to minus infinity, of anything with NaN in it to NaN."""
        var whole = number // WIDTH * WIDTH
        var highest = SIMD[DType.float32, WIDTH](NEVER)
        for token in range(0, whole, WIDTH):
            highest = max(highest, logits.unsafe_load[width=WIDTH](token))
        self.greatest = highest.reduce_max()
        self.total = 0
        for token in range(whole, number):
            self.greatest = max(self.greatest, logits[unsafe_offset=token])
        var base = self.base()
        var sums = SIMD[DType.float32, WIDTH](0)
        for token in range(0, whole, WIDTH):
            sums += exp(logits.unsafe_load[width=WIDTH](token) - base)
        self.total += sums.reduce_add()
        for token in range(whole, number):
            self.total += exp(logits[unsafe_offset=token] - base)

    def base(self) -> Float32:
        return Float32(0) if self.greatest == NEVER else self.greatest

    @no_inline
    def joined(self, other: Self) -> Self:
        var both = Self()
        both.greatest = max(self.greatest, other.greatest)
        both.total = self.total * exp(self.base() - both.base()) + other.total * exp(other.base() - both.base())
        return both

    @no_inline
    def value(self) -> Float32:
        return self.base() + log(self.total)

    @no_inline
    def log_probability(self, logit: Float32) -> Float32:
        """Returns a logit less the logarithm of the sum, never rounded at the size of the greatest logit."""
        return logit - self.base() - log(self.total)


@no_inline
def forbidden(
    sampled: Pointer[Int64, _], number: Int, timestamp_begin: Int, end_of_text: Int, n_vocab: Int
) -> Array[Int, 4]:
    """Returns two ranges of tokens, each as first and end, that cannot follow the tokens sampled so far."""
    var latest = number - 1  # timestamp
    while latest >= 0 and Int(sampled[unsafe_offset=latest]) < timestamp_begin:
        latest -= 1
    var ranges = Array[Int, 4](fill=0)
    if latest < 0:
        return ranges^
    var timestamp = Int(sampled[unsafe_offset=latest])
    ranges[0] = timestamp_begin
    if latest < number - 1:
        ranges[1] = timestamp + 1
    elif latest == 0 or Int(sampled[unsafe_offset=latest - 1]) >= timestamp_begin:
        ranges[1] = n_vocab
    else:
        ranges[1] = timestamp
        ranges[3] = end_of_text
    return ranges^


@always_inline
def permitted[
    width: Int
](token: Int, logits: Pointer[Float32, _], suppressed: Pointer[UInt8, _], ranges: Pointer[Int, _]) -> SIMD[
    DType.float32, width
]:
    """Returns the logits from `token` on, minus infinity where it is suppressed or in one of two ranges: first, end,
    first, end."""
    var tokens = iota[DType.int32, width](Int32(token))
    var out = suppressed.unsafe_load[width=width](token).ne(0)
    comptime for i in range(2):
        var first = SIMD[DType.int32, width](Int32(ranges[unsafe_offset=2 * i]))
        var end = SIMD[DType.int32, width](Int32(ranges[unsafe_offset=2 * i + 1]))
        out = out | (tokens.ge(first) & tokens.lt(end))
    return out.select(SIMD[DType.float32, width](NEVER), logits.unsafe_load[width=width](token))


@no_inline
def write_top_tokens(
    logits: Pointer[Float32, _],
    first: Int,
    end: Int,
    n_best: Int,
    tokens: Pointer[mut=True, Int64, _],
    scores: Pointer[mut=True, Float32, _],
):
    """Writes the `n_best` likeliest tokens and their logits, in falling order, equal ones by number; where the rules
    leave fewer, excluded ones with minus infinity."""
    for rank in range(n_best):
        scores[unsafe_offset=rank] = NEVER
    var token = first
    while token < end:
        var width = WIDTH if token + WIDTH <= end else 1
        var highest = logits.unsafe_load[width=WIDTH](token).reduce_max() if width == WIDTH else logits[
            unsafe_offset=token
        ]
        if highest > scores[unsafe_offset=n_best - 1]:
            for each in range(token, token + width):
                insert(each, logits[unsafe_offset=each], n_best, tokens, scores)
        token += width
    var rest = 0
    for rank in range(n_best):
        if scores[unsafe_offset=rank] == NEVER:
            while rest >= first and logits[unsafe_offset=rest] > NEVER:
                rest += 1
            tokens[unsafe_offset=rank] = Int64(rest)
            rest += 1


def insert(
    token: Int,
    score: Float32,
    n_best: Int,
    tokens: Pointer[mut=True, Int64, _],
    scores: Pointer[mut=True, Float32, _],
):
    """Puts a token in its rank among the `n_best` so far, if it has one."""
    if not score > scores[unsafe_offset=n_best - 1]:
        return
    var rank = n_best - 1
    while rank > 0 and score > scores[unsafe_offset=rank - 1]:
        scores[unsafe_offset=rank] = scores[unsafe_offset=rank - 1]
        tokens[unsafe_offset=rank] = tokens[unsafe_offset=rank - 1]
        rank -= 1
    scores[unsafe_offset=rank] = score
    tokens[unsafe_offset=rank] = Int64(token)


@fieldwise_init
struct Logits(TrivialRegisterPassable):
    """What maxwhisper.select_tokens is given."""

    var texts: Stored[DType.int64]
    var logits: Numbers
    var lengths: Stored[DType.int64]
    var ends: Stored[DType.int64]
    var begins: Stored[DType.int64]
    var totals: Numbers
    var suppressed: Stored[DType.uint8]
    var limits: Stored[DType.int64]
    var n_text: Int
    var n_token: Int
    var n_vocab: Int
    var capacity: Int


@fieldwise_init
struct Found(TrivialRegisterPassable):
    """What maxwhisper.select_tokens writes."""

    var candidates: Stored[DType.int64]
    var logprobs: Numbers
    var tokens: Stored[DType.int64]
    var totals: Numbers
    var lengths: Stored[DType.int64]
    var left: Stored[DType.int64]
    var n_best: Int


@no_inline
def select_tokens(its: Logits, into: Found) raises:
    """Finds the likeliest next tokens, and puts the likeliest behind the texts, as far as proposals are accepted."""
    var n_text, n_token, n_vocab, capacity = its.n_text, its.n_token, its.n_vocab, its.capacity
    var n_row = n_text * n_token
    var n_best = into.n_best
    var begin = Int(its.limits[unsafe_offset=TIMESTAMP_BEGIN])
    var end_of_text = Int(its.limits[unsafe_offset=END_OF_TEXT])
    var n_part = n_row * PARTS
    var part_size = ceildiv(n_vocab, PARTS)
    var allowed = List[Float32](unsafe_uninit_length=n_row * n_vocab)  # the logits that the rules leave
    var sums = List[LogSumExp](length=n_part * 2, fill=LogSumExp())  # of text, of timestamps
    var permitted_logits, parts = untracked(allowed), untracked(sums)
    var best_tokens = List[Int64](length=n_row * n_best, fill=0)
    var best_scores = List[Float32](length=n_row * n_best, fill=0)
    var found, scores = untracked(best_tokens), untracked(best_scores)
    var ranges = List[Int](length=n_row * 4, fill=0)
    for row in range(n_row):
        var text, proposal = divmod(row, n_token)
        var length = Int(its.lengths[unsafe_offset=text]) + proposal
        var first = Int(its.begins[unsafe_offset=text])
        if length >= capacity:
            raise Error("maxwhisper.select_tokens: a text has no place for another token")
        var sampled = its.texts.unsafe_offset(text * capacity + first)
        var of_row = forbidden(sampled, length - first, begin, end_of_text, n_vocab)
        for i in range(4):
            ranges[row * 4 + i] = of_row[i]
    var all_ranges = untracked(ranges)

    @always_inline
    @__parameter
    def one_part(number: Int):
        var row, part = divmod(number, PARTS)
        var own = its.logits.unsafe_offset(row * n_vocab)
        var own_allowed = permitted_logits.unsafe_offset(row * n_vocab)
        var of_row = all_ranges.unsafe_offset(row * 4)
        var first, end = min(part * part_size, n_vocab), min((part + 1) * part_size, n_vocab)
        var token = first
        while token + WIDTH <= end:
            own_allowed.unsafe_store(token, permitted[WIDTH](token, own, its.suppressed, of_row))
            token += WIDTH
        for rest in range(token, end):
            own_allowed[unsafe_offset=rest] = permitted[1](rest, own, its.suppressed, of_row)
        var middle = max(first, min(begin, end))
        parts[unsafe_offset=2 * number] = LogSumExp(own_allowed.unsafe_offset(first), middle - first)
        parts[unsafe_offset=2 * number + 1] = LogSumExp(own_allowed.unsafe_offset(middle), end - middle)

    var share = ceildiv(n_part, min(thread_count(), n_part))

    def some(number: Int) raises {imm}:
        for part in range(number * share, min((number + 1) * share, n_part)):
            one_part(part)

    def one(row: Int) raises {imm}:
        var words, timestamps = LogSumExp(), LogSumExp()
        for part in range(row * PARTS, (row + 1) * PARTS):
            words = words.joined(parts[unsafe_offset=2 * part])
            timestamps = timestamps.joined(parts[unsafe_offset=2 * part + 1])
        var timestamp_is_next = timestamps.value() > words.greatest
        var of_all = timestamps if timestamp_is_next else words.joined(timestamps)
        var own_scores = scores.unsafe_offset(row * n_best)
        write_top_tokens(
            permitted_logits.unsafe_offset(row * n_vocab),
            begin if timestamp_is_next else 0,
            n_vocab,
            n_best,
            found.unsafe_offset(row * n_best),
            own_scores,
        )
        for rank in range(n_best):
            own_scores[unsafe_offset=rank] = of_all.log_probability(own_scores[unsafe_offset=rank])

    sync_parallelize(some, ceildiv(n_part, share))
    sync_parallelize(one, n_row)

    var least = Int64.MAX
    var stopped = False
    for text in range(n_text):
        var length = Int(its.lengths[unsafe_offset=text])
        var end = Int(its.ends[unsafe_offset=text])
        var total = its.totals[unsafe_offset=text]
        var its_text = its.texts.unsafe_offset(text * capacity)
        var row = text * n_token
        var goes_on = Int(its_text[unsafe_offset=length - 1]) != end_of_text
        if goes_on:
            for proposal in range(n_token):
                row = text * n_token + proposal
                var token, logprob = found[unsafe_offset=row * n_best], scores[unsafe_offset=row * n_best]
                var accepted = its_text[unsafe_offset=length] == token
                its_text[unsafe_offset=length] = token
                total += logprob
                length += 1
                if Int(token) == end_of_text or not isfinite(logprob):
                    stopped = True
                    break
                if not accepted or length == end:
                    break
            least = min(least, Int64(end - length))
        for rank in range(n_best):
            into.candidates[unsafe_offset=text * n_best + rank] = found[unsafe_offset=row * n_best + rank]
            into.logprobs[unsafe_offset=text * n_best + rank] = scores[unsafe_offset=row * n_best + rank]
        into.tokens[unsafe_offset=text] = its_text[unsafe_offset=length - 1]
        into.totals[unsafe_offset=text] = total
        into.lengths[unsafe_offset=text] = Int64(length)
    into.left[unsafe_offset=0] = 0 if stopped or least == Int64.MAX else least
    # Which nothing else says are still used.
    _ = allowed^
    _ = sums^
    _ = best_tokens^
    _ = best_scores^
    _ = ranges^


@extensibility.register("maxwhisper.select_tokens")
struct SelectTokens:
    """Finds the likeliest next tokens of every text and their log-probabilities, and puts the likeliest behind the
    text. A text that has ended stays as it is.

    Where logits are of several tokens, all but the first of which were only proposed and stand behind the text, it
    verifies them: it goes on as long as each proposal is what would have been put there, and the text is short of its
    limit.

    tokens: (batch, 1), the last of each text.
    new_totals: (batch,), totals and the log-probabilities of what was put behind.
    new_lengths: (batch,), of the texts with what was put behind them.
    left: (1,), how many more tokens every text may have that has not ended; 0 if one ended now, or has no next token:
        logits are not finite or all excluded.
    logits: (batch, token, vocab), of each text's last token and of the proposals behind it.
    texts: (batch, capacity), of which the first `lengths` hold tokens, and the next ones proposals.
    lengths, ends: (batch,), how many tokens a text has, and how many it may have.
    totals: (batch,), the sum of the log-probabilities of a text's tokens.
    suppressed: (vocab,), tokens that no text may have next.
    begins: (batch,), where the tokens of a text begin that were sampled.
    limits: (2,), the first timestamp and the end of text. Text is excluded where all timestamps together are likelier
        than the likeliest token of text. The size of the vocabulary where there are no timestamps.
    candidates, logprobs: (batch, candidate), are written: the likeliest of the last token of each text that was put
        behind, or would be, in falling order, and their log-probabilities.
    """

    @staticmethod
    def execute(
        tokens: OutputTensor[dtype=DType.int64, rank=2, ...],
        new_totals: OutputTensor[dtype=DType.float32, rank=1, ...],
        new_lengths: OutputTensor[dtype=DType.int64, rank=1, ...],
        left: OutputTensor[dtype=DType.int64, rank=1, ...],
        logits: InputTensor[dtype=DType.float32, rank=3, ...],
        texts: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        lengths: InputTensor[dtype=DType.int64, rank=1, ...],
        ends: InputTensor[dtype=DType.int64, rank=1, ...],
        totals: InputTensor[dtype=DType.float32, rank=1, ...],
        suppressed: InputTensor[dtype=DType.bool, rank=1, ...],
        begins: InputTensor[dtype=DType.int64, rank=1, ...],
        limits: InputTensor[dtype=DType.int64, rank=1, ...],
        candidates: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        logprobs: _MutableInputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var its = Logits(
            texts=stored[DType.int64](texts),
            logits=numbers(logits),
            lengths=stored[DType.int64](lengths),
            ends=stored[DType.int64](ends),
            begins=stored[DType.int64](begins),
            totals=numbers(totals),
            suppressed=stored[DType.uint8](suppressed),
            limits=stored[DType.int64](limits),
            n_text=logits.dim_size(0),
            n_token=logits.dim_size(1),
            n_vocab=logits.dim_size(2),
            capacity=texts.dim_size(1),
        )
        var found = Found(
            candidates=stored[DType.int64](candidates),
            logprobs=numbers(logprobs),
            tokens=stored[DType.int64](tokens),
            totals=numbers(new_totals),
            lengths=stored[DType.int64](new_lengths),
            left=stored[DType.int64](left),
            n_best=candidates.dim_size(1),
        )
        select_tokens(its, found)
