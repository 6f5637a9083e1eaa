"""The report of a run: a page to look at, its data, and a summary for a CI job.

report.html is one self-contained page that opens from disk; report.json is described in docs/report.md; summary.md is
Markdown for GITHUB_STEP_SUMMARY. All three are renderings of a Run, and say nothing that is not in it.
"""

import os
from pathlib import Path

from ..results import Run, environment
from .data import as_json
from .page import page
from .summary import summary


class ReportError(OSError):
    """A report that cannot be written; the message names the folder or the file and says why."""


def write(run: Run, folder: Path) -> None:
    """Makes the folder and writes report.html, report.json and summary.md into it.

    Every file is whole or is not there: all are rendered before the first one is written, and each takes its name only
    when it is complete. Raises ReportError where the folder cannot be made or written to.
    """
    machine = environment()
    texts = {
        "report.html": page(run, machine),
        "report.json": as_json(run, machine),
        "summary.md": summary(run, machine),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"the folder of the report, {folder}, cannot be made: {error.strerror}") from error
    for name, text in texts.items():
        write_whole(folder / name, text)


def write_whole(path: Path, text: str) -> None:
    """Writes the file under a temporary name beside it, then renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
