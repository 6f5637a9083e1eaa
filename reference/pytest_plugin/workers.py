"""What the workers of pytest-xdist find, on its way to the process that they work for.

It travels with the report of the test that found it, so that a worker which dies takes no verdict with it but that of
the test it was running.
"""

import io
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ..ahead import suite_job
from ..faults import Fault
from ..graph_faults import graph_faults
from ..results import Run
from ..weight_faults import weight_faults


def is_worker(config: pytest.Config) -> bool:
    """Tell whether this process runs tests for another one, which is the one that says how the run ended."""
    return hasattr(config, "workerinput")


def is_distributed(config: pytest.Config) -> bool:
    """Tell whether other processes run the tests of this one, as with -n 2."""
    return config.getoption("dist", "no") != "no"


def group(models: Sequence[tuple[str, torch.dtype]], file: Path) -> str:
    """Name what --dist loadgroup leaves to one process: all that takes a model, and files of tests that take none."""
    return "-".join(suite_job(*model) for model in models) or file.stem


class Pickler(pickle.Pickler):
    """Faults hold functions, which cannot be pickled; their names can."""

    def persistent_id(self, value: Any) -> str | None:
        return value.name if isinstance(value, Fault) else None


class Unpickler(pickle.Unpickler):
    def persistent_load(self, name: str) -> Fault:
        return faults()[name]


@cache
def faults() -> dict[str, Fault]:
    return {fault.name: fault for fault in (*weight_faults(), *graph_faults())}


def packed(found: Run) -> bytes:
    """Return what a test found as bytes for `unpack_into`."""
    stream = io.BytesIO()
    Pickler(stream).dump(found)
    return stream.getvalue()


def unpack_into(run: Run, data: bytes) -> None:
    """Add to the run what `packed` made."""
    run.add(Unpickler(io.BytesIO(data)).load())
