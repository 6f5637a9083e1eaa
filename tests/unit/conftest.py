"""What every test leaves as it found it."""

import os
from collections.abc import Iterator

import pytest

from maxwhisper.decoding.openai_loop import not_in_graph
from maxwhisper.engine.artifacts import not_kept
from maxwhisper.engine.instructions import warn_of_slow_dtype
from maxwhisper.errors import warn_once
from maxwhisper.frozen import in_pytorch


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Fails a test that leaves another environment to later ones: if MAX's cache goes elsewhere, for one, all that
    these need is compiled anew."""
    before = dict(os.environ)
    yield
    changed = {name for name in before | os.environ if before.get(name) != os.environ.get(name)}
    assert changed <= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # pytest's and PyTorch's own


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    """Has what is said once in a process said in each test, whatever the tests before it made the process say."""
    for said_once in (in_pytorch, not_in_graph, not_kept, warn_of_slow_dtype, warn_once):
        said_once.cache_clear()
