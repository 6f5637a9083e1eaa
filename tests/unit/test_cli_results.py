"""Which file a result is written for, what is said of one that fails, and options at their limits: without a model."""

import logging
from pathlib import Path
from typing import Any

import pytest

from maxwhisper.cli import build_parser, transcribe_command
from maxwhisper.cli.terminal import messages_on_stderr
from maxwhisper.cli.transcribe_command import temperatures
from maxwhisper.cli.transcribe_options import unusable
from maxwhisper.errors import DecodingError, OptionError

from .command import RESULT, StubModel, status


def transcribed(found: list[tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Returns the status of the command on a, b and c, of which results come in this order."""
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: StubModel())
    monkeypatch.setattr(transcribe_command, "transcripts", lambda *_: iter(found))
    files = [tmp_path / f"{name}.mp3" for name in "abc"]
    return status(["transcribe", *files, "-o", tmp_path / "out", "-f", "txt", *options])


def said(text: str) -> dict[str, Any]:
    return RESULT | {"segments": [RESULT["segments"][0] | {"text": text}]}


def test_a_result_is_written_for_its_own_file_in_whatever_order_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(2, said("of c")), (0, said("of a")), (1, said("of b"))]
    assert transcribed(found, tmp_path, monkeypatch) == 0
    assert {file.stem: file.read_text() for file in (tmp_path / "out").iterdir()} == {n: f"of {n}\n" for n in "abc"}


def test_every_failure_names_its_file_once_and_is_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (tmp_path / f"{name}.mp3" for name in "abc")
    found = [(1, OptionError(f"{b}: is a folder")), (0, said("of a")), (2, DecodingError("logits are not finite"))]
    assert transcribed(found, tmp_path, monkeypatch) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"maxwhisper: error: {b}: is a folder",
        f"maxwhisper: error: {c}: logits are not finite",
    ]
    assert (tmp_path / "out" / "a.txt").read_text() == "of a\n"


@pytest.mark.parametrize(("before", "inside"), [(logging.DEBUG, logging.DEBUG), (logging.ERROR, logging.INFO)])
def test_who_wants_to_know_more_is_told_more(before: int, inside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("maxwhisper")
    monkeypatch.setattr(log, "level", before)
    with messages_on_stderr():
        assert log.level == inside
    assert log.level == before


@pytest.mark.parametrize(
    ("first", "increment", "expected"),
    [
        (0.0, 0.2, 6),
        (0.0, 0.25, 5),
        (0.5, 0.25, 3),
        (1.0, 0.2, 1),
        (1.5, 0.2, 1),
        (0.0, None, 1),
    ],
)
def test_temperatures_go_up_to_one(first: float, increment: float | None, expected: int) -> None:
    found = temperatures(first, increment)
    assert len(found) == expected and found[0] == first


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ([], ""),
        (["--length_penalty", "0"], ""),
        (["--length_penalty", "1"], ""),
        (["--length_penalty", "1.01"], "--length_penalty"),
        (["--temperature", "0"], ""),
        (["--temperature", "-0.1"], "--temperature"),
        (["--best_of", "1"], ""),
        (["--best_of", "0"], "--best_of"),
        (["--patience", "0"], "--patience"),
        (["--patience", "2", "--beam_size", "None"], "--patience"),
        (["--patience", "2", "--beam_size", "None", "--temperature", "0.5"], ""),
        (["--clip_timestamps", "0,5"], ""),
        (["--clip_timestamps", "0,-0.5"], "--clip_timestamps"),
        (["--clip_timestamps", "0.0", "--batched"], ""),
        (["--clip_timestamps", "", "--vad_filter", "True"], ""),
        (["--clip_timestamps", "0,5", "--batched"], "--clip_timestamps"),
        (["--clip_timestamps", "1", "--vad_filter", "True"], "--clip_timestamps"),
        (["--suppress_tokens=-1,0"], ""),
        (["--suppress_tokens", "-2"], "--suppress_tokens"),
        (["--threads", "0"], ""),
        (["--threads", "-1"], "--threads"),
        (["--max_line_width", "1", "--word_timestamps", "True"], ""),
        (["--max_line_width", "0", "--word_timestamps", "True"], "--max_line_width"),
        (["--max_line_width", "1"], "--max_line_width"),
    ],
)
def test_an_option_at_its_limit_is_usable(given: list[str], wrong: str) -> None:
    options = vars(build_parser().parse_args(["transcribe", "a.mp3", *given]))
    found = unusable(options)
    assert (found is None) == (not wrong) and wrong in (found or "")
