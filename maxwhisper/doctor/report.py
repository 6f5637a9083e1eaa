"""What the doctor reports: rows, a summary of them, and both as text and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .. import __version__

JSON_VERSION = 2
"""Raised when a field goes or changes its meaning."""


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    state: "ok"; "red" if it keeps a GPU from being used, or if its probe failed; "note" if it is unknown or missing and
        MAX does without.
    found: what is there, in one line.
    remedy: what to do about it, if it is red.
    data: the same for machines. Sizes are in bytes; what is not known is null.
    """

    check: str
    state: Literal["ok", "note", "red"]
    found: str
    remedy: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All rows; what comes first can be the cause of what comes after."""

    rows: tuple[Row, ...]

    @property
    def red(self) -> list[Row]:
        return [row for row in self.rows if row.state == "red"]

    @property
    def summary(self) -> str:
        if not self.red:
            return "MAX and PyTorch see the GPU, and the CUDA libraries load."
        if any(row.check in ("driver", "GPU") for row in self.red):
            return "There is no NVIDIA GPU that can be used here: --device gpu fails, --device cpu does not need one."
        return "The GPU is there, but --device gpu cannot be relied on until what is red is put right."

    def text(self) -> str:
        """Returns a table, the summary, and what to do about the red rows."""
        table = [("check", "state", "found"), *((row.check, row.state, row.found) for row in self.rows)]
        width = max(len(check) for check, _, _ in table)
        lines = [f"{check:{width}}  {state:5}  {found}" for check, state, found in table]
        lines += ["", self.summary]
        if self.red:
            lines += ["", "What to do about the red rows, from the top, as one can be the cause of those below it:"]
        for remedy in dict.fromkeys(row.remedy for row in self.red):
            lines.append(f"- {', '.join(row.check for row in self.red if row.remedy == remedy)}: {remedy}")
        return "\n".join(lines)

    def json(self) -> str:
        head = {"version": JSON_VERSION, "maxwhisper": __version__, "ok": not self.red, "summary": self.summary}
        return json.dumps({**head, "rows": [asdict(row) for row in self.rows]}, indent=2)
