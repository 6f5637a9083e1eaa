"""What can be read once: standard input, named pipes, process substitutions and sockets."""

import os
import re
import select
import stat
import sys
import tempfile
from threading import Event

from .errors import AudioError

STANDARD_INPUT = "-"
"""The name that ffmpeg has for it, and so openai-whisper; a file of this name is ./-"""
DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,9})")

IN_MEMORY = 2**26
"""Bytes above which what came through a pipe is kept in a temporary file."""
AT_ONCE = 2**16
"""Bytes that are asked for at a time: as many as a pipe holds."""
PATIENCE = 100
"""Milliseconds between looks at whether anybody still wants what a pipe is waited for."""


def descriptor(name: str) -> int | None:
    """Returns the number of the open descriptor that a name stands for, None if it is another name."""
    if name in (STANDARD_INPUT, "/dev/stdin"):
        return 0
    found = DESCRIPTOR.fullmatch(name)
    return int(found[1]) if found else None


def status_of(name: str) -> os.stat_result | None:
    """Returns what the system knows of a file; None if there is no file of this name, or it may not be looked at."""
    number = descriptor(name)
    try:
        return os.stat(name) if number is None else os.fstat(number)
    except (OSError, ValueError):
        return None


def is_regular(name: str) -> bool:
    """Returns whether a name is that of a file that can be opened as often as one likes."""
    status = status_of(name)
    return status is not None and stat.S_ISREG(status.st_mode) and name != STANDARD_INPUT


def is_terminal(name: str) -> bool:
    number = descriptor(name)
    return number is not None and os.isatty(number)


def pipe_behind(name: str) -> tuple[int, int] | None:
    """Returns device and inode of a pipe or socket, the same by whatever name; None for anything else."""
    status = status_of(name)
    if status is None or not (stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
        return None
    return status.st_dev, status.st_ino


def not_a_file(name: str, kind: str) -> str:
    return f"{name}: is a {kind}: expected a file, or a pipe as in `cat talk.mp3 | maxwhisper transcribe -`"


def open_once(name: str) -> int | None:
    """Opens a new descriptor of what can be read once; None for files and for whatever else libav opens by its name.

    Raises AudioError for devices, most of which never end, and for a standard input that is closed.
    """
    number, status = descriptor(name), status_of(name)
    if name == STANDARD_INPUT and (status is None or sys.__stdin__ is None or sys.__stdin__.closed):
        raise AudioError(f"{name}: standard input is closed")
    if status is None or is_regular(name):
        return None
    if stat.S_ISCHR(status.st_mode):
        raise AudioError(not_a_file(name, "terminal" if is_terminal(name) else "device"))
    try:
        if number is not None:
            return os.dup(number)
        if stat.S_ISFIFO(status.st_mode):
            return os.open(name, os.O_RDONLY | os.O_NONBLOCK)  # or it would wait, deaf, for somebody to write
    except OSError as error:
        raise AudioError(f"{name}: cannot be read: {error.strerror}") from error
    return None


class Pipe:
    """What comes out of a descriptor, which it closes, as a file in which libav can seek: all that has come is kept.

    In libav's C an exception would be lost: libav is told that the file ends, and the end of the `with` block raises.
    """

    def __init__(self, source: str, descriptor: int, stopped: Event):
        self.source, self.descriptor, self.stopped = source, descriptor, stopped
        self.kept = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
        self.position = self.length = 0
        self.ended = False
        self.error: BaseException | None = None

    def __enter__(self) -> "Pipe":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
        self.kept.close()
        if self.error is not None:
            raise self.error
        if self.ended and not self.length:
            raise AudioError(f"{self.source}: nothing came through it")

    def read(self, n: int) -> bytes:
        """Returns the bytes from the position on: n of them, or as many as there are up to the end."""
        self._receive(self.position + n)
        if self.error:
            return b""
        self.kept.seek(self.position)
        data = self.kept.read(n)
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Sets the position; from the end, after having waited for it."""
        if whence == os.SEEK_END:
            self._receive(sys.maxsize)
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(origin + offset, 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def _receive(self, length: int) -> None:
        """Waits until as many bytes have come, or the end."""
        try:
            while self.length < length and not self.ended:
                data = self._next()
                self.ended = not data
                self.length += len(data)
                self._keep(data)
        except BaseException as error:
            self.error, self.ended = error, True

    def _keep(self, data: bytes) -> None:
        try:
            self.kept.seek(0, os.SEEK_END)
            self.kept.write(data)
        except OSError as error:
            reason = error.strerror or error
            raise AudioError(f"{self.source}: cannot be kept in a temporary file: {reason}") from error

    def _next(self) -> bytes:
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        while True:
            if self.stopped.is_set():
                raise AudioError(f"{self.source}: was not read to its end")
            try:
                if poll.poll(PATIENCE):
                    return os.read(self.descriptor, AT_ONCE)
            except BlockingIOError:  # what was there has been read by another process
                continue
            except OSError as error:
                raise AudioError(f"{self.source}: cannot be read: {error.strerror}") from error
