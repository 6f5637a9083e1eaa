"""Beam search's choice among the candidates of a window's texts, as openai-whisper's `BeamSearchDecoder.update` makes
it, for any device.

A GPU has a block of threads for every window. What a thread does between two barriers is a method of `Window`, which a
CPU calls for one thread after the other: all but how threads share the work is tested without a GPU.
"""

from max.gpu import barrier, block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu
from max.gpu.memory import AddressSpace
from std.memory import unsafe_stack_allocation
from std.utils.numerics import isfinite

import extensibility
from extensibility import InputTensor, _MutableInputTensor

from .pointers import Numbers, Stored, numbers, stored
from .select_tokens import END_OF_TEXT

comptime THREADS = 128  # of a block
comptime MOST = 8  # texts of a window; their candidates are one more than they are
comptime NUMBERS = 2 * MOST + 2
"""A choice is so many numbers: the text that each goes on from, the same for those that have ended, how many these are,
and whether there is a choice at all."""
comptime N_ENDED = 2 * MOST
comptime GOES_ON = 2 * MOST + 1


@fieldwise_init
struct Beams(TrivialRegisterPassable):
    """What maxwhisper.device_beams is given."""

    var texts: Stored[DType.int64]
    var lengths: Stored[DType.int64]
    var rows: Stored[DType.int64]
    var totals: Numbers
    var latest: Numbers
    var wanted: Stored[DType.int64]
    var n_finished: Stored[DType.int64]
    var finished: Stored[DType.int64]
    var finished_lengths: Stored[DType.int64]
    var finished_totals: Numbers
    var candidates: Stored[DType.int64]
    var logprobs: Numbers
    var ends: Stored[DType.int64]
    var limits: Stored[DType.int64]
    var n_beam: Int32
    var n_best: Int32
    var capacity: Int32
    var n_position: Int32
    var most_finished: Int32


@fieldwise_init
struct Window(TrivialRegisterPassable):
    """The texts of a window, all of one length."""

    var its: Beams
    var number: Int
    var n_beam: Int
    var first: Int  # of its texts

    @staticmethod
    @always_inline
    def of(its: Beams, number: Int) -> Self:
        var n_beam = Int(its.n_beam)
        return Self(its, number, n_beam, number * n_beam)

    @always_inline
    def length(self) -> Int:
        return Int(self.its.lengths[unsafe_offset=self.first])

    @always_inline
    def left(self) -> Int:
        """Returns how many more texts are to end."""
        return Int(self.its.wanted[unsafe_offset=self.number] - self.its.n_finished[unsafe_offset=self.number])

    @always_inline
    def goes_on(self) -> Bool:
        """Tells whether the texts may have another token, fewer have ended than are wanted, there is room for as many
        as there are texts, and no log-probability is not finite."""
        if self.length() >= Int(self.its.ends[unsafe_offset=self.first]) or self.left() <= 0:
            return False
        if Int(self.its.n_finished[unsafe_offset=self.number]) + self.n_beam > Int(self.its.most_finished):
            return False
        for text in range(self.first, self.first + self.n_beam):
            if not isfinite(self.its.latest[unsafe_offset=text]):
                return False
        return True

    @always_inline
    def look(self) -> Bool:
        """Keeps the greatest log-probability of every text; tells whether all are finite."""
        var finite = True
        for text in range(self.first, self.first + self.n_beam):
            var logprob = self.its.logprobs[unsafe_offset=text * Int(self.its.n_best)]
            self.its.latest[unsafe_offset=text] = logprob
            finite = finite and isfinite(logprob)
        return finite

    @always_inline
    def choose(
        self,
        choice: Pointer[mut=True, Int32, _, address_space=_],
        tokens: Pointer[mut=True, Int64, _, address_space=_],
        sums: Pointer[mut=True, Float32, _, address_space=_],
        thread: Int,
    ):
        """Leaves the likeliest texts with a token more, those that end with it apart: of equal ones first those of the
        earlier text, then the likelier token of a text."""
        if thread != 0:
            return
        choice[unsafe_offset=N_ENDED] = 0
        choice[unsafe_offset=GOES_ON] = Int32(self.goes_on() and self.look())
        if choice[unsafe_offset=GOES_ON] == 0:
            return
        var eot, n_best = self.its.limits[unsafe_offset=END_OF_TEXT], Int(self.its.n_best)
        var ranks = Array[Int, MOST](fill=0)  # of the likeliest candidate that is left of each text
        var n_saved, n_ended = 0, 0
        while n_saved < self.n_beam:
            var best, greatest = -1, Float32(0)
            for beam in range(self.n_beam):
                if ranks[beam] > self.n_beam:
                    continue
                var at = (self.first + beam) * n_best + ranks[beam]
                var sum = self.its.totals[unsafe_offset=self.first + beam] + self.its.logprobs[unsafe_offset=at]
                if best < 0 or sum > greatest:
                    best, greatest = beam, sum
            var token = self.its.candidates[unsafe_offset=(self.first + best) * n_best + ranks[best]]
            ranks[best] += 1
            if token != eot:
                choice[unsafe_offset=n_saved] = Int32(best)
                tokens[unsafe_offset=n_saved] = token
                sums[unsafe_offset=n_saved] = greatest
                n_saved += 1
            elif n_ended < self.left():
                choice[unsafe_offset=MOST + n_ended] = Int32(best)
                sums[unsafe_offset=MOST + n_ended] = greatest
                n_ended += 1
        choice[unsafe_offset=N_ENDED] = Int32(n_ended)

    @always_inline
    def move(
        self,
        choice: Pointer[Int32, _, address_space=_],
        tokens: Pointer[Int64, _, address_space=_],
        thread: Int,
    ):
        """Moves every THREADS-th token and row of all texts to where they are chosen, and puts the new tokens there.
        Nothing is overwritten that another thread reads."""
        if choice[unsafe_offset=GOES_ON] == 0:
            return
        var length, capacity, n_position = self.length(), Int(self.its.capacity), Int(self.its.n_position)
        var texts = self.its.texts.unsafe_offset(self.first * capacity)
        var rows = self.its.rows.unsafe_offset(self.first * n_position)
        for place in range(thread, length + 1, THREADS):
            self.finish(choice, texts.unsafe_offset(place), place)
            if place < length:
                self.rearrange(choice, texts.unsafe_offset(place), capacity)
                self.rearrange(choice, rows.unsafe_offset(place), n_position)
            else:
                for beam in range(self.n_beam):
                    texts[unsafe_offset=beam * capacity + place] = tokens[unsafe_offset=beam]

    @always_inline
    def rearrange(self, choice: Pointer[Int32, _, address_space=_], column: Stored[DType.int64], size: Int):
        var before = Array[Int64, MOST](fill=0)
        for beam in range(self.n_beam):
            before[beam] = column[unsafe_offset=beam * size]
        for beam in range(self.n_beam):
            column[unsafe_offset=beam * size] = before[Int(choice[unsafe_offset=beam])]

    @always_inline
    def finish(self, choice: Pointer[Int32, _, address_space=_], column: Stored[DType.int64], place: Int):
        """Puts a token of every text that has ended behind those that had; the last one ends it."""
        var capacity = Int(self.its.capacity)
        var number = self.number * Int(self.its.most_finished) + Int(self.its.n_finished[unsafe_offset=self.number])
        for i in range(Int(choice[unsafe_offset=N_ENDED])):
            var token = self.its.limits[unsafe_offset=END_OF_TEXT]
            if place < self.length():
                token = column[unsafe_offset=Int(choice[unsafe_offset=MOST + i]) * capacity]
            self.its.finished[unsafe_offset=(number + i) * capacity + place] = token

    @always_inline
    def commit(
        self, choice: Pointer[Int32, _, address_space=_], sums: Pointer[Float32, _, address_space=_], thread: Int
    ):
        """Counts what was moved."""
        if thread != 0 or choice[unsafe_offset=GOES_ON] == 0:
            return
        var length = self.its.lengths[unsafe_offset=self.first] + 1
        for beam in range(self.n_beam):
            self.its.lengths[unsafe_offset=self.first + beam] = length
            self.its.totals[unsafe_offset=self.first + beam] = sums[unsafe_offset=beam]
        var n_ended, n_finished = Int(choice[unsafe_offset=N_ENDED]), self.its.n_finished[unsafe_offset=self.number]
        var number = self.number * Int(self.its.most_finished) + Int(n_finished)
        for i in range(n_ended):
            self.its.finished_lengths[unsafe_offset=number + i] = length
            self.its.finished_totals[unsafe_offset=number + i] = sums[unsafe_offset=MOST + i]
        self.its.n_finished[unsafe_offset=self.number] = n_finished + Int64(n_ended)


@__name("search_beams")
def search_on_gpu(
    texts: Stored[DType.int64],
    lengths: Stored[DType.int64],
    rows: Stored[DType.int64],
    totals: Numbers,
    latest: Numbers,
    wanted: Stored[DType.int64],
    n_finished: Stored[DType.int64],
    finished: Stored[DType.int64],
    finished_lengths: Stored[DType.int64],
    finished_totals: Numbers,
    candidates: Stored[DType.int64],
    logprobs: Numbers,
    ends: Stored[DType.int64],
    limits: Stored[DType.int64],
    n_beam: Int32,
    n_best: Int32,
    capacity: Int32,
    n_position: Int32,
    most_finished: Int32,
):
    """Chooses among the candidates of the window of the block's index."""
    var its = Beams(
        texts,
        lengths,
        rows,
        totals,
        latest,
        wanted,
        n_finished,
        finished,
        finished_lengths,
        finished_totals,
        candidates,
        logprobs,
        ends,
        limits,
        n_beam,
        n_best,
        capacity,
        n_position,
        most_finished,
    )
    var window, thread = Window.of(its, Int(block_idx.x)), Int(thread_idx.x)
    var choice = unsafe_stack_allocation[NUMBERS, Int32, address_space=AddressSpace.SHARED]()
    var tokens = unsafe_stack_allocation[MOST, Int64, address_space=AddressSpace.SHARED]()
    var sums = unsafe_stack_allocation[2 * MOST, Float32, address_space=AddressSpace.SHARED]()
    window.choose(choice, tokens, sums, thread)
    barrier()
    window.move(choice, tokens, thread)
    barrier()
    window.commit(choice, sums, thread)


def search_on_cpu(window: Window):
    """Does what `search_on_gpu` does, one thread after the other."""
    var choice = unsafe_stack_allocation[NUMBERS, Int32]()
    var tokens = unsafe_stack_allocation[MOST, Int64]()
    var sums = unsafe_stack_allocation[2 * MOST, Float32]()
    for thread in range(THREADS):
        window.choose(choice, tokens, sums, thread)
    for thread in range(THREADS):
        window.move(choice, tokens, thread)
    for thread in range(THREADS):
        window.commit(choice, sums, thread)


@extensibility.register("maxwhisper.device_beams")
struct DeviceBeams:
    """Puts the likeliest candidates behind the texts of every window, and keeps those that end; not once enough have
    ended, there is no room for more, texts are as long as they may get, or a text's greatest log-probability is not
    finite. All that is changed is changed in place.

    texts: (text, capacity), those of a window side by side and of one length. lengths, ends, totals: (text,).
    rows: (text, position), where the keys and values of a text are, moved with its tokens.
    latest: (text,), each text's greatest log-probability of the latest step.
    wanted, n_finished: (window,), how many texts are to end, and have. finished: (window, most, capacity), these.
    finished_lengths, finished_totals: (window, most).
    candidates, logprobs: (text, candidate), at least one more than a window has texts, in falling order.
    limits: as of `maxwhisper.select_tokens`.
    """

    @staticmethod
    def execute[
        target: StaticString
    ](
        texts: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        lengths: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        rows: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        totals: _MutableInputTensor[dtype=DType.float32, rank=1, ...],
        latest: _MutableInputTensor[dtype=DType.float32, rank=1, ...],
        n_finished: _MutableInputTensor[dtype=DType.int64, rank=1, ...],
        finished: _MutableInputTensor[dtype=DType.int64, rank=3, ...],
        finished_lengths: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        finished_totals: _MutableInputTensor[dtype=DType.float32, rank=2, ...],
        candidates: _MutableInputTensor[dtype=DType.int64, rank=2, ...],
        logprobs: _MutableInputTensor[dtype=DType.float32, rank=2, ...],
        ends: InputTensor[dtype=DType.int64, rank=1, ...],
        wanted: InputTensor[dtype=DType.int64, rank=1, ...],
        limits: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var n_window = n_finished.dim_size(0)
        if n_window == 0:
            return
        var n_beam = texts.dim_size(0) // n_window
        if n_beam > MOST or n_beam >= candidates.dim_size(1):
            raise Error("maxwhisper.device_beams: more texts of a window than there are candidates for")
        var its = Beams(
            stored[DType.int64](texts),
            stored[DType.int64](lengths),
            stored[DType.int64](rows),
            numbers(totals),
            numbers(latest),
            stored[DType.int64](wanted),
            stored[DType.int64](n_finished),
            stored[DType.int64](finished),
            stored[DType.int64](finished_lengths),
            numbers(finished_totals),
            stored[DType.int64](candidates),
            numbers(logprobs),
            stored[DType.int64](ends),
            stored[DType.int64](limits),
            Int32(n_beam),
            Int32(candidates.dim_size(1)),
            Int32(texts.dim_size(1)),
            Int32(rows.dim_size(1)),
            Int32(finished.dim_size(1)),
        )
        comptime if is_cpu[target]():
            for number in range(n_window):
                search_on_cpu(Window.of(its, number))
        else:
            ctx.enqueue_function[search_on_gpu](
                its.texts,
                its.lengths,
                its.rows,
                its.totals,
                its.latest,
                its.wanted,
                its.n_finished,
                its.finished,
                its.finished_lengths,
                its.finished_totals,
                its.candidates,
                its.logprobs,
                its.ends,
                its.limits,
                its.n_beam,
                its.n_best,
                its.capacity,
                its.n_position,
                its.most_finished,
                grid_dim=n_window,
                block_dim=THREADS,
            )
