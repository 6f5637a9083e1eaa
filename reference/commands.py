"""How the commands of `reference` end."""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from maxwhisper.errors import MaxWhisperError


def status(name: str, command: Callable[[], int]) -> int:
    """Returns the exit status of a command: its own; 1 after a MaxWhisperError, whose message is printed; 130 after
    Ctrl-C, as which SIGTERM counts."""
    signal.signal(signal.SIGTERM, terminated)  # to clean up
    try:
        return command()
    except MaxWhisperError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
