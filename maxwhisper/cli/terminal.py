"""What commands say: results on standard output, and one line for each message on standard error."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

log = logging.getLogger("maxwhisper")

ORDERS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What changes how a terminal shows what follows: a name of a file may be somebody else's."""


def failed(message: str) -> int:
    """Prints what failed, and returns the exit status."""
    print("maxwhisper: error:", one_line(message), file=sys.stderr)
    return 1


def one_line(message: object) -> str:
    """Returns a message as standard error can show it, whatever is in the names of files."""
    return shown(" ".join(str(message).split())).encode(errors="backslashreplace").decode()


def shown(text: str) -> str:
    """Returns a text with orders to a terminal as Python writes them."""
    return ORDERS.sub(lambda order: ascii(order[0])[1:-1], text)


class Line(logging.Formatter):
    """A message in one line; what was raised, if that is told too, stands below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return f"maxwhisper: {one_line(record.message)}"


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Has log messages and warnings go to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Line())
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.propagate = False  # to what a library may have given the root logger
    log.setLevel(min(level or logging.INFO, logging.INFO))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: log.warning("warning: %s", message)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate


class StandardStream:
    """Standard output or standard error, as long as somebody takes it. Then `error` holds the reason, and what more is
    written is lost: the command goes on, to the files that it has still to write.

    What the stream's encoding has not becomes question marks, as openai-whisper means it to be.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self._while_taken(self.stream.write, text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self._while_taken(self.stream.write, text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._while_taken(self.stream.flush)

    def _while_taken(self, do: Callable[..., object], *arguments: object) -> None:
        if self.error is not None:
            return
        try:
            do(*arguments)
        except OSError as error:
            self.error = error
            nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is still in the stream's buffer
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    @property
    def lost(self) -> str | None:
        """Says why something that was written is lost, if it is."""
        if isinstance(self.error, BrokenPipeError):
            return "standard output was closed"
        return f"standard output: {self.error.strerror or self.error}" if self.error else None


@contextmanager
def standard_streams() -> Iterator[StandardStream]:
    """Has everything printed go through a StandardStream, and gives that of standard output; where a standard stream is
    closed, nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    before = sys.stdout, sys.stderr
    output, errors = map(StandardStream, before)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, errors)
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
