"""What commands say on a terminal, whatever is in the names of files."""

import logging
import warnings
from pathlib import Path

import pytest

from maxwhisper.cli.terminal import messages_on_stderr

from .command import StubModel, status, write_wav

ORDERS = "\x1b]0;\x07\x1b[31m\r\x9b2J\x7f\u202e"
"""What changes a terminal's title, colours and cursor, and has it show backwards what follows."""
SHOWN = r"talk\x1b]0;\x07\x1b[31m \x9b2J\x7f\u202e.wav"


def assert_no_orders(printed: str) -> None:
    assert not set(printed) & {character for character in ORDERS if not character.isprintable()}


def test_names_of_files_are_no_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: StubModel())
    file, missing = write_wav(tmp_path / f"talk{ORDERS}.wav", 1600), tmp_path / f"no-talk{ORDERS}.wav"
    assert status(["transcribe", file, missing, "-o", tmp_path / "out", "--batch_size", "2"]) == 1
    assert (tmp_path / "out" / f"talk{ORDERS}.txt").exists(), "what is written keeps its name"
    output, errors = capsys.readouterr()
    assert f"{SHOWN}:\n" in output and f"no-{SHOWN}: cannot be read" in errors
    assert_no_orders(output + errors)


def test_options_are_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--temprature", "--language", "--model_dir", "--suppress_tokens"):
        assert status(["transcribe", f"talk{ORDERS}", f"x/talk{ORDERS}", f"{option}={ORDERS}"]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("maxwhisper: error: ") and errors.count("\n") == 1
        assert_no_orders(errors)


def test_messages_are_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    with messages_on_stderr():
        logging.getLogger("maxwhisper").warning("%s:\ncompiling instead", f"talk{ORDERS}.wav")
        warnings.warn(f"talk{ORDERS}.wav: damaged", stacklevel=1)
    errors = capsys.readouterr().err
    assert errors == f"maxwhisper: {SHOWN}: compiling instead\nmaxwhisper: warning: {SHOWN}: damaged\n"


def test_names_in_any_script_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "m\u00fc\u4f60\u597d \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469"
    with messages_on_stderr():
        logging.getLogger("maxwhisper").warning(name)
    assert capsys.readouterr().err == f"maxwhisper: {name}\n"
