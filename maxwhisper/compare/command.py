"""The command `maxwhisper compare`, behind its options."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .sidecar import text_beside


def run(json: str | None, plot: str | None, text: list[str] | None, threads: int | None, **options: Any) -> int:
    """Compares, prints the table, writes the files; returns 1 if an engine failed. Raises MaxWhisperError."""
    check_installed({"jiwer": "maxwhisper compare"} | ({"matplotlib": "--plot"} if plot else {}))
    check_outputs({"--json": json, "--plot": plot}, inputs(options["audio"], text, options["model"]))

    from .run import compare, write_json
    from .table import table

    results = compare(texts=text, threads=available(threads), **options)
    print(table(results))
    if json:
        write_json(results, Path(json))
    if plot:
        from .plot import write_plot

        write_plot(results, Path(plot))
    return int(results.failed)


# Both before the work, not after.


def check_installed(needed: dict[str, str]) -> None:
    """Raises OptionError for a package, of those named by what needs them, that is not installed."""
    for package, user in needed.items():
        if find_spec(package) is None:
            raise OptionError(f"{user} needs {package}: pip install 'maxwhisper[peers]'")


def inputs(audio: Sequence[str], text: Sequence[str] | None, model: str) -> list[str]:
    """Returns the files that a comparison reads, but for those of a model that is no file."""
    return [*audio, *(text or map(text_beside, audio)), *([model] if os.path.isfile(model) else [])]


def check_outputs(paths: dict[str, str | None], taken_by: Sequence[str]) -> None:
    """Raises OptionError for a file, of those given by an option, that is a folder, or is in one that cannot be
    written, or that would replace an input, of `taken_by`, or another of them."""
    taken = set(map(os.path.realpath, taken_by))
    for option, path in paths.items():
        if path and os.path.isdir(path):
            raise OptionError(f"{option} {path}: is a folder: expected the name of a file")
        if path and not (os.path.isdir(folder := os.path.dirname(path) or ".") and os.access(folder, os.W_OK)):
            raise OptionError(f"{option} {path}: there is no folder '{folder}' that can be written to")
        if path and os.path.realpath(path) in taken:
            raise OptionError(f"{option} {path}: would replace another file of this command")
        if path and (os.path.isfile(path) or not os.path.exists(path)):  # no device, which takes all
            taken.add(os.path.realpath(path))


def available(threads: int | None = None) -> int:
    """Returns how many threads an engine gets: one for each CPU that this process may run on, unless fewer are asked
    for; some end where they cannot start as many as are asked for."""
    from .process import available_cpus

    return min(threads or sys.maxsize, len(available_cpus()) or os.cpu_count() or 1)
