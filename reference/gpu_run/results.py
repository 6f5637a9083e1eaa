"""What a run leaves behind: a record, a table in Markdown, and an archive of all."""

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD, TABLE, ARCHIVE = "run.json", "table.md", "gpu-run.tar.gz"
OK, NO_TIME, INTERRUPTED = "ok", "not run: no time left", "interrupted"
COLUMNS = ("step", "result", "s", "limit s", "what it found")


@dataclass(frozen=True)
class Result:
    """A step. result: OK, "failed (STATUS)", "stopped at its limit", NO_TIME or INTERRUPTED. seconds, limit: what it
    took, and might have taken at most."""

    name: str
    result: str
    seconds: float = 0.0
    limit: float = 0.0
    found: str = ""


@dataclass(frozen=True)
class Record:
    """A run. commit: of the project, if that is known. started: by the clock of the machine."""

    minutes: float
    device: str
    machine: str
    commit: str
    started: str
    steps: tuple[Result, ...] = ()

    @property
    def succeeded(self) -> bool:
        return all(step.result == OK for step in self.steps)


def table(record: Record) -> str:
    """Returns the table of a run, under a line that says where it ran."""
    lines = [
        f"{record.started}, {record.machine}, --device {record.device}, --minutes {record.minutes:g},"
        f" commit {record.commit or 'not known'}",
        "",
        line(COLUMNS),
        "|---|---|---:|---:|---|",
        *(line(cells(each)) for each in record.steps),
    ]
    return "\n".join(lines) + "\n"


def cells(each: Result) -> list[str]:
    times = [f"{each.seconds:.0f}", f"{each.limit:.0f}"] if each.limit else ["", ""]
    return [each.name, each.result, *times, each.found]


def line(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|").replace("\n", " ") for value in values) + " |"


def write(record: Record, out: Path) -> None:
    """Writes record and table, each as a whole; they are on disk when this returns."""
    for name, text in ((RECORD, json.dumps(asdict(record), indent=1) + "\n"), (TABLE, table(record))):
        unfinished = out / f".{name}"
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(out / name)


def archive(out: Path) -> Path:
    """Puts all results into one file among them, in the place of an earlier one, and returns its path."""
    path, unfinished = out / ARCHIVE, out / f".{ARCHIVE}"
    with tarfile.open(unfinished, "w:gz", compresslevel=6) as file:
        for entry in sorted(out.iterdir()):
            if entry not in (path, unfinished):
                file.add(entry, f"gpu-run/{entry.name}")
    unfinished.replace(path)
    return path
