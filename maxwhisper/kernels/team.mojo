"""Work in phases, for as many threads as come to it.

Starting a parallel operation costs as much as the product of one token with a small matrix, so the parts of a layer
share one start. The pieces of a phase are taken by whoever is free, and a phase waits for pieces that somebody has
taken, never for a thread to come: so one thread is enough, and threads that are busy elsewhere hold up nobody.
"""

from max.runtime.asyncrt import parallelism_level
from std.atomic import Atomic
from std.os import getenv
from std.sys import llvm_intrinsic
from std.sys.info import CompilationTarget

comptime APART = 16  # Int64s between counters, so that no two share a cache line
comptime ENOUGH = 8  # shares for every thread
comptime COUNTERS = 2 * APART  # of a phase, of its pieces taken and of those done


@no_inline
def threads_asked_for() -> Int:
    """Returns for how many threads work is to be cut as the environment's MAXWHISPER_THREADS says, by which tests have
    it cut as on other machines; 0 if it says nothing."""
    var asked = getenv("MAXWHISPER_THREADS")
    if asked:
        try:
            return max(1, Int(asked))
        except:
            pass
    return 0


@no_inline
def thread_count() -> Int:
    """Returns for how many threads work is cut: for as many as MAX has, or as are asked for."""
    var asked = threads_asked_for()
    return asked if asked > 0 else parallelism_level(None)


@no_inline
def task_count(n_piece: Int, worth: Int) -> Int:
    """Returns how many tasks some pieces of work are, which are worth so many: as many as there are threads at most, and
    of threads that are asked for as many, whatever the work is worth."""
    var asked = threads_asked_for()
    return max(1, min(n_piece, asked if asked > 0 else min(worth, parallelism_level(None))))


@always_inline
def pause():
    """Lets the processor's other thread, if it has one, use the time."""
    comptime if CompilationTarget.is_x86():
        llvm_intrinsic["llvm.x86.sse2.pause", NoneType]()


@always_inline
def phase[work: def(Int) capturing -> None](counters: Pointer[mut=True, Int64, _], number: Int, n_piece: Int):
    """Takes pieces of a phase until none is left, and returns when all are done.

    counters: COUNTERS zeros for each phase. work: is called with the number of every piece, once.
    """
    var taken = counters.unsafe_offset(number * COUNTERS)
    var done = taken.unsafe_offset(APART)
    while True:
        var piece = Int(Atomic[Int64].fetch_add(taken, 1))
        if piece >= n_piece:
            break
        work(piece)
        _ = Atomic[Int64].fetch_add(done, 1)
    while Int(Atomic[Int64].load(done)) < n_piece:
        pause()


def even_shares(n_piece: Int, most: Int) -> Int:
    """Returns into how many shares each of some pieces of work is to be cut, `most` at most: as few as give every
    thread as many shares, or else enough of them that one more or less is little."""
    var n_thread = thread_count()
    var n_share = 1
    while n_share < most and n_share * n_piece % n_thread != 0 and n_share * n_piece < ENOUGH * n_thread:
        n_share += 1
    return n_share
