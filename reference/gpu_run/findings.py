"""What a step has found, in one cell of the table, from what it has left on disk."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

LAST = re.compile(r"^=+ (.*\b(?:passed|failed|skipped|errors?|deselected)\b.*?) =+$", re.MULTILINE)
"""pytest's own last line."""


def found(kind: str, name: str, out: Path) -> str:
    """Returns what a step says, by the kind that its results are of: else the last line that it printed."""
    try:
        return KINDS[kind](name, out)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return last_line(name, out)


def log_of(name: str, out: Path) -> Path:
    return out / f"{name.replace(' ', '-')}.log"


def last_line(name: str, out: Path) -> str:
    lines = [line.strip() for line in log_of(name, out).read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith("$ ")), "")[:160]


def doctor(_: str, out: Path) -> str:
    rows = json.loads((out / "doctor.json").read_text())["rows"]
    red = [row["check"] for row in rows if row["state"] == "red"]
    gpus = [row["data"]["name"] for row in rows if row["check"].startswith("GPU") and "name" in row["data"]]
    return "; ".join([*gpus[:1], f"red: {', '.join(red)}" if red else "nothing red"])


def suite(name: str, out: Path) -> str:
    return LAST.findall(log_of(name, out).read_text(errors="replace"))[-1]


def speed(name: str, out: Path) -> str:
    report = json.loads((out / f"{name.replace(' ', '-')}.json").read_text())
    rows = report["rows"]
    cells = [engine(row, report["audio_s"]) for row in rows if row["total_s"] or row["error"]]
    if absent := dict.fromkeys(row["name"].split(" ")[0] for row in rows if row["not_installed"]):
        cells.append(f"not installed: {', '.join(absent)}")
    return "; ".join(cells)


def engine(row: dict[str, Any], audio_s: float) -> str:
    """Returns the figures of an engine: times real time, one window's encoder, one token; medians of its rounds."""
    if row["error"]:
        return f"{row['name']}: {row['error'][:80]}"
    figures = [f"{audio_s / median(row['total_s']):,.1f} x real time"]
    if row["encode_s"]:
        figures.append(f"encoder {median(row['encode_s']) * 1e3:.1f} ms")
    if row["token_s"]:
        figures.append(f"token {median(row['token_s']) * 1e3:.2f} ms")
    return f"{row['name']} {', '.join(figures)}"


def kernels(_: str, out: Path) -> str:
    report = json.loads((out / "kernels.json").read_text())
    rows = report["kernels"]
    longest = [f"{row['name'][:40]} {row['microseconds'] / 1000:.1f} ms in {row['calls']}" for row in rows[:3]]
    return "; ".join([f"{len(rows)} {report['of']}", *longest, *report["not_there"]])


KINDS: dict[str, Callable[[str, Path], str]] = {
    "log": last_line,
    "doctor": doctor,
    "suite": suite,
    "speed": speed,
    "kernels": kernels,
}
"""By kind of step."""
