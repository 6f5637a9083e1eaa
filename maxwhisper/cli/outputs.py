"""The output files of `maxwhisper transcribe`: the names and texts of OpenAI's; each is complete or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EXDEV
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


@contextmanager
def unfinished(output_dir: str) -> Iterator[str]:
    """Gives a folder in `output_dir` for files that are being written; raises OptionError if there can be none."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".maxwhisper-", dir=output_dir, ignore_cleanup_errors=True)
    except OSError as error:
        raise OptionError(f"--output_dir {output_dir}: cannot be written to: {error.strerror or error}") from error
    with folder:
        yield folder.name


def write(result: dict[str, Any], audio: str, output_dir: str, output_format: str, layout: dict[str, Any]) -> list[str]:
    """Writes the output files of one audio file, each of which appears when it is complete.

    Returns a line for each that cannot be written, with its name and the reason; the others are written all the same.
    Raises OptionError if none can be.
    """
    failures: list[str] = []
    complete: dict[str, str] = {}
    with unfinished(output_dir) as folder:
        for ending in FORMATS if output_format == "all" else (output_format,):
            target = os.path.join(output_dir, f"{output_name(audio)}.{ending}")
            file = os.path.join(folder, f"complete.{ending}")
            with noted(target, failures), removed_on_failure(file):
                Path(file).write_text(contents(result, ending, layout), encoding="utf-8")
                complete[target] = file
        for target, file in complete.items():
            with noted(target, failures):
                replace(file, target)
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


@contextmanager
def removed_on_failure(file: str) -> Iterator[None]:
    """Removes a file that is not complete: on a full disk others may have room where a part of it was."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.remove(file)
        raise


def replace(file: str, target: str) -> None:
    """Puts a file in the place of another, or of what a link there leads to, with its permissions; raises OSError where
    OpenAI's command could not write that one either."""
    target = os.path.realpath(target)
    if os.path.isfile(target):
        if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise OSError(EACCES, os.strerror(EACCES))
        with suppress(OSError):  # of a disk that has no permissions
            shutil.copymode(target, file)
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != EXDEV:
            raise
        with replacing(Path(target)) as unfinished:  # a link leads to another disk
            shutil.copy(file, unfinished)
