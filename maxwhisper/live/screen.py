"""Text as it comes: on a terminal, where what may change is dim and does; elsewhere as lines, which stay."""

import sys
from itertools import pairwise
from typing import Protocol
from unicodedata import combining, east_asian_width

DIM, PLAIN, ANEW = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
WIDE_ENDS = "。？！"
ENDS = f".?!{WIDE_ENDS}"
LONGEST = 120
"""Characters after which a line ends without the end of a sentence."""


class Screen(Protocol):
    """Shows text."""

    def show(self, settled: str, tentative: str) -> None:
        """Shows all text that is settled so far, and what may follow it."""

    def close(self) -> None:
        """Ends the last line."""


class Lines:
    """Prints settled text, a sentence a line."""

    def __init__(self) -> None:
        self.printed = 0
        self.left = ""

    def show(self, settled: str, tentative: str) -> None:
        """Prints the lines that are complete, as `Screen` has it."""
        self.left = settled[self.printed :]
        while end := end_of_line(self.left):
            self._print(end)

    def close(self) -> None:
        """Prints what is left."""
        if self.left.strip():
            self._print(len(self.left))

    def _print(self, end: int) -> None:
        print(self.left[:end].strip(), flush=True)
        self.printed += end
        self.left = self.left[end:]


def end_of_line(text: str) -> int:
    """Returns how much of a text is a line of its own; 0 as long as more belongs to it."""
    for at, (character, following) in enumerate(pairwise(text)):
        if character in ENDS and (following.isspace() or character in WIDE_ENDS and following not in ENDS):
            return at + 1
        if at >= LONGEST and character == " ":
            return at
    return len(text) if text.endswith(tuple(ENDS)) else 0


class Terminal:
    """Writes over its last line as text changes; a line that is full stays."""

    def __init__(self, width: int):
        """Takes the width of the terminal, in characters."""
        self.width = width
        self.done = 0

    def show(self, settled: str, tentative: str) -> None:
        """Writes the last line anew, as `Screen` has it."""
        line = settled[self.done :].lstrip()
        while cells(line) >= self.width:
            end = fitting(line, self.width - 1)
            end = line.rfind(" ", 0, end) if " " in line[:end] else end
            sys.stdout.write(f"{ANEW}{line[:end]}\n")
            line = line[end:].lstrip()
        self.done = len(settled) - len(line)
        tentative = tentative if line else tentative.lstrip()
        room = self.width - 1 - cells(line)
        sys.stdout.write(f"{ANEW}{line}{DIM}{tentative[: fitting(tentative, room)]}{PLAIN}")
        sys.stdout.flush()

    def close(self) -> None:
        """Goes to the next line."""
        sys.stdout.write("\n")
        sys.stdout.flush()


def cells(text: str) -> int:
    """Returns how many columns a text takes."""
    return sum(0 if combining(each) else 2 if east_asian_width(each) in "WF" else 1 for each in text)


def fitting(text: str, width: int) -> int:
    """Returns how many characters of a text have room in as many columns."""
    end = len(text)
    while cells(text[:end]) > width:
        end -= 1
    return end
