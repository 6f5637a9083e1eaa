"""The report of a run: a page to look at, its data, and a summary for a CI job.

report.html is one self-contained page that opens from disk; report.json is described in docs/report.md; summary.md is
Markdown for GITHUB_STEP_SUMMARY. All three are renderings of a Run, say nothing that is not in it, and do not need each
other.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from maxwhisper.files import replacing

from ..reasons import one_line
from ..results import Run, environment
from .attempts import Attempts
from .data import as_json
from .page import page
from .summary import summary


class ReportError(OSError):
    """A report of which a file is missing; the message is one line that names the folder or each such file, and why."""


def write(run: Run, folder: Path) -> None:
    """Makes the folder and writes report.html, report.json and summary.md into it.

    Every file is whole or is not there, whatever becomes of the others: each takes its name only when it is complete,
    and what an earlier run left under the name of one that fails is removed. What had to be left out of the page, for
    instance its charts where matplotlib is missing, becomes a note of the run.

    Raises ReportError, once everything else is written, where the folder cannot be made or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"the folder of the report, {folder}, cannot be made: {error.strerror}") from error
    machine, attempts = environment(), Attempts()
    renderings: dict[str, Callable[[], str]] = {  # the smallest first, while there is room on the disk
        "summary.md": lambda: summary(run, machine),
        "report.json": lambda: as_json(run, machine),
        "report.html": lambda: page(run, machine, attempts),
    }
    missing = [line for name, text in renderings.items() if (line := not_written(folder / name, text))]
    for line in attempts.failed:
        run.note(f"{folder / 'report.html'}: {line}")
    if missing:
        raise ReportError("; ".join(missing))


def not_written(path: Path, text: Callable[[], str]) -> str | None:
    """Writes the file; returns why that failed, if it did."""
    try:
        with replacing(path) as unfinished:
            # A path or an option may hold bytes that are no text.
            unfinished.write_text(text(), encoding="utf-8", errors="backslashreplace")
    except Exception as error:
        earlier = remains(path)
        why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        return f"{path} cannot be written: {why}{', and an earlier one cannot be removed' if earlier else ''}"
    return None


def remains(path: Path) -> bool:
    """Removes the file; returns whether it is still there."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return path.exists()
