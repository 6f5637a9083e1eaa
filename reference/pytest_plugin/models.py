"""The models that a run compares, few of them in memory at a time, and the fixtures that tests are given."""

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from maxwhisper.engine.folders import cache_folder

from ..fixtures import NANO
from ..models import Model, load
from ..precompile import TRANSCRIBING, suite_job
from ..results import Run
from ..suite import Suite
from .compiling import Compiling
from .options import OfRun, Options

SuiteFor = Callable[[str, torch.dtype], Suite]
RUN = pytest.StashKey[Run]()
"""What a run has found."""


class Models(OfRun):
    """The models and suites of a run.

    alone: by size and dtype, the blocks that are compared alone. model, suite: from a size, and from a size and a
    dtype, the last two of which are kept.
    """

    def __init__(self, config: pytest.Config):
        super().__init__(config)
        self.options = Options.of(config)
        self.alone: dict[tuple[str, torch.dtype], frozenset[str]] = {}
        self.model: Callable[[str], Model] = lru_cache(maxsize=2)(lambda size: load(size, self.options.checkpoint))
        self.suite: SuiteFor = lru_cache(maxsize=2)(self.new_suite)

    def new_suite(self, size: str, dtype: torch.dtype) -> Suite:
        """Makes a suite, once its blocks are compiled if another process compiles them."""
        only, options = self.alone.get((size, dtype), frozenset()), self.options
        self.wait(suite_job(size, dtype, only))
        memory = getattr(self.config, "cache", None)
        return Suite(self.model(size), dtype, options.device, options.artifacts, memory, only)

    def wait(self, job: str) -> None:
        """Waits for a job if another process does it."""
        start = time.perf_counter()
        Compiling.of(self.config).wait(job)
        self.config.stash[RUN].waiting += time.perf_counter() - start


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Suite:
    """Returns the suite of one --size in one --dtype."""
    return Models.of(request.config).suite(*request.param)


@pytest.fixture
def suite_for(request: pytest.FixtureRequest) -> SuiteFor:
    """Returns what gives the suite of a size and a dtype."""
    return Models.of(request.config).suite


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Run:
    """Returns where tests leave what they found, for the report and the last lines of the run."""
    return request.config.stash[RUN]


@pytest.fixture(scope="session", autouse=True)
def own_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes a cache folder with all that the user's holds, but for the artifacts: what `load_model` keeps is of this
    run, so that nothing is judged which an earlier one compiled."""
    users, own = cache_folder("kernels").parent, tmp_path_factory.mktemp("cache")
    for shared in ("kernels", "graphs", "locks"):
        (users / shared).mkdir(parents=True, exist_ok=True)
    for entry in set(users.iterdir()) - {users / "artifacts"}:
        (own / entry.name).symlink_to(entry.absolute())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAXWHISPER_CACHE_DIR", str(own))
        yield


@pytest.fixture(scope="session")
def checkpoint_path(request: pytest.FixtureRequest) -> str:
    """Returns the checkpoint that whole transcripts are made with: the user's, or the trained fixture."""
    Models.of(request.config).wait(TRANSCRIBING)
    return Options.of(request.config).checkpoint or str(NANO)


@pytest.fixture(scope="session")
def loading(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Returns what the options have `load_model` do beside loading a checkpoint."""
    get = request.config.getoption
    options = {"artifacts": get("--artifacts"), "or_compile": get("--or-compile")}
    return {"device": Options.of(request.config).device, **options}
