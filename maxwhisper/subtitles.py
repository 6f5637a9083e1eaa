"""What is in output files, subtitles of any text among them: openai-whisper's writers take it that none holds anything
of the files' syntax."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

FORMATS = ("txt", "vtt", "srt", "tsv", "json")
"""Endings of output files, in openai-whisper's order."""
STAND_INS = {ord(character): 0xDC00 + ord(character) for character in "&<>"}
"""For openai-whisper's writers to measure lines, and to add tags, by characters that no text holds: lone surrogates."""
SYNTAX: dict[str, dict[int, str]] = {
    "vtt": {STAND_INS[ord("&")]: "&amp;", STAND_INS[ord("<")]: "&lt;", STAND_INS[ord(">")]: ">"},
    "srt": {stand_in: chr(character) for character, stand_in in STAND_INS.items()},
}
"""What each format has for what STAND_INS stand for."""
ARROW = re.compile(f"--+{chr(STAND_INS[ord('>')])}")
"""What a text must not hold: a reader would take its line for one of times."""


def contents(result: dict[str, Any], ending: str, layout: dict[str, Any]) -> str:
    """Returns what is in the output file with that ending: what openai-whisper writes, but for what would be taken for
    the syntax of subtitles."""
    from whisper.utils import get_writer  # imports PyTorch

    written = io.StringIO()
    subtitles = ending in SYNTAX
    get_writer(ending, "").write_result(as_cues(result) if subtitles else result, file=written, options=layout)
    return in_syntax(written.getvalue(), ending) if subtitles else written.getvalue()


def as_line(segment: dict[str, Any]) -> str:
    """Returns a segment as openai-whisper prints it."""
    from whisper.utils import format_timestamp  # imports PyTorch

    return f"[{format_timestamp(segment['start'])} --> {format_timestamp(segment['end'])}] {segment['text']}"


def as_cues(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the result with what becomes a cue alone, each text on one line and with STAND_INS."""
    segments = result["segments"]
    if segments and "words" in segments[0]:
        cues = [segment | {"words": list(with_text(segment["words"]))} for segment in segments]
    else:
        cues = [segment | {"text": one_line(segment["text"])} for segment in segments if segment["text"].strip()]
    return result | {"segments": cues}


def with_text(words: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the words that have a text; what is none goes before the next one."""
    blank = ""
    for word in words:
        text = blank + one_line(word["word"])
        if text.strip():
            yield word | {"word": text}
        blank = "" if text.strip() else text


def one_line(text: str) -> str:
    return re.sub(r"\s*[\r\n]\s*", " ", text).translate(STAND_INS)


def in_syntax(written: str, ending: str) -> str:
    """Returns what a writer made of `as_cues` as the format has it. "-->" becomes "->", as openai-whisper writes it
    where there are no words."""
    return ARROW.sub(f"-{chr(STAND_INS[ord('>')])}", written).translate(SYNTAX[ending])
