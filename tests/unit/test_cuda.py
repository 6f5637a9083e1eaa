"""The CUDA libraries that MAX opens: where they are found, which of them are loaded, and why others are not."""

import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maxwhisper.engine import cuda, session
from maxwhisper.errors import DeviceError

from . import fake_cuda
from .fake_cuda import ROOT, Version, environment, in_child, pip, put, shield

CUDA_12: Version = (12, 8, 4)
CUDA_13: Version = (13, 0, 2)
MACHINE = os.uname().machine
TARGET = f"targets/{'sbsa' if MACHINE == 'aarch64' else MACHINE}-linux/lib"
NAMES = [f"lib{library}.so.{major}" for library in cuda.LIBRARIES for major in cuda.MAJORS]


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


# ---- finding -------------------------------------------------------------------------------------------------------

CUDA_12_NAMES = ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12")
CUDA_13_NAMES = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13")

# The folders that hold the libraries, below the root of a machine whose packages are in `site`.
LAYOUTS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "wheels of CUDA 12": (
        "pip",
        {
            "site/nvidia/cuda_runtime/lib": ("libcudart.so.12",),
            "site/nvidia/cublas/lib": ("libcublasLt.so.12", "libcublas.so.12"),
        },
    ),
    "wheels of CUDA 13": ("pip", {"site/nvidia/cu13/lib": CUDA_13_NAMES}),
    "wheel of torch": ("torch", {"site/torch/lib": CUDA_12_NAMES}),
    "conda": ("conda", {"conda/lib": CUDA_12_NAMES}),
    "conda's toolkit": ("conda", {f"conda/{TARGET}": CUDA_13_NAMES}),
    "LD_LIBRARY_PATH": ("LD_LIBRARY_PATH", {"modules/a": ("libcudart.so.12",), "modules/b": CUDA_12_NAMES[1:]}),
    "CUDA_HOME": ("CUDA_HOME", {"home/lib64": CUDA_13_NAMES}),
    "CUDA_PATH": ("CUDA_PATH", {f"path/{TARGET}": CUDA_13_NAMES}),
    "toolkit": ("system", {"usr/local/cuda/lib64": CUDA_13_NAMES}),
    "toolkit by version": ("system", {"usr/local/cuda-12.8/lib64": CUDA_12_NAMES}),
    "toolkit by target": ("system", {f"usr/local/cuda-13.0/{TARGET}": CUDA_13_NAMES}),
    "Arch": ("system", {"opt/cuda/lib64": CUDA_12_NAMES}),
    "Debian": ("system", {f"usr/lib/{MACHINE}-linux-gnu": CUDA_12_NAMES}),
    "Fedora": ("system", {"usr/lib64": CUDA_13_NAMES}),
}


def locations(machine: Path) -> list[cuda.Location]:
    """Returns every location on a machine that has all of them."""
    (machine / "conda" / "conda-meta").mkdir(parents=True, exist_ok=True)
    environ = {
        "CONDA_PREFIX": str(machine / "conda"),
        "LD_LIBRARY_PATH": f"{machine / 'modules' / 'a'}:{machine / 'modules' / 'b'}",
        "CUDA_HOME": str(machine / "home"),
        "CUDA_PATH": str(machine / "path"),
    }
    # A conda that runs these tests is a location of its own.
    prefixes = (sys.prefix, sys.base_prefix)
    found = cuda.locations([str(machine / "site")], environ, machine)
    return [each for each in found if not any(str(each.folders[0]).startswith(prefix) for prefix in prefixes)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found(layout: str, tmp_path: Path) -> None:
    kind, folders = LAYOUTS[layout]
    expected = {}
    for folder, names in folders.items():
        touch(tmp_path / folder, *names)
        expected |= {name[3:].split(".")[0]: str(tmp_path / folder / name) for name in names}
    major = int(next(iter(folders.values()))[0][-2:])
    assert cuda.find(locations(tmp_path)) == [cuda.LibrarySet(major, kind, expected)]
    assert cuda.find(locations(tmp_path))[0].usable


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    touch(
        tmp_path / "usr" / "lib64",
        "libcublas.so",
        "libcublas.so.11",
        "libcublasLt_static.a",
        "libcudart-d0da41ae.so.12",
    )
    assert locations(tmp_path) and cuda.find(locations(tmp_path)) == []


def test_pip_comes_before_conda_and_conda_before_the_system(tmp_path: Path) -> None:
    for _, folders in LAYOUTS.values():
        for folder in folders:
            touch(tmp_path / folder, *NAMES)
    found = cuda.find(locations(tmp_path))
    assert [each.major for each in found] == sorted((each.major for each in found), reverse=True)
    kinds = list(dict.fromkeys(each.kind for each in found))
    assert kinds == ["pip", "torch", "conda", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "system"]


def test_newer_toolkits_come_before_older_ones(tmp_path: Path) -> None:
    for version in ("12.9", "12.10", "12"):
        touch(tmp_path / "usr" / "local" / f"cuda-{version}" / "lib64", *CUDA_12_NAMES)
    toolkits = [Path(each.files["cublas"]).parts[-3] for each in cuda.find(locations(tmp_path))]
    assert toolkits == ["cuda-12.10", "cuda-12.9", "cuda-12"]


def test_a_toolkit_under_two_names_is_one_place(tmp_path: Path) -> None:
    touch(tmp_path / "usr" / "local" / "cuda-12.8" / "lib64", *CUDA_12_NAMES)
    (tmp_path / "usr" / "local" / "cuda").symlink_to("cuda-12.8")
    assert len(cuda.find(locations(tmp_path))) == 1


@pytest.mark.parametrize("target", ["libcublas.so.12.8.4.1", "libcublas.so.12"])
def test_a_broken_link_is_named(target: str, tmp_path: Path) -> None:
    folder = touch(tmp_path / "usr" / "lib64", *CUDA_12_NAMES[:2])
    (folder / "libcublas.so.12").symlink_to(target)
    (found,) = cuda.find(locations(tmp_path))
    assert found.problems == {"cublas": f"{folder}/libcublas.so.12 is a broken link to {target}"}
    assert not found.usable


def test_a_place_with_broken_links_alone_is_found(tmp_path: Path) -> None:
    folder = touch(tmp_path / "usr" / "lib64")
    (folder / "libcublas.so.13").symlink_to("gone")
    (found,) = cuda.find(locations(tmp_path))
    assert (found.files, found.problems["cudart"]) == ({}, "libcudart.so.13 is missing")


def test_versions_are_not_mixed(tmp_path: Path) -> None:
    touch(tmp_path / "usr" / "lib64", "libcudart.so.12", "libcublasLt.so.13", "libcublas.so.12")
    thirteen, twelve = cuda.find(locations(tmp_path))
    assert (thirteen.major, list(thirteen.files), thirteen.usable) == (13, ["cublasLt"], False)
    assert (twelve.major, list(twelve.files), twelve.usable) == (12, ["cudart", "cublas"], False)
    assert twelve.problems == {"cublasLt": "libcublasLt.so.12 is missing"}


def test_places_are_not_mixed(tmp_path: Path) -> None:
    touch(tmp_path / "site" / "nvidia" / "cublas" / "lib", "libcublas.so.12")
    touch(tmp_path / "conda" / "lib", "libcublasLt.so.12")
    assert [(each.kind, each.usable) for each in cuda.find(locations(tmp_path))] == [("pip", False), ("conda", False)]


# ---- loading -------------------------------------------------------------------------------------------------------

LOAD = """
import ctypes
from dataclasses import asdict
from pathlib import Path
from maxwhisper.engine import cuda
for path in {before}:
    ctypes.CDLL(path)
where = [cuda.Location(kind, tuple(map(Path, folders))) for kind, folders in {where}]
result = asdict(cuda.load_first(cuda.find(where), cuda.loaded(), {driver}))
result["loaded"] = sorted(cuda.loaded().values())
cuda.FOLDERS_OF_MAX = {{13: (), 12: ()}}
try:
    result["opened"] = [cuda.open_as_max(library) for library in ("cublasLt", "cublas")]
except OSError as error:
    result["opened"] = str(error)
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    """Loads from locations, each a kind and folders, in a process of its own, and says what MAX would open then."""

    def load(
        *where: tuple[str, Path], driver: cuda.Version | None = (13, 0), before: Any = (), libraries: Any = ()
    ) -> Any:
        listed = [(kind, [str(folder) for folder in folders]) for kind, *folders in where]
        code = LOAD.format(where=listed, driver=driver, before=[str(path) for path in before])
        return in_child(code, environment(libraries=[*libraries, shield(tmp_path / "shield")]))

    return load


def reason(result: Any, kind: str) -> str:
    """Returns why the one set of this kind is not loaded."""
    (found,) = [each["reason"] for each in result["rejected"] if each["libraries"]["kind"] == kind]
    return found


def wheels(site: Path) -> tuple[str, Path, Path, Path]:
    (location, _) = cuda.pip_locations([site])
    return (location.kind, *location.folders)


@pytest.mark.parametrize("version", [CUDA_12, CUDA_13])
@pytest.mark.parametrize("layout", ["pip", "folder"])
def test_what_is_loaded_is_what_max_opens(
    layout: str, version: Version, load: Callable[..., Any], tmp_path: Path
) -> None:
    where = wheels(pip(tmp_path, version)) if layout == "pip" else ("system", put(tmp_path / "lib64", version))
    result = load(where)
    files = result["chosen"]["files"]
    assert (result["chosen"]["kind"], result["chosen"]["major"]) == (where[0], version[0])
    assert result["versions"] == {"cudart": list(version[:2]), "cublasLt": list(version), "cublas": list(version)}
    assert result["loaded"] == sorted(files.values()) and all(path.startswith(str(tmp_path)) for path in files.values())
    assert result["opened"] == [[version[0], files["cublasLt"]], [version[0], files["cublas"]]]
    assert all(each["libraries"]["major"] > version[0] for each in result["rejected"])


def test_without_preloading_max_opens_nothing(load: Callable[..., Any], tmp_path: Path) -> None:
    pip(tmp_path, CUDA_12)
    result = load()
    assert result["chosen"] is None and result["loaded"] == []
    assert "libcublasLt.so.13" in result["opened"] and "libcublasLt.so.12" in result["opened"]


@pytest.mark.parametrize(
    ("driver", "expected"), [((13, 1), 13), ((13, 0), 13), ((12, 9), 12), ((12, 0), 12), ((14, 0), 13), (None, 13)]
)
def test_the_newest_version_that_the_driver_supports_is_loaded(
    driver: cuda.Version | None, expected: int, load: Callable[..., Any], tmp_path: Path
) -> None:
    result = load(wheels(pip(pip(tmp_path, CUDA_12), CUDA_13)), driver=driver)
    assert result["chosen"]["major"] == expected
    assert [major for major, _ in result["opened"]] == [expected, expected]
    assert len(result["loaded"]) == 3


def test_a_version_that_the_driver_does_not_support_is_not_loaded(load: Callable[..., Any], tmp_path: Path) -> None:
    result = load(wheels(pip(pip(tmp_path, CUDA_12), CUDA_13)), driver=(11, 8))
    assert result["chosen"] is None and result["loaded"] == []
    assert [(each["libraries"]["major"], each["reason"]) for each in result["rejected"]] == [
        (13, "the driver supports CUDA 11.8"),
        (12, "the driver supports CUDA 11.8"),
    ]


def test_what_torch_has_loaded_decides_version_and_place(load: Callable[..., Any], tmp_path: Path) -> None:
    first, second = put(tmp_path / "first", CUDA_12), put(tmp_path / "second", CUDA_12)
    before = [second / "libcublasLt.so.12", second / "libcublas.so.12"]
    where = [wheels(pip(tmp_path, CUDA_13)), ("system", first), ("system", second)]
    result = load(*where, before=before)
    assert set(result["loaded"]) == {str(second / name) for name in CUDA_12_NAMES}
    assert result["chosen"]["files"]["cublas"] == str(second / "libcublas.so.12")
    assert result["opened"] == [[12, str(path)] for path in before]


def test_what_torch_has_loaded_from_an_unknown_place_stays_alone(load: Callable[..., Any], tmp_path: Path) -> None:
    known, unknown = put(tmp_path / "known", CUDA_12), put(tmp_path / "unknown", CUDA_12)
    before = [unknown / "libcublasLt.so.12", unknown / "libcublas.so.12"]
    result = load(("system", known), before=before)
    assert result["loaded"] == sorted(map(str, before))
    assert (result["chosen"]["kind"], list(result["chosen"]["problems"])) == ("loaded before", ["cudart"])


def test_a_file_that_is_no_library_is_passed_over(load: Callable[..., Any], tmp_path: Path) -> None:
    bad, good = put(tmp_path / "bad", CUDA_12), put(tmp_path / "good", CUDA_12)
    shield(bad, "libcublas.so.12")
    result = load(("conda", bad), ("system", good))
    assert reason(result, "conda") == f"{bad}/libcublas.so.12: invalid ELF header"
    assert result["chosen"]["kind"] == "system"
    # What was loaded before the bad one has left again.
    assert result["loaded"] == sorted(str(good / name) for name in CUDA_12_NAMES)


def test_an_empty_file_is_passed_over(load: Callable[..., Any], tmp_path: Path) -> None:
    bad = touch(put(tmp_path / "bad", CUDA_13), "libcublasLt.so.13")
    (bad / "libcublasLt.so.13").write_bytes(b"")
    result = load(("conda", bad))
    assert reason(result, "conda") == f"{bad}/libcublasLt.so.13: file too short"
    assert result["chosen"] is None and result["loaded"] == []


def test_libraries_of_different_releases_are_passed_over(load: Callable[..., Any], tmp_path: Path) -> None:
    mixed = put(put(tmp_path / "mixed", CUDA_12), (12, 4, 5), ["cublasLt"])
    good = put(tmp_path / "good", (12, 1, 3))
    result = load(("conda", mixed), ("system", good))
    expected = f"{mixed}/libcublasLt.so.12 is 12.4.5, but {mixed}/libcublas.so.12 is 12.8.4"
    assert reason(result, "conda") == expected
    assert result["versions"]["cublas"] == [12, 1, 3] and len(result["loaded"]) == 3


@pytest.mark.parametrize("library", cuda.LIBRARIES)
def test_a_library_under_the_name_of_another_version_is_passed_over(
    library: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    folder = put(tmp_path / "renamed", CUDA_13)
    (folder / f"lib{library}.so.13").write_bytes(fake_cuda.cuda_library(library, CUDA_12, major=13))
    result = load(("system", folder))
    assert reason(result, "system") == f"{folder}/lib{library}.so.13 is of CUDA 12, not of CUDA 13"
    assert result["chosen"] is None and result["loaded"] == []


def test_a_library_without_a_version_is_passed_over(load: Callable[..., Any], tmp_path: Path) -> None:
    folder = put(tmp_path / "other", CUDA_12)
    (folder / "libcublas.so.12").write_bytes(fake_cuda.shared_library(fake_cuda.EMPTY.format(), "libcublas.so.12"))
    undefined = f"{folder}/libcublas.so.12: undefined symbol: cublasGetProperty"
    assert reason(load(("system", folder)), "system") == undefined


def test_cublas_is_loaded_without_cudart(load: Callable[..., Any], tmp_path: Path) -> None:
    result = load(("system", put(tmp_path / "lib64", CUDA_12, ["cublasLt", "cublas"])))
    assert len(result["loaded"]) == 2 and [major for major, _ in result["opened"]] == [12, 12]
    assert result["chosen"]["problems"] == {"cudart": "libcudart.so.12 is missing"}


def test_a_complete_set_comes_before_one_without_cudart(load: Callable[..., Any], tmp_path: Path) -> None:
    incomplete, complete = put(tmp_path / "a", CUDA_12, ["cublasLt", "cublas"]), put(tmp_path / "b", CUDA_12)
    assert load(("pip", incomplete), ("system", complete))["chosen"]["kind"] == "system"


def test_why_an_incomplete_set_is_not_loaded(load: Callable[..., Any], tmp_path: Path) -> None:
    result = load(("system", put(tmp_path / "lib64", CUDA_12, ["cudart", "cublas"])))
    assert result["chosen"] is None and reason(result, "system") == "libcublasLt.so.12 is missing"


def test_the_dynamic_loader_is_asked_last(load: Callable[..., Any], tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere", CUDA_12)
    result = load(driver=(12, 4), libraries=[elsewhere])
    assert (result["chosen"]["kind"], result["chosen"]["files"]["cublas"]) == ("dynamic loader", "libcublas.so.12")
    assert result["loaded"] == sorted(str(elsewhere / name) for name in CUDA_12_NAMES)


def test_max_prefers_cuda_13_wherever_the_loader_finds_it(load: Callable[..., Any], tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere", CUDA_13)
    result = load(wheels(pip(tmp_path, CUDA_12)), driver=(12, 4), libraries=[elsewhere])
    assert result["chosen"]["major"] == 12
    assert result["opened"] == [[13, str(elsewhere / name)] for name in CUDA_13_NAMES[1:]]


def test_max_finds_libraries_in_its_own_folders(tmp_path: Path) -> None:
    folder = put(tmp_path / "lib64", CUDA_12)
    code = f"from maxwhisper.engine import cuda; cuda.FOLDERS_OF_MAX = {{13: ('/nowhere',), 12: ('{folder}',)}}\n"
    code += "result = cuda.open_as_max('cublasLt')"
    env = environment(libraries=[shield(tmp_path / "shield")])
    assert in_child(code, env) == [12, str(folder / "libcublasLt.so.12")]


# ---- preload, as it is called --------------------------------------------------------------------------------------

PRELOAD = """
import logging
from dataclasses import asdict
from io import StringIO
from maxwhisper.engine import cuda
logged = StringIO()
logging.basicConfig(stream=logged, format="%(message)s")
result = asdict(cuda.preload())
cuda.preload()
result |= {"logged": logged.getvalue(), "loaded": sorted(cuda.loaded().values())}
"""


def test_preload_finds_wheels_beside_other_packages(tmp_path: Path) -> None:
    site = pip(pip(tmp_path / "site", CUDA_12), CUDA_13)
    libraries = [fake_cuda.driver(tmp_path / "driver", (12, 6)), shield(tmp_path / "shield")]
    result = in_child(PRELOAD, environment([site], libraries))
    assert result["chosen"]["files"]["cublas"] == str(site / "nvidia/cublas/lib/libcublas.so.12")
    assert len(result["loaded"]) == 3 and result["logged"] == ""


@pytest.mark.parametrize(("supported", "extra"), [((13, 0), "cuda13"), ((12, 4), "cuda12")])
def test_one_warning_says_what_to_install(supported: tuple[int, int], extra: str, tmp_path: Path) -> None:
    code = "from maxwhisper.engine import cuda; cuda.locations = lambda: []\n" + PRELOAD
    libraries = [fake_cuda.driver(tmp_path / "driver", supported), shield(tmp_path / "shield")]
    result = in_child(code, environment(libraries=libraries))
    assert result["chosen"] is None and result["loaded"] == []
    hint = f"pip install 'maxwhisper[{extra}]'"
    assert result["logged"] == f"warning: MAX will find no cuBLAS; `maxwhisper doctor` says why. {hint}\n"


def test_the_extras_bring_the_libraries() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert cuda.install_hint((12, 9)) == "pip install 'maxwhisper[cuda12]'"
    assert cuda.install_hint((13, 0)) == cuda.install_hint(None) == "pip install 'maxwhisper[cuda13]'"
    assert {name.split(">")[0] for name in extras["cuda12"]} == {"nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12"}
    assert {name.split(">")[0] for name in extras["cuda13"]} == {"nvidia-cublas", "nvidia-cuda-runtime"}


def test_the_drivers_version(tmp_path: Path) -> None:
    code = "from maxwhisper.engine import cuda; result = cuda.driver_version()"
    assert in_child(code, environment(libraries=[fake_cuda.driver(tmp_path / "driver", (12, 4))])) == [12, 4]
    assert in_child(code, environment(libraries=[shield(tmp_path / "none", "libcuda.so.1")])) is None


class StubGPU:
    """Notes whether the libraries were loaded by then."""

    def __init__(self) -> None:
        self.preloads = len(CALLS)


CALLS: list[None] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(session, "accelerator_count", lambda: 1)
    monkeypatch.setattr(session, "Accelerator", StubGPU)
    monkeypatch.setattr(session, "preload", lambda: CALLS.append(None))


@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_libraries_are_loaded_before_a_gpu_is_used(name: str, gpu: None) -> None:
    device: Any = session.find_device(name)
    assert device.preloads == 1


def test_nothing_is_loaded_for_a_cpu_a_missing_gpu_or_a_virtual_one(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    session.find_device("cpu")
    monkeypatch.setattr(session, "is_virtual_device_mode", lambda: True)
    session.find_device("gpu")
    monkeypatch.setattr(session, "accelerator_count", lambda: 0)
    with pytest.raises(DeviceError, match="no GPU"):
        session.find_device("gpu")
    assert not CALLS
