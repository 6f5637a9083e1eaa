"""Which tests the workers of pytest-xdist share out among them, and that none fails by bad luck or a slow machine."""

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import register_random, settings

from reference.judge import dtype_name
from reference.measures import DTYPES
from reference.models import CHECKPOINT, FIXTURE, SIZES


def seed(number: int) -> None:
    """Does what `torch.manual_seed` does, which notes for GPUs that nobody has used yet who asked: 2 ms a test."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


class TorchDraws:
    """What PyTorch draws next, which hypothesis sets before each example, as it does for Python and NumPy."""

    seed = staticmethod(seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_DRAWS = TorchDraws()
register_random(TORCH_DRAWS)  # which holds it by a weak reference
settings.register_profile("the same in every run", deadline=None, derandomize=True)
settings.load_profile("the same in every run")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Has every test draw what it draws when it runs alone."""
    seed(0)


def pytest_collection_finish() -> None:
    """Spares the garbage collector what is imported and collected, which stays: 5 % of the unit tests' time."""
    gc.freeze()


MODEL = re.compile(
    rf"\[((?:{'|'.join((CHECKPOINT, FIXTURE, *SIZES))})-(?:{'|'.join(map(dtype_name, DTYPES.values()))}))\b"
)


def group_of(nodeid: str) -> str:
    """Returns what `reference.pytest_plugin.workers.group` calls the group of a test, or a name of the same tests."""
    path, _, test = nodeid.partition("::")
    model = MODEL.search(test) if "unit" not in Path(path).parts else None
    return model[1] if model else Path(path).stem


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Leaves a group to one process, as `--dist loadgroup` should.

    pytest-xdist 3.8 appends the group's name to an attribute that pytest 9.2 does not have, so without this both
    processes would load every model and make every module's fixtures, and nothing would say so.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class Groups(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
