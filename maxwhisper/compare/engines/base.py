"""What every engine can be asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line lists engines, and must not take the time to import this
    import numpy as np


@dataclass(frozen=True)
class Task:
    """The decoding options that all engines share; tokens are numbers of OpenAI's vocabulary.

    beam_size: None is greedy. batch_size: windows that decode together, where the row is one of batches. prompt: what a
    text without timestamps begins with. suppress: tokens that are never written, OpenAI's default list.
    suppress_first: those that are not written first. eot: the token that ends a text. device: "cpu" or "gpu".
    artifacts: a folder that maxwhisper's graphs come from.
    """

    beam_size: int | None
    batch_size: int
    threads: int
    prompt: list[int]
    suppress: list[int]
    suppress_first: list[int]
    eot: int
    device: str
    artifacts: str | None = None


class Engine(ABC):
    """One way to run Whisper. A process makes one of these, and `load` is the first call."""

    def __init__(self, variant: str, task: Task):
        self.variant, self.task = variant, task

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads the converted checkpoint in `folder`."""

    @abstractmethod
    def encode(self, mel: "np.ndarray") -> Any:
        """Returns the features of one window, from float32 (n_mels, 3000), as `generate` takes them."""

    @abstractmethod
    def generate(self, features: Any, n_tokens: int) -> list[int]:
        """Returns exactly `n_tokens` tokens after the prompt, `eot` suppressed, or raises NotImplementedError."""

    def windows(self, mels: "np.ndarray", n_tokens: int) -> list[list[int]]:
        """Generates as `generate` does, for each of (window, n_mels, 3000)."""
        return [self.generate(self.encode(mel), n_tokens) for mel in mels]

    @abstractmethod
    def transcribe(self, audio: "np.ndarray", language: str, tell: Callable[[list[int]], None]) -> None:
        """Tells all tokens of a recording, float32 (samples,) at 16 kHz, with timestamps and one temperature, 0: as
        many at a time as the engine makes known, as soon as it does."""

    def generate_batch(self, mels: "np.ndarray", n_tokens: int) -> list[list[int]]:
        """Encodes and generates, of windows (window, n_mels, 3000) that are computed at once."""
        raise NotImplementedError

    def transcribe_fixed(self, audio: "np.ndarray", n_tokens: int) -> list[int]:
        """Transcribes as `transcribe` does, but `n_tokens` for every 30 s, without timestamps, and each text without
        those before."""
        raise NotImplementedError

    def detect_language(self, mel: "np.ndarray") -> str:
        """Returns the code of the language in a window; only PyTorch Whisper is asked."""
        raise NotImplementedError

    def batches(self, mels: "np.ndarray") -> "list[np.ndarray]":
        """Returns the windows that decode together, each (at most batch_size, n_mels, 3000)."""
        return [mels[start : start + self.task.batch_size] for start in range(0, len(mels), self.task.batch_size)]

    def synchronize(self) -> None:  # noqa: B027
        """Waits until the device has done what it was given; for most, every call does."""

    def event(self) -> Any:
        """Puts an event on the queue of a GPU, with `elapsed_time` in ms to a later one; None for most."""
        return None

    def prepare(self, folder: Path) -> None:  # noqa: B027
        """Does what is to be done once, before loading is timed; nothing for most."""
