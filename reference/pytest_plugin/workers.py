"""The workers of pytest-xdist: whether this process is one, and what is left to one of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ..precompile import suite_job


def is_worker(config: pytest.Config) -> bool:
    """Tells whether this process runs tests for another one, which is the one that says how the run ended."""
    return hasattr(config, "workerinput")


def is_distributed(config: pytest.Config) -> bool:
    """Tells whether other processes run the tests of this one, as with -n 2."""
    return config.getoption("dist", "no") != "no"


def group(models: Sequence[tuple[str, torch.dtype]], file: Path) -> str:
    """Names what --dist loadgroup leaves to one process: all that takes a model, and files of tests that take none."""
    return "-".join(suite_job(*model) for model in models) or file.stem
