"""What a comparison has found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Piece:
    """Text of one recording, as an engine made it known. seconds: from the start of the first recording's transcription
    until it was there."""

    recording: int
    seconds: float
    text: str


@dataclass
class Row:
    """An engine. What was not measured is None, or an empty list.

    error: why it failed, in one line. not_installed: packages to install first. load_s: from the first import to a
    model that is ready. Each list has one entry per round: encode_s of one window of 30 s, token_s of one token in a
    text of a fixed number, both also between events on a device, total_s of all recordings. peak_bytes: resident memory
    after everything was transcribed once. pieces: what was known when, in each round. tokens: all that were produced,
    timestamps among them. agreement, wer: to PyTorch Whisper's transcript; the former of text tokens. wer_text: to the
    known text.
    """

    name: str
    note: str
    versions: dict[str, str | None]
    not_installed: list[str] = field(default_factory=list)
    error: str = ""
    load_s: float | None = None
    encode_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    encode_device_s: list[float] = field(default_factory=list)
    token_device_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    pieces: list[list[Piece]] = field(default_factory=list)
    peak_bytes: int | None = None
    tokens: int | None = None
    agreement: float | None = None
    wer: float | None = None
    wer_text: float | None = None
    texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """What a comparison has found.

    model, options: what all engines got. recordings: name, seconds, text where it is known, and what PyTorch Whisper
    heard. audio_s: seconds of all recordings.
    """

    model: str
    options: dict[str, Any]
    machine: dict[str, Any]
    recordings: list[dict[str, Any]]
    audio_s: float
    rows: list[Row]

    @property
    def failed(self) -> bool:
        return any(row.error for row in self.rows)


def middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None
