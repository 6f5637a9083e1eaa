"""Every error that maxwhisper raises on purpose, and how it warns.

The command line prints the message of any of them as one line and exits with status 1.
"""

import warnings
from functools import cache


class MaxWhisperError(Exception):
    """Base of all errors that maxwhisper raises on purpose; its message is one line for the user."""


class ArtifactError(MaxWhisperError):
    """Graphs compiled ahead of time that cannot be used; the message names the folder, the field, and both values."""


class AudioError(MaxWhisperError, RuntimeError):
    """A file that cannot be read as audio; the message names the file. A RuntimeError, as openai-whisper's."""


class CheckpointError(MaxWhisperError, RuntimeError):
    """A checkpoint that cannot be used; the message names the file and, where there is one, the tensor. A RuntimeError,
    as openai-whisper's."""


class DecodingError(MaxWhisperError):
    """Logits that no text can be decoded from: NaN, or all excluded by the rules."""


class DeviceError(MaxWhisperError):
    """A device that is absent, or a precision that the device cannot compute."""


class OptionError(MaxWhisperError):
    """An option whose value cannot be used; the message names the option and what it accepts."""


@cache
def warn_once(message: str) -> None:
    """Gives a UserWarning of one line, once per message in a process."""
    warnings.warn(message, UserWarning, stacklevel=2)
