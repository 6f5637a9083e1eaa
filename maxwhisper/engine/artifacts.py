"""Graphs compiled ahead of time: a folder of MAX's artifacts, and a manifest of what each holds and where it runs.

    maxwhisper compile --model tiny --target sm_90a --out tiny-sm_90a
    maxwhisper transcribe talk.mp3 --model tiny --device gpu --artifacts tiny-sm_90a

An artifact holds no weights, so one serves every checkpoint of the same dimensions and storage. It stands in for a
compilation only if nothing that decides the outcome of one differs; what differs is named. A graph for a GPU is
compiled against a virtual device, so no GPU is needed, and its CPU code for x86-64-v3, which CPUs have had since 2013.

`load_model` keeps what it compiles in such folders too, one for each artifact, and reads it from there the next time.

    python -m maxwhisper.engine.artifacts      prints the key under which CI keeps MAX's compile cache
"""

import hashlib
import inspect
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import max.engine
from max.driver import (
    Accelerator,
    set_virtual_cpu_target,
    set_virtual_device_api,
    set_virtual_device_count,
    set_virtual_device_target_arch,
)
from max.dtype import DType
from whisper.model import ModelDimensions

from ..errors import ArtifactError, OptionError
from ..files import replacing
from ..names import HOST, TARGETS
from .built_from import built_from
from .folders import folder_named
from .instructions import PORTABLE_CPU, PORTABLE_FEATURES, cpu_features, cpu_target
from .precompile import Job, compile_in_background
from .program import Loader, Program, Stored
from .session import Policy, session

log = logging.getLogger("maxwhisper")

MANIFEST = "manifest.json"
FORMAT = 2

PACKAGE = Path(__file__).parents[1]
GRAPH_SOURCES = ("network", "decoding", "engine/program.py", "engine/session.py", "kernels")
"""The parts of PACKAGE that define graphs."""
PORTABLE = PACKAGE / "portable"
"""Where a wheel of `make wheel` has artifacts for any CPU of its kind. A checkout has none."""

FLOAT32 = {"log_mel": ["n_mels"], "token_rules": []}
"""The units that are float32 under every policy, and the dimensions that they depend on; others depend on all."""


# ---- what decides the outcome of a compilation ---------------------------------------------------------------------


def source_hash(programs: Sequence[Program] = ()) -> str:
    """Returns SHA-256 of the sources that define the graphs, and of those of the programs' own functions."""
    parts = [PACKAGE / part for part in GRAPH_SOURCES]
    files = {
        file for part in parts for file in ([part] if part.is_file() else [*part.rglob("*.py"), *part.rglob("*.mojo")])
    }
    files |= {Path(inspect.getfile(program.function)) for program in programs}
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True)
class Identity:
    """What an artifact holds; it may stand in for a compilation of the same.

    unit: what compiles together. blocks: its graphs, in order. dims: of the model, as far as the unit depends on them.
    storage, compute: dtypes, as in `Policy`. source: `source_hash` of its programs, or `built_from`.
    """

    unit: str
    blocks: list[str]
    dims: dict[str, int]
    storage: str
    compute: str
    source: str

    @classmethod
    def of(cls, unit: str, dims: ModelDimensions, policy: Policy, programs: Sequence[Program]) -> "Identity":
        """Returns the identity of programs that are known by the hash of their sources."""
        blocks, source = [program.name for program in programs], source_hash(programs)
        if unit in FLOAT32:
            depends_on = {name: getattr(dims, name) for name in FLOAT32[unit]}
            return cls(unit, blocks, depends_on, "float32", "float32", source)
        return cls(unit, blocks, dict(vars(dims)), policy.storage.name, policy.compute.name, source)

    @property
    def file(self) -> str:
        """Returns the name of the artifact's file."""
        digest = hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()
        return f"{self.unit}-{self.compute}-{digest[:12]}.mef"

    def differences(self, found: "Identity") -> list[str]:
        """Returns what is not as here in another identity."""
        ours, theirs = self._flat(), found._flat()
        return [
            f"{name} is {theirs.get(name, 'absent')}, expected {ours.get(name, 'absent')}"
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        ]

    def _flat(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "dims"}
        return own | {f"dims.{name}": value for name, value in self.dims.items()}


def target_of(device: str) -> str:
    """Returns what is compiled for on a device of this machine."""
    return HOST if device == "cpu" else Accelerator().architecture_name


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """An artifact in a folder, what it was built from, the weights its graphs take, and the SHA-256 of its file."""

    identity: Identity
    built_from: str
    weights: dict[str, DType]
    sha256: str


class Artifacts:
    """A folder of artifacts that were compiled for a device of this machine.

    or_compile: whether what the folder does not hold is compiled instead, with a warning that says why.

    Raises ArtifactError if the folder cannot be read, or was made for another target, CPU or MAX version.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str, or_compile: bool = False):
        self.folder = folder_named("artifacts", folder)
        self.device = device
        self.or_compile = or_compile
        self.held: list[Held] = []
        with self._excused():
            self._open(self._manifest(), device)

    def __reduce__(self) -> tuple[type["Artifacts"], tuple[Path, str, bool]]:
        """Pickles as what to read, and for what: another machine may not be one that it was compiled for."""
        return Artifacts, (self.folder, self.device, self.or_compile)

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            self._same("format", manifest["format"], FORMAT)
            return manifest
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{path}: is no manifest of artifacts") from error

    def _open(self, manifest: dict[str, Any], device: str) -> None:
        try:
            self._same("max", manifest["max"], version("max"))
            self._same("target", manifest["target"], target_of(device))
            self._same("machine", manifest["cpu"]["machine"], platform.machine())
            needed = manifest["cpu"]["features"]
            if missing := sorted(set(needed) - set(cpu_features())):
                raise ArtifactError(f"{self.folder}: cpu.features has {', '.join(missing)}, which this CPU has not")
            names = [field.name for field in fields(Identity)]
            for entry in manifest["artifacts"]:
                weights = {name: DType[dtype] for name, dtype in entry["weights"].items()}
                identity = Identity(**{name: entry[name] for name in names})
                self.held.append(Held(identity, entry["built_from"], weights, entry["sha256"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self.folder / MANIFEST}: is incomplete: {error}") from error

    def _same(self, field: str, found: object, expected: object) -> None:
        if found != expected:
            raise ArtifactError(f"{self.folder}: {field} is {found}, expected {expected}")

    @contextmanager
    def _excused(self) -> Iterator[None]:
        """Lets a mismatch pass as a warning where compiling instead was asked for."""
        try:
            yield
        except ArtifactError as error:
            if not self.or_compile:
                raise
            log.warning("%s: compiling instead", error)

    def loader(self, unit: str, dims: ModelDimensions, policy: Policy) -> Loader:
        """Returns what gives a unit of a model to `Artifact`; it raises ArtifactError if the folder lacks the unit."""

        def load(programs: Sequence[Program], compile_them: Callable[[], Stored]) -> Stored:
            with self._excused():
                return self.read(Identity.of(unit, dims, policy, programs), programs)
            return compile_them()

        return load

    def read(self, wanted: Identity, programs: Sequence[Program] = ()) -> Stored:
        """Reads an artifact of the folder; raises ArtifactError if it has not this one, or not whole. One of other
        sources will do if the programs are the same."""
        of_unit = [held for held in self.held if held.identity.unit == wanted.unit]
        if not of_unit:
            units = ", ".join(sorted({held.identity.unit for held in self.held})) or "nothing"
            raise ArtifactError(f"{self.folder}: unit is {units}, expected {wanted.unit}")
        nearest = min(of_unit, key=lambda held: len(wanted.differences(held.identity)))
        same = replace(nearest.identity, source=wanted.source) == wanted
        if same and programs and wanted != nearest.identity and built_from(programs) == nearest.built_from:
            wanted = nearest.identity
        if differences := wanted.differences(nearest.identity):
            raise ArtifactError(f"{self.folder}: unit {wanted.unit}: {'; '.join(differences)}")
        path = self.folder / nearest.identity.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
        if (found := hashlib.sha256(content).hexdigest()) != nearest.sha256:
            raise ArtifactError(f"{path}: sha256 is {found}, expected {nearest.sha256}")
        try:
            return Stored(max.engine.read(path), nearest.weights)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: MAX cannot read it: {error}") from error


# ---- writing -------------------------------------------------------------------------------------------------------


def aim_at(target: str) -> str:
    """Has this process compile for a target from here on, and returns the name of the device to compile on.

    Virtual devices are those of the whole process: nothing can be run on a GPU in it any more.

    Raises OptionError for a target that is not known, or where the process has a MAX session already.
    """
    if target not in TARGETS:
        raise OptionError(f"target '{target}' is not known: expected {', '.join(TARGETS)}")
    if target == HOST:
        return "cpu"
    if session.cache_info().currsize:
        raise OptionError(f"target {target}: must be compiled for in a process that has used no device yet")
    set_virtual_cpu_target(PORTABLE_CPU.get(platform.machine(), "generic"))
    set_virtual_device_api("cuda")
    set_virtual_device_target_arch(target)
    set_virtual_device_count(1)
    return "gpu"


class Writer:
    """A folder of artifacts that is being written."""

    def __init__(self, folder: Path, target: str):
        self.folder = folder
        machine = platform.machine()
        features = cpu_features() if target == HOST else PORTABLE_FEATURES.get(machine, [])
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "max": version("max"),
            "target": target,
            "cpu": {"machine": machine, "features": features},
            "artifacts": [],
        }

    def __contains__(self, identity: Identity) -> bool:
        return (self.folder / identity.file).exists()

    def add(self, identity: Identity, stored: Stored, built_from: str) -> None:
        path = self.folder / identity.file
        stored.compiled.export_mef(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        weights = {name: dtype.name for name, dtype in stored.weights.items()}
        named = {"built_from": built_from, "weights": weights, "file": identity.file, "sha256": digest}
        entry = vars(identity) | named
        self.manifest["artifacts"].append(entry)

    def finish(self) -> None:
        (self.folder / MANIFEST).write_text(json.dumps(self.manifest, indent=1) + "\n")


@contextmanager
def writing(out: str | os.PathLike[str], target: str) -> Iterator[Writer]:
    """Gives a folder of artifacts that appears as `out` when it is complete, in the place of an earlier one.

    Raises OptionError if it cannot be written, or if `out` holds anything but artifacts.
    """
    out = folder_named("out", out).absolute()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists())):
        raise OptionError(f"--out {out}: is there already, and is no folder of artifacts")
    try:
        with written(out, target) as writer:
            yield writer
    except OSError as error:
        raise OptionError(f"--out {out}: cannot be written: {error.strerror or error}") from error


@contextmanager
def written(out: Path, target: str) -> Iterator[Writer]:
    """Writes as `writing` does, in the place of whatever is there. Raises OSError if it cannot be written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as folder:
        folder.mkdir()
        writer = Writer(folder, target)
        yield writer
        writer.finish()


# ---- keeping what was compiled -------------------------------------------------------------------------------------


class Cache:
    """A folder of such folders, each with one artifact and named by all that decides its outcome.

    To know that takes building the graphs, which takes a second. So a link leads there by the hash of all sources: it
    is found without, until any of these is changed.

    portable: folders of artifacts that came with the package, for any CPU of a kind. What is compiled nowhere else is
    read from there, at once, and another process compiles it for this CPU.

    What cannot be read is compiled again, and what cannot be kept is used all the same, with a warning.
    """

    def __init__(self, folder: Path, portable: Path | None = None):
        self.folder, self.portable = folder, portable

    def holds(self, unit: str, dims: ModelDimensions, policy: Policy, programs: Sequence[Program]) -> bool:
        """Returns whether a unit of a model is there."""
        target, by_sources = target_of(policy.device.device_type.value), Identity.of(unit, dims, policy, programs)
        if (self.folder / f"sources-{key(by_sources, target)}").exists():
            return True
        return (self.folder / f"{unit}-{key(replace(by_sources, source=built_from(programs)), target)}").exists()

    def loader(self, unit: str, dims: ModelDimensions, policy: Policy) -> Loader:
        """Loads as `Artifacts.loader` does; compiles and keeps what is not there."""
        device = policy.device.device_type.value

        def load(programs: Sequence[Program], compile_them: Callable[[], Stored]) -> Stored:
            target = target_of(device)
            by_sources = Identity.of(unit, dims, policy, programs)
            link = self.folder / f"sources-{key(by_sources, target)}"
            with suppress(ArtifactError, IndexError):
                known = Artifacts(link, device)
                return known.read(replace(by_sources, source=known.held[0].identity.source))
            if device == "cpu" and (found := self._read_portable(by_sources)):
                return found
            identity = replace(by_sources, source=built_from(programs))
            folder = self.folder / f"{unit}-{key(identity, target)}"
            if os.path.lexists(folder):
                try:
                    stored = Artifacts(folder, device).read(identity)
                    link_to(folder, link)
                    return stored
                except ArtifactError as error:
                    log.warning("%s: compiling again", error)
            stored = compile_them()
            keep(stored, identity, target, folder)
            link_to(folder, link)
            return stored

        return load

    def _read_portable(self, wanted: Identity) -> Stored | None:
        """Returns what is portable, and has all that came with it compiled for this CPU."""
        for manifest in sorted(self.portable.glob(f"*/{MANIFEST}")) if self.portable else ():
            try:
                portable = Artifacts(manifest.parent, "cpu")
            except ArtifactError:  # of another version of MAX, or for instructions that this CPU has not
                continue
            units = [held.identity for held in portable.held]
            if wanted not in units:
                continue
            try:
                stored = portable.read(wanted)
            except ArtifactError as error:
                log.warning("%s: compiling instead", error)
                return None
            if not cpu_target():
                jobs = [Job(unit.unit, unit.dims, unit.storage, unit.compute, str(self.folder)) for unit in units]
                compile_in_background(jobs)
            return stored
        return None


def key(identity: Identity, target: str) -> str:
    """Returns a hash of an artifact's identity and of what it is compiled with and for."""
    # MAX's settings can change what it compiles.
    settings = {name: value for name, value in os.environ.items() if name.startswith("MODULAR_")}
    relevant = {name: value for name, value in settings.items() if not name.endswith("CACHE_DIR")}
    cpu = [platform.machine(), cpu_target(), cpu_features()]
    everything = [FORMAT, version("max"), target, cpu, relevant, vars(identity)]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def link_to(folder: Path, link: Path) -> None:
    """Has a link lead to a folder beside it, if it can be written."""
    new = link.with_name(f"{link.name}-{os.getpid()}")
    with suppress(OSError):
        new.unlink(missing_ok=True)  # of a process that had this one's number, and was killed
        new.symlink_to(folder.name)
        new.replace(link)


def keep(stored: Stored, identity: Identity, target: str, folder: Path) -> None:
    try:
        with written(folder, target) as writer:
            writer.manifest["cpu"]["features"] = cpu_features()  # compiled for this CPU, not for any that has a GPU
            writer.add(identity, stored, identity.source)
    except Exception as error:  # what was compiled can be used, whatever MAX or the disk says against keeping it
        if not (folder / MANIFEST).exists():  # otherwise another process has been faster
            not_kept(folder.parent, str(getattr(error, "strerror", None) or error))


@cache
def not_kept(folder: Path, reason: str) -> None:
    """Says so once per reason."""
    log.warning("%s: compiled graphs cannot be kept there: %s", folder, reason)


def main() -> None:
    print(f"max-{version('max')}-graphs-{source_hash()[:16]}")


if __name__ == "__main__":
    main()
