"""The output files of `maxwhisper transcribe`: the names and texts of OpenAI's; each is complete or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..files import replacing
from ..pipes import STANDARD_INPUT
from ..subtitles import FORMATS, contents

WORD_OPTIONS = ("highlight_words", "max_line_count", "max_line_width", "max_words_per_line")


def output_name(audio: str) -> str:
    """Returns the name of an audio file's output files, without the ending.

    Standard input has the name that it has as /dev/stdin: most commands would take `-.txt` for an option.
    """
    return "stdin" if audio == STANDARD_INPUT else os.path.splitext(os.path.basename(audio))[0]


def make_folder(output_dir: str) -> None:
    """Makes the folder of output files; raises OptionError if there can be none in it."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=".maxwhisper-", dir=output_dir, ignore_cleanup_errors=True).cleanup()
    except OSError as error:
        raise OptionError(f"--output_dir {output_dir}: cannot be written to: {error.strerror or error}") from error


def write(result: dict[str, Any], audio: str, output_dir: str, output_format: str, layout: dict[str, Any]) -> list[str]:
    """Writes the output files of one audio file, each of which appears when it is complete.

    Returns a line for each that cannot be written, with its name and the reason; the others are written all the same.
    Raises OptionError if none can be.
    """
    make_folder(output_dir)
    failures: list[str] = []
    for ending in FORMATS if output_format == "all" else (output_format,):
        target = os.path.join(output_dir, f"{output_name(audio)}.{ending}")
        with noted(target, failures), replacing(Path(target)) as file:
            file.write_text(contents(result, ending, layout), encoding="utf-8")
            take_permissions(file, target)
    return failures


@contextmanager
def noted(target: str, failures: list[str]) -> Iterator[None]:
    """Adds what keeps a file from being written to the failures."""
    try:
        yield
    except OSError as error:
        failures.append(f"{target}: cannot be written: {error.strerror or error}")
    except Exception as error:  # one format must not take the others down
        failures.append(f"{target}: cannot be written: {type(error).__name__}: {error}")


def take_permissions(file: Path, target: str) -> None:
    """Gives a file the permissions of the one whose place it takes; raises OSError where OpenAI's command could not
    write that one either."""
    if os.path.isfile(target):
        if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise OSError(EACCES, os.strerror(EACCES))
        with suppress(OSError):  # of a disk that has no permissions
            shutil.copymode(target, file)
