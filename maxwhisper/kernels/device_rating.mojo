"""The parts of texts' logits under openai-whisper's rules, for any device: what `device_select` puts together.

A GPU has a block of threads for every part of every text. What a thread does between two barriers is a method of
`Part`, which a CPU calls for one thread after the other.
"""

from max.gpu import barrier, block_idx, thread_idx
from max.gpu.memory import AddressSpace
from std.math import ceildiv
from std.memory import unsafe_stack_allocation
from std.utils.numerics import isfinite, neg_inf

from .pointers import Numbers, Stored
from .select_tokens import END_OF_TEXT, TIMESTAMP_BEGIN
from .split_attention import greatest_of, weight

comptime PART = 256  # tokens; a block has a thread for each; `device_rules.PART` is the same
comptime CHUNK = 16  # numbers that one thread looks at
comptime CHUNKS = PART // CHUNK
comptime NEVER = neg_inf[DType.float32]()
comptime LOG2E = Float32(1.4426950408889634)


@always_inline
def sum_of(values: Pointer[Float32, _, address_space=_], first: Int, end: Int) -> Float32:
    var total = Float32(0)
    for i in range(first, end):
        total += values[unsafe_offset=i]
    return total


@always_inline
def exponential(score: Float32, greatest: Float32) -> Float32:
    """Returns that of the difference; of NaN NaN."""
    return weight((score - greatest) * LOG2E, 0)


@always_inline
def comes_before(score: Float32, token: Int64, other: Float32, other_token: Int64) -> Bool:
    return score > other or (score == other and token < other_token)


@fieldwise_init
struct Rules(TrivialRegisterPassable):
    """Which tokens may follow a text: those of text from one on, and timestamps from one on."""

    var begin: Int
    var text_from: Int
    var timestamps_from: Int

    @staticmethod
    @always_inline
    def of(text: Stored[DType.int64], first: Int, length: Int, latest: Int, begin: Int, end_of_text: Int) -> Self:
        """Returns those for a text of some length, whose tokens from `first` on were sampled, the last timestamp
        among them at the place `latest`, or before `first` if there is none."""
        if latest < first:
            return Self(begin, 0, begin)
        var timestamp = Int(text[unsafe_offset=latest])
        if latest < length - 1:
            return Self(begin, 0, timestamp + 1)
        if latest == first or Int(text[unsafe_offset=latest - 1]) >= begin:
            return Self(begin, 0, Int.MAX)
        return Self(begin, end_of_text, timestamp)

    @always_inline
    def permit(self, token: Int) -> Bool:
        return token >= (self.timestamps_from if token >= self.begin else self.text_from)


@fieldwise_init
struct Part[n_best: Int](TrivialRegisterPassable):
    """A part of a text's logits, of tokens of text alone, or of timestamps alone.

    found: where the greatest logit goes, the sum of exponentials divided by the greatest one's, and the best logits.
    """

    comptime size = 2 + Self.n_best

    var found: Numbers
    var tokens: Stored[DType.int64]
    var logits: Numbers
    var suppressed: Stored[DType.uint8]
    var text: Stored[DType.int64]
    var sampled: Int
    var length: Int
    var begin: Int
    var end_of_text: Int
    var first: Int  # of its tokens
    var end: Int

    @always_inline
    def look_for_timestamps(self, places: Pointer[mut=True, Float32, _, address_space=_], thread: Int):
        """Leaves the last place of a timestamp among every PART-th of the text."""
        var latest = -1
        for place in range(self.sampled + thread, self.length, PART):
            if Int(self.text[unsafe_offset=place]) >= self.begin:
                latest = place
        places[unsafe_offset=thread] = Float32(latest)

    @always_inline
    def allowed(self, latest: Float32, thread: Int) -> Float32:
        """Returns the logit of a thread's token, minus infinity where the rules exclude it or there is none."""
        var token = self.first + thread
        var rules = Rules.of(self.text, self.sampled, self.length, Int(latest), self.begin, self.end_of_text)
        var excluded = token >= self.end or not rules.permit(token)
        if excluded or self.suppressed[unsafe_offset=token] != 0:
            return NEVER
        return self.logits[unsafe_offset=token]

    @always_inline
    def prepare(self, thread: Int):
        """Fills places that none of a part's logits may take, if some are NaN."""
        if thread < Self.n_best:
            self.keep(thread, NEVER, thread)

    @always_inline
    def keep(self, rank: Int, score: Float32, thread: Int):
        self.found[unsafe_offset=2 + rank] = score
        self.tokens[unsafe_offset=rank] = Int64(max(0, min(self.first + thread, self.end - 1)))

    @always_inline
    def add_up(self, sums: Pointer[Float32, _, address_space=_], greatest: Float32):
        self.found[unsafe_offset=0] = greatest
        self.found[unsafe_offset=1] = sum_of(sums, 0, CHUNKS)

    @always_inline
    def rank(self, scores: Pointer[Float32, _, address_space=_], thread: Int):
        """Keeps a thread's logit if it is among the best: equal ones are by number."""
        var score, rank = scores[unsafe_offset=thread], 0
        for other in range(PART):
            var its = scores[unsafe_offset=other]
            rank += Int(comes_before(its, Int64(other), score, Int64(thread)))
            if rank == Self.n_best:
                return
        self.keep(rank, score, thread)


@fieldwise_init
struct Texts(TrivialRegisterPassable):
    """Texts that a step adds to, and what it reads of rules."""

    var tokens: Stored[DType.int64]
    var lengths: Stored[DType.int64]
    var ends: Stored[DType.int64]
    var begins: Stored[DType.int64]
    var limits: Stored[DType.int64]
    var totals: Numbers
    var latest: Numbers
    var capacity: Int

    @always_inline
    def append(self, text: Int, token: Int64, logprob: Float32):
        """Puts a token behind a text that has not ended, may have one more, and had none with a log-probability that is
        not finite."""
        var its, length = self.tokens.unsafe_offset(text * self.capacity), Int(self.lengths[unsafe_offset=text])
        var ended = its[unsafe_offset=length - 1] == self.limits[unsafe_offset=END_OF_TEXT]
        var full = length >= Int(self.ends[unsafe_offset=text])
        if ended or full or not isfinite(self.latest[unsafe_offset=text]):
            return
        its[unsafe_offset=length] = token
        self.lengths[unsafe_offset=text] = Int64(length + 1)
        self.totals[unsafe_offset=text] += logprob
        self.latest[unsafe_offset=text] = logprob


@always_inline
def words_in_parts(limits: Stored[DType.int64]) -> Int:
    """Returns how many parts the tokens of text have."""
    return ceildiv(Int(limits[unsafe_offset=TIMESTAMP_BEGIN]), PART)


@always_inline
def part_of[
    n_best: Int
](
    found: Numbers,
    tokens: Stored[DType.int64],
    logits: Numbers,
    suppressed: Stored[DType.uint8],
    texts: Texts,
    n_vocab: Int,
    n_part: Int,
    text: Int,
    part: Int,
) -> Part[n_best]:
    var begin = Int(texts.limits[unsafe_offset=TIMESTAMP_BEGIN])
    var n_words, number = words_in_parts(texts.limits), text * n_part + part
    var first = part * PART if part < n_words else begin + (part - n_words) * PART
    return Part[n_best](
        found.unsafe_offset(number * Part[n_best].size),
        tokens.unsafe_offset(number * n_best),
        logits.unsafe_offset(text * n_vocab),
        suppressed,
        texts.tokens.unsafe_offset(text * texts.capacity),
        Int(texts.begins[unsafe_offset=text]),
        Int(texts.lengths[unsafe_offset=text]),
        begin,
        Int(texts.limits[unsafe_offset=END_OF_TEXT]),
        first,
        min(first + PART, begin if part < n_words else n_vocab),
    )


@__name(t"rate_tokens_{n_best}")
def rate_on_gpu[
    n_best: Int
](
    found: Numbers,
    tokens: Stored[DType.int64],
    logits: Numbers,
    suppressed: Stored[DType.uint8],
    texts: Stored[DType.int64],
    lengths: Stored[DType.int64],
    begins: Stored[DType.int64],
    limits: Stored[DType.int64],
    n_vocab: Int32,
    n_part: Int32,
    capacity: Int32,
):
    """Rates the logits of a part, the block's first index, of a text, its second: a thread for each."""
    var its = Texts(texts, lengths, lengths, begins, limits, found, found, Int(capacity))
    var part = part_of[n_best](
        found, tokens, logits, suppressed, its, Int(n_vocab), Int(n_part), Int(block_idx.y), Int(block_idx.x)
    )
    var thread = Int(thread_idx.x)
    var scores = unsafe_stack_allocation[PART, Float32, address_space=AddressSpace.SHARED]()
    var exponentials = unsafe_stack_allocation[PART, Float32, address_space=AddressSpace.SHARED]()
    var chunks = unsafe_stack_allocation[CHUNKS, Float32, address_space=AddressSpace.SHARED]()
    part.look_for_timestamps(scores, thread)
    part.prepare(thread)
    barrier()
    if thread < CHUNKS:
        chunks[unsafe_offset=thread] = greatest_of(scores.unsafe_offset(thread * CHUNK), CHUNK)
    barrier()
    var allowed = part.allowed(greatest_of(chunks, CHUNKS), thread)
    scores[unsafe_offset=thread] = allowed
    barrier()
    if thread < CHUNKS:
        chunks[unsafe_offset=thread] = greatest_of(scores.unsafe_offset(thread * CHUNK), CHUNK)
    barrier()
    var greatest = greatest_of(chunks, CHUNKS)
    exponentials[unsafe_offset=thread] = exponential(allowed, greatest)
    barrier()
    if thread < CHUNKS:
        chunks[unsafe_offset=thread] = sum_of(exponentials, thread * CHUNK, (thread + 1) * CHUNK)
    barrier()
    if thread == 0:
        part.add_up(chunks, greatest)
    part.rank(scores, thread)


def rate_on_cpu[n_best: Int](part: Part[n_best]):
    """Does what `rate_on_gpu` does, one thread after the other."""
    var scores = unsafe_stack_allocation[PART, Float32]()
    var exponentials = unsafe_stack_allocation[PART, Float32]()
    var chunks = unsafe_stack_allocation[CHUNKS, Float32]()
    for thread in range(PART):
        part.look_for_timestamps(scores, thread)
        part.prepare(thread)
    var latest = greatest_of(scores, PART)
    for thread in range(PART):
        scores[unsafe_offset=thread] = part.allowed(latest, thread)
    var greatest = greatest_of(scores, PART)
    for thread in range(PART):
        exponentials[unsafe_offset=thread] = exponential(scores[unsafe_offset=thread], greatest)
    for chunk in range(CHUNKS):
        chunks[unsafe_offset=chunk] = sum_of(exponentials, chunk * CHUNK, (chunk + 1) * CHUNK)
    part.add_up(chunks, greatest)
    for thread in range(PART):
        part.rank(scores, thread)
