"""The options of both suites; one that cannot be met is a usage error."""

from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar, Self

import pytest
import torch
from whisper.model import ModelDimensions

from maxwhisper.engine.artifacts import TARGETS, Artifacts
from maxwhisper.engine.session import device_named, gpu_found
from maxwhisper.errors import ArtifactError, MaxWhisperError

from ..measures import DTYPES
from ..models import CHECKPOINT, FIXTURE, SIZES, trained
from ..older_cpu import AS_ON, heeded
from .workers import is_distributed, is_worker

ALL_SIZES = (FIXTURE, *SIZES)
DEFAULT_SIZES = (FIXTURE, "tiny")
DEFAULT_DTYPES = ("float32", "bfloat16")
ARTIFACTS = Path("build", "artifacts")
"""Where --compile-only writes unless --artifacts says otherwise."""
MARKERS = (
    "faults(kind): tries faults of weights or of graphs on the judge",
    "benchmarked: times MAX and PyTorch",
    "clock: is about times, so it does not run with --benchmark-disable",
    "compiles_for(target): reads code for it, so runs with --compile-only TARGET",
    "nightly: is too slow for every merge, so it runs with --nightly",
    "trained: needs trained weights, the fixture's or those of --checkpoint",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("maxwhisper").addoption
    sizes, dtypes = ", ".join(ALL_SIZES), ", ".join(DTYPES)
    add("--size", help=f"models, comma-separated, of {sizes}, or all (default: {','.join(DEFAULT_SIZES)})")
    default = f"default: {','.join(DEFAULT_DTYPES)}, of random weights at night; whole transcripts are in float32"
    add("--dtype", help=f"precisions, comma-separated, of {dtypes}, or all ({default})")
    add(
        "--device", default="cpu", choices=["cpu", "gpu", "auto"], help="what MAX and PyTorch compute on (default: cpu)"
    )
    add("--require-gpu", action="store_true", help="with --device gpu: fail if MAX and PyTorch do not both find a GPU")
    peers = "fail where a test is skipped, as those of engines are that are not installed"
    add("--require-peers", action="store_true", help=peers)
    add("--cpu", choices=AS_ON, help="compute as on a CPU with fewer instructions (default: with all of this one's)")
    add("--checkpoint", help="a checkpoint of your own, by path or name, in the place of every --size")
    add("--artifacts", metavar="DIR", help="use the graphs compiled there, or fail, naming what does not fit")
    only = f"compile for targets, comma-separated, of {', '.join(TARGETS)}, or all, and compare nothing; the graphs go"
    add("--compile-only", metavar="TARGETS", help=f"{only} into --artifacts (default: {ARTIFACTS}), by target")
    add("--or-compile", action="store_true", help="compile what does not fit in --artifacts instead of failing")
    add("--nightly", action="store_true", help="run what is too slow for every merge as well")
    faults = "which faults the judge must catch, in every --dtype (default: weights, in float32)"
    add("--faults", choices=["weights", "graphs", "all"], help=faults)
    add("--report", metavar="DIR", help="write report.html, report.json and summary.md there")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not config.pluginmanager.has_plugin("benchmark"):
        config.addinivalue_line("markers", "benchmark(timer): an option of pytest-benchmark, which is not here")
    Options.of(config).check()


class OfRun:
    """What a run has one of, made of its config when it is first asked for."""

    key: ClassVar[pytest.StashKey[Any]]

    def __init_subclass__(cls) -> None:
        cls.key = pytest.StashKey()

    def __init__(self, config: pytest.Config):
        self.config = config

    @classmethod
    def of(cls, config: pytest.Config) -> Self:
        """Returns the one of a run."""
        if cls.key not in config.stash:
            config.stash[cls.key] = cls(config)
        return config.stash[cls.key]


class Options(OfRun):
    """What the command line asks for, each part read when it is first needed.

    checkpoint: the user's, by path or name, or None.
    """

    def __init__(self, config: pytest.Config):
        super().__init__(config)
        self.checkpoint: str | None = config.getoption("--checkpoint")

    def check(self) -> None:
        """Raises a usage error for the first option that cannot be met."""
        get = self.config.getoption
        for option in ("--checkpoint", "--artifacts", "--report"):
            if get(option) == "":  # as of a variable that is not set
                raise pytest.UsageError(f"{option} is empty: give it a path, or leave it out")
        _ = self.sizes_given, self.dtypes
        for option, needed in (("--require-gpu", get("--require-gpu")), ("--device gpu", get("--device") == "gpu")):
            if needed and not gpu_found():
                raise pytest.UsageError(
                    f"{option}: MAX and PyTorch do not both find a GPU; `maxwhisper doctor` says why"
                )
        if get("--require-gpu") and self.device == "cpu":
            raise pytest.UsageError("--require-gpu: nothing would be computed on the GPU: give --device gpu as well")
        if get("--faults") and FIXTURE not in self.sizes:
            raise pytest.UsageError("--faults: these are tried in the fixture, which --size or --checkpoint leaves out")
        if (cpu := get("--cpu")) and not heeded(cpu):
            raise pytest.UsageError(f"--cpu {cpu}: needs x86-64, and to stand on the command line or in PYTEST_ADDOPTS")
        if self.checkpoint:
            check_checkpoint(self.checkpoint, get("--size"))
        if get("--report"):
            check_folder("--report", Path(get("--report")))
        if not self.targets:
            _ = self.artifacts
            return
        if idle := [option for option in ("--report", "--faults") if get(option)]:
            raise pytest.UsageError(f"{idle[0]}: --compile-only compares nothing")
        if get("--or-compile"):
            raise pytest.UsageError("--or-compile: --compile-only compiles all: leave one of them out")
        if is_distributed(self.config):
            raise pytest.UsageError("--compile-only: one process compiles for a target, so leave out -n, or give -n 0")
        check_folder("--artifacts", self.compiled_into)

    def chosen(self, option: str, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the names given with an option; raises a usage error for one that is not known."""
        given = self.config.getoption(option)
        names = default if given is None else known if given == "all" else tuple(given.split(","))
        if unknown := [name for name in names if name not in known]:
            raise pytest.UsageError(f"{option} {','.join(unknown)} is not known: expected some of {', '.join(known)}")
        return names

    @cached_property
    def sizes_given(self) -> tuple[str, ...]:
        return self.chosen("--size", ALL_SIZES, DEFAULT_SIZES)

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        return (CHECKPOINT,) if self.checkpoint else self.sizes_given

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        return [DTYPES[name] for name in self.chosen("--dtype", tuple(DTYPES), DEFAULT_DTYPES)]

    def is_nightly(self, size: str, dtype: torch.dtype) -> bool:
        """Tells whether a model is one that runs at night where no option asks for it: random weights below float32."""
        asked = any(map(self.config.getoption, ("--size", "--dtype", "--compile-only")))
        return not asked and size in SIZES and dtype != torch.float32

    @cached_property
    def targets(self) -> tuple[str, ...]:
        return self.chosen("--compile-only", TARGETS, ())

    @cached_property
    def device(self) -> str:
        return device_named(self.config.getoption("--device"))

    @property
    def compiled_into(self) -> Path:
        """Returns where --compile-only writes, by target."""
        return Path(self.config.getoption("--artifacts") or ARTIFACTS)

    @cached_property
    def artifacts(self) -> Artifacts | None:
        """Returns what --artifacts holds, which with --compile-only says where to write; raises a usage error if it is
        not for this machine."""
        folder = None if self.targets else self.config.getoption("--artifacts")
        or_compile = self.config.getoption("--or-compile")
        if folder is None:
            if or_compile:
                raise pytest.UsageError("--or-compile: there is nothing to compile instead of without --artifacts")
            return None
        try:
            return Artifacts(folder, self.device, or_compile)
        except ArtifactError as error:
            raise pytest.UsageError(f"--artifacts: {error}") from error

    @property
    def times(self) -> bool:
        """Tells whether anything is timed: not beside other workers of pytest-xdist, nor without pytest-benchmark."""
        return not self.config.getoption("benchmark_disable", True) and not is_worker(self.config)


def check_folder(option: str, folder: Path) -> None:
    """Makes the folder if it is not there; raises a usage error if no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise pytest.UsageError(f"{option} {folder}: cannot be written to: {error.strerror or error}") from error


def check_checkpoint(path: str, size: str | None) -> None:
    """Raises a usage error if the user's checkpoint does not load, or has not the dimensions of a --size beside it."""
    try:
        model = trained(path, CHECKPOINT)
    except MaxWhisperError as error:
        raise pytest.UsageError(f"--checkpoint: {error}") from error
    if size and (size not in SIZES or differing(model.dims, SIZES[size])):
        expected = SIZES.get(size, f"a size of {', '.join(SIZES)}")
        raise pytest.UsageError(f"--checkpoint {path} is {model.dims}, not {expected}")


def differing(ours: ModelDimensions, theirs: ModelDimensions) -> bool:
    """Tells whether two models differ in anything but their numbers of layers: SIZES have one layer of most."""
    return any(getattr(ours, name) != getattr(theirs, name) for name in vars(ours) if "layer" not in name)
