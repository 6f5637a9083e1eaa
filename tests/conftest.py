"""Which tests the workers of pytest-xdist share out among them, and that none fails because a machine is slow."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from reference.judge import dtype_name
from reference.measures import DTYPES
from reference.models import CHECKPOINT, FIXTURE, SIZES

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

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
