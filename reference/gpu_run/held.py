"""Which artifacts are there, by the manifests that `maxwhisper compile` and `make compile-gate` have written."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = {"fixture": (128, 2, 3), "tiny": (384, 4, 4), "turbo": (1280, 32, 4), "large-v3": (1280, 32, 32)}
"""By model, its width, and its numbers of encoder and of decoder layers."""
HOST = "host"


@dataclass(frozen=True)
class Folder:
    """A folder of artifacts. artifacts: the entries of its manifest."""

    path: Path
    target: str
    artifacts: list[dict[str, Any]]

    def holds(self, unit: str, size: str, dtype: str) -> bool:
        """Returns whether it has a unit of a model, in a precision of arithmetic."""
        return any(
            each["unit"] == unit and each["compute"] == dtype and SIZES[size] == dimensions(each["dims"])
            for each in self.artifacts
        )


def dimensions(dims: dict[str, int]) -> tuple[int | None, ...]:
    return tuple(dims.get(name) for name in ("n_audio_state", "n_audio_layer", "n_text_layer"))


def folders(roots: Iterable[Path]) -> list[Folder]:
    """Returns those below some folders; what is no manifest is left out."""
    found = []
    for root in roots:
        for manifest in sorted(root.rglob("manifest.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                read = json.loads(manifest.read_text())
                entries = [each for each in read["artifacts"] if {"unit", "compute", "dims"} <= set(each)]
                found.append(Folder(manifest.parent, str(read["target"]), entries))
    return found


def for_target(found: Iterable[Folder], device: str, capability: str | None) -> list[Folder]:
    """Returns the folders for a CPU, or for a GPU of a compute capability, such as "9.0"; for any, if that is None."""
    if device == "cpu":
        return [folder for folder in found if folder.target == HOST]
    on_gpu = [folder for folder in found if folder.target != HOST]
    if capability is None:
        return on_gpu
    named = f"sm_{capability.replace('.', '')}"
    return [folder for folder in on_gpu if folder.target.rstrip("af") == named]


def holding(found: Iterable[Folder], unit: str, size: str, dtype: str) -> Path | None:
    """Returns the first folder that has a unit of a model in a precision, if one has."""
    return next((folder.path for folder in found if folder.holds(unit, size, dtype)), None)
