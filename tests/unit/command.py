"""The command line in this process, with a model that knows what is said."""

import argparse
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maxwhisper.cli import build_parser, main
from reference.fixtures import FIXTURES

CLIP = FIXTURES / "clips" / "english-1.wav"

WORDS = [{"word": " Hello", "start": 0.0, "end": 0.5, "probability": 0.9}]
RESULT: dict[str, Any] = {
    "text": " Hello there.",
    "segments": [{"id": 0, "start": 0.0, "end": 1.5, "text": " Hello there.", "words": WORDS}],
    "language": "en",
}


class StubModel:
    """Knows what is said in any audio."""

    is_multilingual, num_languages = True, 99
    dims = SimpleNamespace(n_vocab=51865, n_text_ctx=448)
    stepper = SimpleNamespace(max_candidates=None, tokens_first=False, searches=False)

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def stepping_by(self, stepper: Any, decode: Any = None) -> "StubModel":
        return self

    def transcribe(self, audio: np.ndarray, **options: Any) -> dict[str, Any]:
        assert audio.ndim == 1
        self.calls.append(options)
        return RESULT


def write_wav(path: Path, samples: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(2 * samples))
    return path


def status(arguments: list[Any]) -> int:
    """Returns the exit status of the command, however it ends."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def options_of(command: str) -> set[str]:
    """Returns the options that a command has."""
    commands = next(each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return {name for each in commands.choices[command]._actions for name in each.option_strings if name[:2] == "--"}


def assert_one_line(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("maxwhisper: error: ") and expected in error and "Traceback" not in error
    assert error.endswith("\n") and error.count("\n") == 1
