"""A comparison as a race: for each engine the words of its transcript, when they were there, and which of them are
wrong."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer

from ...errors import OptionError
from ..scores import normalizer

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What a terminal takes for orders, and XML for an error: a record may be somebody else's."""

RIGHT, WRONG, MISSING = "right", "wrong", "missing"


@dataclass(frozen=True)
class Word:
    """A word of a transcript, or one that it lacks.

    seconds: from the start of transcribing until the word was there. mark: RIGHT; WRONG, where other words were said,
    or none; MISSING, of what was said.
    """

    seconds: float
    text: str
    mark: str


@dataclass(frozen=True)
class Lane:
    """An engine. total_s: of the round that is shown, the median one. wer: to what the race holds words against, 0 to
    1; None if that has no words."""

    name: str
    total_s: float
    wer: float | None
    words: list[Word]

    def at(self, seconds: float) -> list[Word]:
        """Returns the words that are there after so many seconds."""
        return [word for word in self.words if word.seconds <= seconds]


@dataclass(frozen=True)
class Race:
    """A race of engines.

    model, machine: as of `compare`. recording: its name. audio_s: its seconds. against: what words are held against, in
    a few words. lanes: the fastest first.
    """

    model: str
    machine: str
    recording: str
    audio_s: float
    against: str
    lanes: list[Lane]

    @property
    def total_s(self) -> float:
        """Returns when the last engine is done."""
        return max(lane.total_s for lane in self.lanes)


def read_record(path: Path) -> dict[str, Any]:
    """Returns what `maxwhisper compare --json` wrote.

    Raises OptionError if the file cannot be read, or is none of these.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"{path}: cannot be read as what `maxwhisper compare --json` writes: {error}") from error
    if not isinstance(record, dict) or not {"rows", "recordings", "audio_s", "machine"} <= set(record):
        raise OptionError(f"{path}: expected what `maxwhisper compare --json` writes, it is other JSON")
    return record


def race_of(record: dict[str, Any], name: str) -> Race:
    """Returns the race that a record holds.

    record: what `compare` returns, as a dict. name: of the file, for errors. Raises OptionError for a record of several
    recordings, of tokens in place of transcripts, and for one that is not whole.
    """
    try:
        return raced(record, name)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{name}: is not whole: expected what `maxwhisper compare --json` writes") from error


def raced(record: dict[str, Any], name: str) -> Race:
    if len(record["recordings"]) != 1:
        raise OptionError(f"{name}: expected the record of one recording, it has {len(record['recordings'])}")
    rows = [row for row in record["rows"] if row.get("pieces")]
    if not rows or record["options"].get("tokens") is not None:
        raise OptionError(f"{name}: no engine in it says when its words were there: expected a record without --tokens")
    [recording], options = record["recordings"], record["options"]
    known = recording["text"]
    expected = printable(recording["pytorch"] if known is None else known)
    normalize = normalizer(options["languages"][0])
    machine = record["machine"]
    lanes = [lane_of(row, expected, normalize) for row in rows]
    return Race(
        model=printable(record["model"]),
        machine=printable(f"{machine.get('gpu') or machine['processor']}, {options['threads']} threads"),
        recording=printable(recording["name"]),
        audio_s=float(record["audio_s"]),
        against="PyTorch Whisper's transcript" if known is None else "what was said",
        lanes=sorted(lanes, key=lambda lane: lane.total_s),
    )


def printable(text: str) -> str:
    return CONTROL.sub(" ", text)


def lane_of(row: dict[str, Any], expected: str, normalize: Callable[[str], str]) -> Lane:
    """Returns the lane of a row of `compare`, as it ran in its median round."""
    totals = row["total_s"]
    middle = sorted(range(len(totals)), key=totals.__getitem__)[(len(totals) - 1) // 2]
    if not (total := float(totals[middle])) > 0:
        raise ValueError(f"a time of {total} s")
    timed = [
        (float(piece["seconds"]), word) for piece in row["pieces"][middle] for word in printable(piece["text"]).split()
    ]
    said, heard = (normalize(text).strip() for text in (expected, " ".join(word for _, word in timed)))
    return Lane(
        name=printable(str(row["name"])),
        total_s=total,
        wer=jiwer.wer(said, heard) if said else None,
        words=list(marked(timed, expected.split(), normalize)),
    )


def marked(
    timed: Sequence[tuple[float, str]], expected: Sequence[str], normalize: Callable[[str], str]
) -> Iterator[Word]:
    """Yields the words of a transcript, each with its seconds, and those that it lacks, where they are missing."""
    # Aligned by what is left of each word: a case or a comma is no difference, and nothing is left of a sound.
    sides = [[normalize(word).replace(" ", "") for word in side] for side in (expected, [word for _, word in timed])]
    indices = [[i for i, word in enumerate(side) if word] for side in sides]
    said, heard = (" ".join(side[i] for i in at) for side, at in zip(sides, indices, strict=True))
    wrong: set[int] = set()
    lost: dict[int, list[str]] = {}
    for chunk in jiwer.process_words(said, heard).alignments[0]:
        if chunk.type == "equal":
            continue
        theirs = indices[0][chunk.ref_start_idx : chunk.ref_end_idx]
        ours = indices[1][chunk.hyp_start_idx : chunk.hyp_end_idx]
        wrong.update(ours)
        before = indices[1][chunk.hyp_start_idx] if chunk.hyp_start_idx < len(indices[1]) else len(timed)
        lost.setdefault(before, []).extend(expected[i] for i in theirs)
    for i in range(len(timed) + 1):
        seconds = timed[min(i, len(timed) - 1)][0] if timed else 0.0
        yield from (Word(seconds, text, MISSING) for text in lost.get(i, ()))
        if i < len(timed):
            yield Word(*timed[i], WRONG if i in wrong else RIGHT)
