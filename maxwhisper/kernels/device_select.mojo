"""The likeliest next tokens under openai-whisper's rules, for any device.

A GPU has a block of threads for every part of a text's logits (`device_rating`), and then one for every text, which
puts the parts together. What a thread does between two barriers is a method of `Part` or `Choice`, which a CPU calls
for one thread after the other: all but how threads share the work is tested without a GPU.
"""

from max.gpu import barrier, block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu
from max.gpu.memory import AddressSpace
from std.math import ceildiv, log
from std.memory import unsafe_stack_allocation
from std.utils.numerics import nan

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor

from .device_rating import (
    NEVER,
    PART,
    Part,
    Texts,
    comes_before,
    exponential,
    part_of,
    rate_on_cpu,
    rate_on_gpu,
    sum_of,
    words_in_parts,
)
from .pointers import Numbers, Stored, numbers, stored
from .split_attention import greatest_of

comptime MOST_PARTS = 1024


@fieldwise_init
struct Choice[n_best: Int](TrivialRegisterPassable):
    """The choice among the parts of a text, of which the first `n_words` are of text."""

    comptime size = 2 + Self.n_best
    comptime among = Self.n_best * Self.n_best

    var found: Numbers
    var tokens: Stored[DType.int64]
    var candidates: Stored[DType.int64]
    var logprobs: Numbers
    var n_words: Int
    var n_part: Int

    @always_inline
    def load(
        self,
        greatest: Pointer[mut=True, Float32, _, address_space=_],
        chosen: Pointer[mut=True, Int32, _, address_space=_],
        thread: Int,
    ):
        """Leaves every PART-th part's greatest logit, and fills places that nothing may take, if some are NaN."""
        if thread < Self.n_best:
            chosen[unsafe_offset=thread] = -1
            self.candidates[unsafe_offset=thread] = 0
            self.logprobs[unsafe_offset=thread] = nan[DType.float32]()
        for part in range(thread, self.n_part, PART):
            greatest[unsafe_offset=part] = self.found[unsafe_offset=part * Self.size]

    @always_inline
    def scale(
        self,
        sums: Pointer[mut=True, Float32, _, address_space=_],
        greatest: Pointer[Float32, _, address_space=_],
        thread: Int,
    ):
        """Leaves every PART-th part's sum of exponentials, divided by that of the greatest logit of all."""
        var of_all = greatest_of(greatest, self.n_part)
        for part in range(thread, self.n_part, PART):
            var sum = self.found[unsafe_offset=part * Self.size + 1]
            sums[unsafe_offset=part] = sum * exponential(greatest[unsafe_offset=part], of_all)

    @always_inline
    def first_part(
        self, sums: Pointer[Float32, _, address_space=_], greatest: Pointer[Float32, _, address_space=_]
    ) -> Int:
        """Returns the first part that may be chosen from: of text, or where all timestamps together are likelier than
        the likeliest token of text, of timestamps. If a logit of text is NaN so is its sum, which then counts."""
        var words = sum_of(sums, 0, self.n_words)
        var likeliest = exponential(greatest_of(greatest, self.n_words), greatest_of(greatest, self.n_part))
        var timestamp_is_next = words == words and sum_of(sums, self.n_words, self.n_part) > likeliest
        return self.n_words if timestamp_is_next else 0

    @always_inline
    def log_sum(
        self, sums: Pointer[Float32, _, address_space=_], greatest: Pointer[Float32, _, address_space=_]
    ) -> Float32:
        """Returns the logarithm of the sum of all exponentials, divided by that of the greatest logit."""
        return log(sum_of(sums, self.first_part(sums, greatest), self.n_part))

    @always_inline
    def choose_parts(
        self,
        sums: Pointer[Float32, _, address_space=_],
        greatest: Pointer[Float32, _, address_space=_],
        chosen: Pointer[mut=True, Int32, _, address_space=_],
        thread: Int,
    ):
        """Leaves the parts with the greatest logits, in falling order: all the best tokens are of these."""
        var first = self.first_part(sums, greatest)
        for part in range(thread, self.n_part, PART):
            var rank = 0
            for other in range(first, self.n_part):
                var its, own = greatest[unsafe_offset=other], greatest[unsafe_offset=part]
                rank += Int(comes_before(its, Int64(other), own, Int64(part)))
                if rank == Self.n_best:
                    break
            if part >= first and rank < Self.n_best:
                chosen[unsafe_offset=rank] = Int32(part)

    @always_inline
    def gather(
        self,
        scores: Pointer[mut=True, Float32, _, address_space=_],
        tokens: Pointer[mut=True, Int64, _, address_space=_],
        chosen: Pointer[Int32, _, address_space=_],
        thread: Int,
    ):
        """Leaves a logit of the chosen parts and its token; minus infinity where fewer were chosen."""
        if thread < Self.among:
            var part = Int(chosen[unsafe_offset=thread // Self.n_best])
            var rank = thread % Self.n_best
            scores[unsafe_offset=thread] = NEVER
            tokens[unsafe_offset=thread] = 0
            if part >= 0:
                scores[unsafe_offset=thread] = self.found[unsafe_offset=part * Self.size + 2 + rank]
                tokens[unsafe_offset=thread] = self.tokens[unsafe_offset=part * Self.n_best + rank]

    @always_inline
    def finish(
        self,
        scores: Pointer[Float32, _, address_space=_],
        tokens: Pointer[Int64, _, address_space=_],
        greatest: Float32,
        log_sum: Float32,
        thread: Int,
    ) -> Bool:
        """Writes what a thread gathered, if it is among the best, in its rank; tells whether it is the likeliest."""
        if thread >= Self.among:
            return False
        var score, token, rank = scores[unsafe_offset=thread], tokens[unsafe_offset=thread], 0
        for other in range(Self.among):
            rank += Int(comes_before(scores[unsafe_offset=other], tokens[unsafe_offset=other], score, token))
        if rank < Self.n_best:
            self.candidates[unsafe_offset=rank] = token
            self.logprobs[unsafe_offset=rank] = score - greatest - log_sum  # never rounded at the size of a logit
        return rank == 0


@always_inline
def choice_of[
    n_best: Int
](
    candidates: Stored[DType.int64],
    logprobs: Numbers,
    found: Numbers,
    tokens: Stored[DType.int64],
    limits: Stored[DType.int64],
    n_part: Int,
    text: Int,
) -> Choice[n_best]:
    return Choice[n_best](
        found.unsafe_offset(text * n_part * Part[n_best].size),
        tokens.unsafe_offset(text * n_part * n_best),
        candidates.unsafe_offset(text * n_best),
        logprobs.unsafe_offset(text * n_best),
        words_in_parts(limits),
        n_part,
    )


@__name(t"choose_tokens_{n_best}_{appends}")
def choose_on_gpu[
    n_best: Int, appends: Bool
](
    candidates: Stored[DType.int64],
    logprobs: Numbers,
    found: Numbers,
    tokens: Stored[DType.int64],
    texts: Stored[DType.int64],
    lengths: Stored[DType.int64],
    ends: Stored[DType.int64],
    limits: Stored[DType.int64],
    totals: Numbers,
    latest: Numbers,
    n_part: Int32,
    capacity: Int32,
):
    """Chooses among the parts of the text of the block's index. appends: whether the likeliest goes behind the text."""
    var text, thread = Int(block_idx.x), Int(thread_idx.x)
    var choice = choice_of[n_best](candidates, logprobs, found, tokens, limits, Int(n_part), text)
    var greatest = unsafe_stack_allocation[MOST_PARTS, Float32, address_space=AddressSpace.SHARED]()
    var sums = unsafe_stack_allocation[MOST_PARTS, Float32, address_space=AddressSpace.SHARED]()
    var chosen = unsafe_stack_allocation[n_best, Int32, address_space=AddressSpace.SHARED]()
    comptime among = n_best * n_best
    var scores = unsafe_stack_allocation[among, Float32, address_space=AddressSpace.SHARED]()
    var their_tokens = unsafe_stack_allocation[among, Int64, address_space=AddressSpace.SHARED]()
    choice.load(greatest, chosen, thread)
    barrier()
    choice.scale(sums, greatest, thread)
    barrier()
    choice.choose_parts(sums, greatest, chosen, thread)
    barrier()
    choice.gather(scores, their_tokens, chosen, thread)
    barrier()
    var log_sum = choice.log_sum(sums, greatest)
    if choice.finish(scores, their_tokens, greatest_of(greatest, choice.n_part), log_sum, thread):
        comptime if appends:
            var its = Texts(texts, lengths, ends, lengths, limits, totals, latest, Int(capacity))
            its.append(text, their_tokens[unsafe_offset=thread], choice.logprobs[unsafe_offset=0])


def choose_on_cpu[n_best: Int, appends: Bool](choice: Choice[n_best], texts: Texts, text: Int):
    """Does what `choose_on_gpu` does, one thread after the other."""
    var greatest = unsafe_stack_allocation[MOST_PARTS, Float32]()
    var sums = unsafe_stack_allocation[MOST_PARTS, Float32]()
    var chosen = unsafe_stack_allocation[n_best, Int32]()
    comptime among = n_best * n_best
    var scores = unsafe_stack_allocation[among, Float32]()
    var tokens = unsafe_stack_allocation[among, Int64]()
    for thread in range(PART):
        choice.load(greatest, chosen, thread)
    for thread in range(PART):
        choice.scale(sums, greatest, thread)
    for thread in range(PART):
        choice.choose_parts(sums, greatest, chosen, thread)
    for thread in range(among):
        choice.gather(scores, tokens, chosen, thread)
    var log_sum = choice.log_sum(sums, greatest)
    for thread in range(among):
        if choice.finish(scores, tokens, greatest_of(greatest, choice.n_part), log_sum, thread):
            comptime if appends:
                texts.append(text, tokens[unsafe_offset=thread], choice.logprobs[unsafe_offset=0])


def select[
    n_best: Int, appends: Bool, target: StaticString
](
    candidates: Stored[DType.int64],
    logprobs: Numbers,
    found: Numbers,
    tokens: Stored[DType.int64],
    room: Int,
    logits: Numbers,
    suppressed: Stored[DType.uint8],
    texts: Texts,
    n_text: Int,
    n_vocab: Int,
    ctx: DeviceContext,
) raises:
    """Finds the best tokens of every text; room: for how many parts there is room in `found` and `tokens`."""
    var n_part = ceildiv(n_vocab, PART) + 1  # those of text and those of timestamps, each of which may not be full
    if room != n_text * n_part or n_part > MOST_PARTS:
        raise Error("device select: parts are of another number, or too many")
    if n_text == 0:
        return
    comptime if is_cpu[target]():
        for text in range(n_text):
            for part in range(n_part):
                rate_on_cpu(
                    part_of[n_best](found, tokens, logits, suppressed, texts, n_vocab, n_part, text, part)
                )
            var choice = choice_of[n_best](candidates, logprobs, found, tokens, texts.limits, n_part, text)
            choose_on_cpu[n_best, appends](choice, texts, text)
    else:
        ctx.enqueue_function[rate_on_gpu[n_best]](
            found,
            tokens,
            logits,
            suppressed,
            texts.tokens,
            texts.lengths,
            texts.begins,
            texts.limits,
            Int32(n_vocab),
            Int32(n_part),
            Int32(texts.capacity),
            grid_dim=(n_part, n_text),
            block_dim=PART,
        )
        ctx.enqueue_function[choose_on_gpu[n_best, appends]](
            candidates,
            logprobs,
            found,
            tokens,
            texts.tokens,
            texts.lengths,
            texts.ends,
            texts.limits,
            texts.totals,
            texts.latest,
            Int32(n_part),
            Int32(texts.capacity),
            grid_dim=n_text,
            block_dim=PART,
        )


@extensibility.register("maxwhisper.device_select")
struct DeviceSelect:
    """Finds the likeliest next tokens of every text and their log-probabilities, in falling order, equal ones by number;
    these are not finite if a logit is NaN, or no token is left.

    appends: whether the likeliest goes behind every text that has not ended, is not as long as it may get, and had no
    log-probability that is not finite.
    found: float32 (text, vocab / 256 + 1, candidate + 2), room. tokens: (text, vocab / 256 + 1, candidate), room.
    candidates, logprobs: (text, candidate), are written.
    texts, lengths, totals, latest: are changed in place; latest: (text,), of the tokens put behind the latest
        log-probability. The others as of `maxwhisper.select_tokens`.
    """

    @staticmethod
    def execute[
        target: StaticString, n_best: Int, appends: Bool
    ](
        found: OutputTensor[dtype=DType.float32, rank=3, ...],
        tokens: OutputTensor[dtype=DType.int64, rank=3, ...],
        logits: InputTensor[dtype=DType.float32, rank=2, ...],
        candidates: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        logprobs: _MutableInputTensor[dtype=DType.float32, rank=2, ...],
        texts: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        lengths: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        totals: _MutableInputTensor[dtype=DType.float32, rank=1, ...],
        latest: _MutableInputTensor[dtype=DType.float32, rank=1, ...],
        ends: InputTensor[dtype=DType.int64, rank=1, ...],
        begins: InputTensor[dtype=DType.int64, rank=1, ...],
        suppressed: InputTensor[dtype=DType.bool, rank=1, ...],
        limits: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        if candidates.dim_size(1) != n_best or (appends and n_best != 1):
            raise Error("maxwhisper.device_select: candidates are of another number")
        var its = Texts(
            stored[DType.int64](texts),
            stored[DType.int64](lengths),
            stored[DType.int64](ends),
            stored[DType.int64](begins),
            stored[DType.int64](limits),
            numbers(totals),
            numbers(latest),
            texts.dim_size(1),
        )
        select[n_best, appends, target](
            stored[DType.int64](candidates),
            numbers(logprobs),
            numbers(found),
            stored[DType.int64](tokens),
            found.dim_size(0) * found.dim_size(1),
            numbers(logits),
            stored[DType.uint8](suppressed),
            its,
            logits.dim_size(0),
            logits.dim_size(1),
            ctx,
        )
