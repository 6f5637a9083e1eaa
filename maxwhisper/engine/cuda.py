"""The CUDA libraries that MAX opens on a GPU: where they are, and loading them before MAX looks.

MAX opens libcublas and libcublasLt by name, and from /usr/local/cuda. pip puts them into site-packages and conda into
its own prefix, where the dynamic loader does not look. A library that is loaded already is found by its name alone, so
whatever `preload` has loaded by path is what MAX gets.

What is loaded belongs together: one CUDA version, one location. libcublas calls into libcublasLt by private symbols,
and a libcublasLt of another release has others.
"""

import ctypes
import logging
import os
import platform
import re
import sys
from _ctypes import dlclose
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

log = logging.getLogger("maxwhisper")

LIBRARIES = ("cudart", "cublasLt", "cublas")  # each may need those before it
OPENED_BY_MAX = ("cublasLt", "cublas")
LOADER = "dynamic loader"  # what finds libraries by their names: the kind of a set without a location
MAJORS = (13, 12)  # the CUDA versions whose libraries MAX opens, in its order
# Where MAX 26.7 looks for the libraries of each CUDA version when their names alone find nothing.
FOLDERS_OF_MAX = {
    13: ("/usr/local/cuda-13.1/lib64", "/usr/local/cuda-13.0/lib64", "/usr/local/cuda/lib64"),
    12: ("/usr/local/cuda-12.8/lib64", "/usr/local/cuda/lib64"),
}

Version = tuple[int, ...]
Loaded = Mapping[tuple[str, int], str]  # (library, CUDA major version) to the path it was loaded from


def file_name(library: str, major: int) -> str:
    return f"lib{library}.so.{major}"


# ---- finding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """Folders that were filled together, by one installer."""

    kind: str
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class LibrarySet:
    """The libraries of one CUDA version in one location, as far as they are there.

    files: what to open, by library.
    problems: why a library has no file, by library.
    """

    major: int
    kind: str
    files: Mapping[str, str]
    problems: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Tells whether it has what MAX opens. libcublas does without libcudart, which is linked into it."""
        return all(library in self.files for library in OPENED_BY_MAX)


def locations(
    path: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ, root: Path = Path("/")
) -> list[Location]:
    """Returns where CUDA libraries may be, in the order of preference: pip, conda, then the system's folders.

    path: folders of Python packages, `sys.path` unless given. root: where the system's folders start.
    """
    sites = [Path(entry) for entry in dict.fromkeys(sys.path if path is None else path)]
    found: dict[tuple[str, ...], Location] = {}
    for location in (*pip_locations(sites), *conda_locations(environ), *system_locations(environ, root)):
        found.setdefault(tuple(os.path.realpath(folder) for folder in location.folders), location)
    return list(found.values())


def pip_locations(sites: Iterable[Path]) -> Iterator[Location]:
    """Yields NVIDIA's wheels, as torch's CUDA builds require: one folder for CUDA 13, one per library for CUDA 12."""
    for site in sites:
        nvidia = site / "nvidia"
        yield Location("pip", (nvidia / "cu13" / "lib", nvidia / "cublas" / "lib", nvidia / "cuda_runtime" / "lib"))
        yield Location("torch", (site / "torch" / "lib",))  # some of torch's wheels carry the libraries themselves


def conda_locations(environ: Mapping[str, str]) -> Iterator[Location]:
    for prefix in dict.fromkeys([sys.prefix, sys.base_prefix, environ.get("CONDA_PREFIX", sys.prefix)]):
        if os.path.isdir(os.path.join(prefix, "conda-meta")):
            yield Location("conda", toolkit_folders(Path(prefix), "lib"))


def system_locations(environ: Mapping[str, str], root: Path) -> Iterator[Location]:
    if listed := [Path(entry) for entry in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]:
        yield Location("LD_LIBRARY_PATH", tuple(listed))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            yield Location(variable, toolkit_folders(Path(environ[variable]), "lib64"))
    local = root / "usr" / "local"
    toolkits = sorted(local.glob("cuda-*"), key=lambda each: [*map(int, re.findall(r"\d+", each.name))], reverse=True)
    for toolkit in (local / "cuda", *toolkits, root / "opt" / "cuda"):
        yield Location("system", toolkit_folders(toolkit, "lib64"))
    usr = root / "usr"
    for folder in (usr / "lib" / f"{platform.machine()}-linux-gnu", usr / "lib64", usr / "lib", local / "lib"):
        yield Location("system", (folder,))


def toolkit_folders(toolkit: Path, libraries: str) -> tuple[Path, ...]:
    # NVIDIA calls 64-bit Arm servers sbsa.
    target = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    return (toolkit / libraries, toolkit / "targets" / f"{target}-linux" / "lib")


def find(where: Iterable[Location]) -> list[LibrarySet]:
    """Finds the sets of which a library or a broken link is there, in MAX's order of versions, then of locations."""
    where = list(where)
    return [found for major in MAJORS for location in where if (found := look(location, major))]


def look(location: Location, major: int) -> LibrarySet | None:
    names = [file_name(library, major) for library in LIBRARIES]
    if not any(os.path.lexists(os.path.join(folder, name)) for folder in location.folders for name in names):
        return None
    files: dict[str, str] = {}
    problems: dict[str, str] = {}
    for library, name in zip(LIBRARIES, names, strict=True):
        paths = [os.path.join(folder, name) for folder in location.folders]
        there = [path for path in paths if os.path.isfile(path)]
        broken = [path for path in paths if os.path.islink(path)]
        if there:
            files[library] = there[0]
        elif broken:
            problems[library] = f"{broken[0]} is a broken link to {os.readlink(broken[0])}"
        else:
            problems[library] = f"{name} is missing"
    return LibrarySet(major, location.kind, files, problems)


# ---- loading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rejected:
    """A set that is not loaded, and why."""

    libraries: LibrarySet
    reason: str


@dataclass(frozen=True)
class Preload:
    """What `preload` did.

    chosen: the set that is loaded, None if there is none.
    versions: what each loaded library says of itself.
    rejected: what was passed over.
    """

    chosen: LibrarySet | None
    versions: Mapping[str, Version]
    rejected: tuple[Rejected, ...]


@cache
def preload() -> Preload:
    """Loads a set of CUDA libraries, once in a process, for MAX to find them by name.

    Libraries that are loaded already, as by torch, decide: the rest comes from the same location, or not at all.
    Otherwise it is the newest CUDA version that the driver supports. That there are none is no error, since MAX has
    kernels of its own; it is logged, with what to install.
    """
    driver = driver_version()
    result = load_first(find(locations()), loaded(), driver)
    if result.chosen is None:
        log.warning("warning: MAX will find no cuBLAS; `maxwhisper doctor` says why. %s", install_hint(driver))
    return result


def install_hint(driver: Version | None) -> str:
    """Returns the command that installs the libraries for a driver of this CUDA version."""
    return f"pip install 'maxwhisper[cuda{12 if driver and driver[0] < 13 else 13}]'"


def load_first(sets: Sequence[LibrarySet], before: Loaded, driver: Version | None) -> Preload:
    """Loads the first set of `sets` that can be; `before` is what the process has loaded already."""
    rejected: list[Rejected] = []
    held = [major for major in MAJORS if any((library, major) in before for library in LIBRARIES)]
    usable = [major for major in MAJORS if driver is None or major <= driver[0]]
    for major in held or usable:
        here = {library: before[library, major] for library in LIBRARIES if (library, major) in before}
        for candidate in candidates([each for each in sets if each.major == major], here, major):
            try:
                return Preload(candidate, load(candidate), tuple(rejected))
            except OSError as error:
                rejected.append(Rejected(candidate, str(error)))
    for each in sets:
        if each.major not in usable:
            rejected.append(Rejected(each, f"the driver supports CUDA {dotted(driver)}"))
        elif not each.usable:
            reasons = [each.problems[library] for library in OPENED_BY_MAX if library in each.problems]
            rejected.append(Rejected(each, ", ".join(reasons)))
    return Preload(None, {}, tuple(rejected))


def candidates(sets: Sequence[LibrarySet], here: Mapping[str, str], major: int) -> Iterator[LibrarySet]:
    """Yields what may be loaded of one CUDA version, in the order of preference. here: what is loaded, by library."""
    fitting = [each for each in sets if each.usable and agrees(each, here)]
    for each in sorted(fitting, key=lambda each: len(each.problems)):  # stable: locations keep their order
        yield replace(each, files={**each.files, **here})
    kind = "loaded before" if all(library in here for library in OPENED_BY_MAX) else LOADER
    names = {library: here.get(library, file_name(library, major)) for library in LIBRARIES}
    yield LibrarySet(major, kind, names)
    cudart = names.pop("cudart")
    yield LibrarySet(major, kind, names, {"cudart": f"the dynamic loader does not find {cudart}"})


def agrees(candidate: LibrarySet, here: Mapping[str, str]) -> bool:
    """Returns whether no library that MAX opens is loaded already from elsewhere."""
    return all(os.path.realpath(candidate.files[each]) == here[each] for each in OPENED_BY_MAX if each in here)


def load(candidate: LibrarySet) -> dict[str, Version]:
    """Loads the libraries of a set in the order of dependence and returns their versions.

    Raises OSError with the reason, and leaves none of them loaded, if one cannot be loaded or they do not fit together.
    """
    handles: dict[str, ctypes.CDLL] = {}
    try:
        for library in LIBRARIES:
            if library in candidate.files:
                handles[library] = ctypes.CDLL(candidate.files[library], mode=ctypes.RTLD_GLOBAL)
        versions = {library: version_of(library, handle) for library, handle in handles.items()}
        check_versions(candidate, versions)
    except OSError:
        for handle in reversed(handles.values()):
            dlclose(handle._handle)  # else the next set's libraries would meet these
        raise
    return versions


def check_versions(candidate: LibrarySet, versions: Mapping[str, Version]) -> None:
    for library, version in versions.items():
        if version[0] != candidate.major:
            raise OSError(f"{candidate.files[library]} is of CUDA {version[0]}, not of CUDA {candidate.major}")
    if versions["cublas"] != versions["cublasLt"]:
        differing = (f"{candidate.files[library]} is {dotted(versions[library])}" for library in OPENED_BY_MAX)
        raise OSError(", but ".join(differing))


def dotted(version: Sequence[int] | None) -> str:
    return ".".join(map(str, version or ()))


def version_of(library: str, handle: ctypes.CDLL) -> Version:
    """Returns the version that a loaded library reports. Raises OSError if it does not."""
    value = ctypes.c_int()
    try:
        if library == "cudart":
            status = handle.cudaRuntimeGetVersion(ctypes.byref(value))
            numbers = [value.value // 1000, value.value % 1000 // 10]
        else:
            get_property, status, numbers = handle[f"{library}GetProperty"], 0, []
            for part in range(3):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL of library_types.h
                status = status or get_property(part, ctypes.byref(value))
                numbers.append(value.value)
    except AttributeError as error:
        raise OSError(str(error)) from error
    if status:
        raise OSError(f"{handle._name}: asked for its version, it returns status {status}")
    return tuple(numbers)


def loaded() -> dict[tuple[str, int], str]:
    """Returns the CUDA libraries that this process has loaded; none where the system has no /proc."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return {}
    found = {}
    for path in re.findall(r"^(?:\S+ +){5}(/.*)$", maps, re.MULTILINE):
        if match := re.fullmatch(rf"lib({'|'.join(LIBRARIES)})\.so\.(\d+)[\d.]*", os.path.basename(path)):
            found[match[1], int(match[2])] = path
    return found


def driver_version() -> Version | None:
    """Returns the newest CUDA version that the NVIDIA driver supports, (major, minor); None without a driver."""
    value = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(value))
    except (OSError, AttributeError):
        return None
    return None if status else (value.value // 1000, value.value % 1000 // 10)


def open_as_max(library: str) -> tuple[int, str]:
    """Opens a library as MAX does, and returns its CUDA major version and its path.

    Raises OSError, with the loader's reason for each name that MAX tries, if MAX would find none.
    """
    reasons = []
    for major in MAJORS:
        name = file_name(library, major)
        for path in (name, *(f"{folder}/{name}" for folder in FOLDERS_OF_MAX[major])):
            try:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                reasons.append(str(error))
            else:
                return major, loaded().get((library, major), path)
    raise OSError("; ".join(reasons))
