"""What can be read once, for tests: pipes that somebody writes into, and what is put in the place of standard input."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread, Timer


def write_all(data: bytes, where: Path | int) -> None:
    """Writes for as long as somebody reads; `where` is a path, or a descriptor."""
    with suppress(BrokenPipeError), open(where, "wb", buffering=0) as file:
        for start in range(0, len(data), 2**16):
            file.write(data[start : start + 2**16])


def in_background(work: Callable[..., None], *arguments: object) -> None:
    Thread(target=work, args=arguments, daemon=True).start()


def fifo(path: Path, data: bytes) -> Path:
    """Returns a named pipe that gives these bytes to the first who opens it."""
    os.mkfifo(path)
    in_background(write_all, data, path)
    return path


def pipe(data: bytes) -> int:
    """Returns the descriptor of a pipe that gives these bytes."""
    reading, writing = os.pipe()
    in_background(write_all, data, writing)
    return reading


@contextmanager
def standard_input(descriptor: int) -> Iterator[None]:
    """Has the descriptor, which is closed at the end, in the place of this process's standard input."""
    before = os.dup(0)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


@contextmanager
def ctrl_c(after: float) -> Iterator[None]:
    """Sends this process what Ctrl-C sends, so many seconds from now. Where a shell has started it in the background
    Python would leave that unheard."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
