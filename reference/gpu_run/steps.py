"""The steps of a run, in order of worth, and the commands of each."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import held

CLIP = Path("fixtures", "clips", "english-longer.ogg")
TALK = Path("fixtures", "cache", "talk.wav")
NANO = Path("fixtures", "nano.pt")


@dataclass(frozen=True)
class Workspace:
    """Where a run takes place: a checkout, an interpreter and a device.

    root: of the project. out: where results go. python: the interpreter that has MAX and PyTorch. device: "cpu" or
    "gpu". bundle: what `make gpu-bundle` has made, on a machine without network. artifacts: those for the device.
    """

    root: Path
    out: Path
    python: Path
    device: str
    bundle: Path | None = None
    artifacts: tuple[held.Folder, ...] = ()

    def with_artifacts(self) -> "Workspace":
        """Returns the workspace with the artifacts that are there by now, for the GPU that the doctor has found."""
        roots = [self.root / "build" / "artifacts"]
        if self.bundle:
            roots = [self.bundle / "unpacked" / "artifacts", *roots]
        found = held.for_target(held.folders(roots), self.device, capability(self.out / "doctor.json"))
        return replace(self, artifacts=tuple(found))

    def from_artifacts(self, unit: str, size: str, dtype: str) -> list[str]:
        """Returns the option that has a unit of a model come from artifacts; without any, it is compiled."""
        folder = held.holding(self.artifacts, unit, size, dtype)
        return ["--artifacts", str(folder)] if folder else []


def capability(report: Path) -> str | None:
    """Returns the compute capability of the GPU that a report of the doctor's names."""
    try:
        rows = json.loads(report.read_text())["rows"]
        return next((row["data"]["compute_capability"] for row in rows if row["check"].startswith("compute cap")), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Command:
    """A process to run.

    arguments: of the process. output: the file among the results that gets its standard output, if not the log.
    """

    arguments: list[str]
    output: str | None = None


@dataclass(frozen=True)
class Step:
    """A step of a run.

    weight: its share of the time, in the seconds that it has in a run of 8 minutes. least: seconds without which it is
    not begun. kind: how its results are read (`findings`). commands: made when it begins. whole: it may take all that
    is left, since the others need it. online: it is left out where there is a bundle.
    """

    name: str
    kind: str
    weight: float
    least: float
    commands: Callable[[Workspace], Sequence[Command]]
    whole: bool = False
    online: bool = False


def module(workspace: Workspace, *arguments: str | Path) -> list[str]:
    return [str(workspace.python), "-m", *map(str, arguments)]


def environment(workspace: Workspace) -> list[Command]:
    """Installs what the others need, from the network or from the bundle."""
    if workspace.bundle:
        return [Command([sys.executable, "-m", "reference.gpu_run.offline", str(workspace.bundle)])]
    return [Command(["make", "setup"])]


def doctor(workspace: Workspace) -> list[Command]:
    return [Command(module(workspace, "maxwhisper", "doctor", "--json"), "doctor.json")]


def suite(workspace: Workspace, tests: Sequence[str], dtype: str, unit: str) -> list[str]:
    device = ["--device", workspace.device, *(["--require-gpu"] if workspace.device == "gpu" else [])]
    artifacts = workspace.from_artifacts(unit, "fixture", dtype)
    return module(workspace, "pytest", *tests, *device, "--size", "fixture", "--dtype", dtype, *artifacts)


def parity(dtype: str, workspace: Workspace) -> list[Command]:
    """Judges every block of the fixture in a precision; transcripts are a step of their own."""
    tests = ["tests/parity", "--ignore", "tests/parity/test_transcript.py", "--tb", "line"]
    report = ["--report", str(workspace.out / f"parity-{dtype}")]
    return [Command([*suite(workspace, tests, dtype, "parts"), *report])]


def transcripts(workspace: Workspace) -> list[Command]:
    """Compares every clip's transcript, which the suite makes in float32."""
    tests = ["tests/parity/test_transcript.py", "--tb", "line"]
    report = ["--report", str(workspace.out / "transcripts")]
    return [Command([*suite(workspace, tests, "float32", "network"), *report])]


def peers(workspace: Workspace) -> list[Command]:
    """Installs the engines to compare with."""
    install = module(workspace, "pip", "install", "--quiet", "--constraint", "constraints.txt", "--editable")
    return [Command([*install, ".[peers,cuda12]"])]


def speed(size: str, workspace: Workspace) -> list[Command]:
    """Compares engines: the fixture's whole transcripts, other models by 100 tokens for every window of a talk."""
    options = [workspace.from_artifacts("network", size, dtype) for dtype in ("float16", "bfloat16", "float32")]
    artifacts = next(filter(None, options), [])
    common = ["--device", workspace.device, "--rounds", "1", *artifacts]
    common += ["--json", str(workspace.out / f"speed-{size}.json")]
    if size == "fixture":
        return [Command(module(workspace, "maxwhisper", "compare", CLIP, "--model", NANO, *common))]
    long = ["--model", f"random:{size}", "--tokens", "100", "--batch_size", "32"]
    make = [] if (workspace.root / TALK).exists() else [Command([str(workspace.python), "fixtures/make.py", "talk"])]
    return [*make, Command(module(workspace, "maxwhisper", "compare", TALK, *long, *common))]


def blocks(workspace: Workspace) -> list[Command]:
    """Times every block of the fixture in float16, MAX beside PyTorch."""
    timed = suite(workspace, ["tests/perf"], "float16", "parts")
    return [Command([*timed, "--benchmark-json", str(workspace.out / "blocks.json")])]


PROFILERS = {
    "nsys": ["profile", "--stats", "true", "--force-overwrite", "true", "--output"],
    "ncu": ["--launch-count", "60", "--force-overwrite", "--export"],
}


def kernels(workspace: Workspace) -> list[Command]:
    """Says which kernels a transcript runs: by PyTorch's profiler, and by NVIDIA's where these are installed."""
    size = next((size for size in ("turbo", "tiny") if workspace.from_artifacts("network", size, "float16")), "fixture")
    model = str(NANO) if size == "fixture" else f"random:{size}"
    artifacts = workspace.from_artifacts("network", size, "float16")
    plain = module(workspace, "reference.gpu_run.kernels", "--device", workspace.device, "--model", model, *artifacts)
    commands = [Command([*plain, "--json", str(workspace.out / "kernels.json")])]
    if workspace.device == "gpu":
        for profiler, options in PROFILERS.items():
            if path := shutil.which(profiler):
                commands.append(Command([path, *options, str(workspace.out / f"kernels-{profiler}"), *plain]))
    return commands


STEPS = (
    Step("environment", "log", 20, 1, environment, whole=True),
    Step("doctor", "doctor", 25, 5, doctor),
    Step("parity float16", "suite", 80, 20, partial(parity, "float16")),
    Step("parity bfloat16", "suite", 80, 20, partial(parity, "bfloat16")),
    Step("parity float32", "suite", 80, 20, partial(parity, "float32")),
    Step("transcripts", "suite", 40, 15, transcripts),
    Step("peers", "log", 10, 5, peers, online=True),
    Step("speed fixture", "speed", 20, 10, partial(speed, "fixture")),
    Step("speed tiny", "speed", 30, 10, partial(speed, "tiny")),
    Step("speed turbo", "speed", 35, 15, partial(speed, "turbo")),
    Step("speed large-v3", "speed", 50, 20, partial(speed, "large-v3")),
    Step("blocks", "suite", 30, 10, blocks),
    Step("kernels", "kernels", 20, 10, kernels),
)
