"""`maxwhisper doctor`: what it says of machines that lack something, and that nothing on them can bring it down."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maxwhisper import __version__, cli, doctor
from maxwhisper.doctor import Answer, ProbeError, Report, Row, examine

from . import fake_cuda
from .fake_cuda import ROOT, environment, pip, shield

GIB = 2**30
GPU = {"name": "NVIDIA H100", "compute_capability": "9.0", "total_bytes": 80 * GIB, "free_bytes": 79 * GIB}
FILES = {"cudart": "/site/libcudart.so.13", "cublasLt": "/site/libcublasLt.so.13", "cublas": "/site/libcublas.so.13"}
SET = {"major": 13, "kind": "pip", "files": FILES, "problems": {}}
OPENED = {name: {"major": 13, "path": FILES[name], "error": None} for name in ("cublasLt", "cublas")}
NOT_OPENED = {name: {"major": None, "path": None, "error": "no such file"} for name in ("cublasLt", "cublas")}
LIBRARIES = {
    "chosen": SET,
    "versions": {"cudart": [13, 0], "cublasLt": [13, 0, 2], "cublas": [13, 0, 2]},
    "rejected": [],
    "files": FILES,
    "opened": OPENED,
}
NO_LIBRARIES = {"chosen": None, "versions": {}, "rejected": [], "files": {}, "opened": NOT_OPENED}

HEALTHY: dict[str, Answer] = {
    "pci": {"gpus": 1},
    "driver": {"version": "580.65.06", "cuda": [13, 0]},
    "cuda": {"gpus": [{"name": "NVIDIA H100", "compute_capability": "9.0"}]},
    "smi": {"gpus": [GPU]},
    "max": {"version": "26.7.0", "gpus": [GPU | {"compatible": True}], "error": None},
    "torch": {"version": "2.13.0", "cuda": "13.0", "gpus": [GPU], "error": None},
    "libraries": LIBRARIES,
    "cache": {"folders": ["/home/me/.cache/modular"], "files": 7, "bytes": 3 * 2**20},
    "memory": {"total_bytes": 64 * GIB, "free_bytes": 32 * GIB},
}
CHECKS = [
    "driver",
    "GPU",
    "compute capability",
    "GPU memory",
    "libcudart",
    "libcublasLt",
    "libcublas",
    "opened by MAX",
    "MAX",
    "PyTorch",
    "compile cache",
    "memory",
]


def report_on(changes: Mapping[str, Answer | str] | None = None) -> Report:
    """The report on a machine that has everything but for `changes`: other answers, or the reason why there is none."""
    answers = {**HEALTHY, **(changes or {})}

    def ask(probe: str) -> Answer:
        answer = answers[probe]
        if isinstance(answer, str):
            raise ProbeError(answer)
        return answer

    return examine(ask)


def row(report: Report, check: str) -> Row:
    (found,) = [each for each in report.rows if each.check == check]
    return found


def red(report: Report) -> list[str]:
    return [each.check for each in report.red]


@pytest.fixture(autouse=True)
def all_gpus_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_a_machine_that_has_everything() -> None:
    report = report_on()
    assert {each.check: each.found for each in report.rows} == {
        "driver": "580.65.06, for CUDA 13.0 and older",
        "GPU": "NVIDIA H100, by MAX",
        "compute capability": "9.0",
        "GPU memory": "79.0 GiB free of 80.0 GiB",
        "libcudart": "13.0, loaded from /site/libcudart.so.13 (pip)",
        "libcublasLt": "13.0.2, loaded from /site/libcublasLt.so.13 (pip)",
        "libcublas": "13.0.2, loaded from /site/libcublas.so.13 (pip)",
        "opened by MAX": "/site/libcublasLt.so.13, /site/libcublas.so.13",
        "MAX": "26.7.0 sees 1 GPU",
        "PyTorch": "2.13.0 sees 1 GPU",
        "compile cache": "3.0 MiB in 7 files in /home/me/.cache/modular",
        "memory": "32.0 GiB free of 64.0 GiB",
    }
    assert {each.state for each in report.rows} == {"ok"}
    assert report.verdict == "MAX and PyTorch see the GPU, and the CUDA libraries load."


NO_GPU: dict[str, Answer | str] = {
    "pci": {"gpus": 0},
    "driver": "libcuda.so.1: no such file",
    "cuda": "libcuda.so.1: no such file",
    "smi": "nvidia-smi: no such file",
    "max": {"version": "26.7.0", "gpus": [], "error": "CUDA information: no driver"},
    "torch": {"version": "2.13.0+cpu", "cuda": None, "gpus": [], "error": "Torch not compiled with CUDA enabled"},
    "libraries": NO_LIBRARIES,
}


def test_a_machine_without_a_gpu_is_told_so() -> None:
    report = report_on(NO_GPU)
    assert report.verdict == (
        "There is no NVIDIA GPU that can be used here: --device gpu fails, --device cpu does not need one."
    )
    libraries = ["libcudart", "libcublasLt", "libcublas", "opened by MAX"]
    assert red(report) == ["driver", "GPU", *libraries, "MAX", "PyTorch"]
    assert [each.check for each in report.rows] == CHECKS
    for check in ("driver", "GPU"):
        assert row(report, check).remedy.startswith("nothing, if the CPU is to compute")
    assert row(report, "MAX").remedy == "follows from the rows above"
    assert (row(report, "compute capability").state, row(report, "GPU memory").state) == ("note", "note")


def test_a_gpu_without_a_driver() -> None:
    report = report_on(NO_GPU | {"pci": {"gpus": 2}})
    assert "install the NVIDIA driver" in row(report, "driver").remedy
    assert row(report, "GPU").found == (
        "none that the driver gives, though the PCI bus has 2; libcuda.so.1: no such file"
    )


def lacking(*libraries: str) -> dict[str, Any]:
    return {
        "files": {name: path for name, path in FILES.items() if name not in libraries},
        "problems": {name: f"lib{name}.so.13 is missing" for name in libraries},
    }


def rejected(reason: str, **changes: Any) -> Answer:
    return NO_LIBRARIES | {"rejected": [{"libraries": SET | changes, "reason": reason}]}


def opening(**paths: tuple[int, str]) -> Answer:
    return LIBRARIES | {"opened": {name: {"major": m, "path": p, "error": None} for name, (m, p) in paths.items()}}


ALL_LIBRARIES = ["libcudart", "libcublasLt", "libcublas", "opened by MAX"]
OTHER = "/other/libcublas.so.12"

# What is different on the machine; the rows that are red; a row, with a part of what it finds and of its remedy.
MACHINES: dict[str, tuple[dict[str, Answer | str], list[str], tuple[str, str, str]]] = {
    "driver damaged": (
        {"driver": "NVML returns status 18: Driver/library version mismatch"},
        ["driver"],
        ("driver", "version mismatch", "install the NVIDIA driver"),
    ),
    "driver too old for MAX": (
        {"max": HEALTHY["max"] | {"gpus": [GPU | {"compatible": False}]}},
        ["MAX"],
        ("MAX", "26.7.0 does not support this GPU or its driver", "MODULAR_NVPTX_COMPILER_PATH"),
    ),
    "MAX without a GPU": (
        {"max": {"version": "26.7.0", "gpus": [], "error": "CUDA information: lost"}},
        ["MAX"],
        ("MAX", "26.7.0 sees no GPU: CUDA information: lost", "driver 580 or newer"),
    ),
    "PyTorch for the CPU": (
        {"torch": NO_GPU["torch"]},
        ["PyTorch"],
        ("PyTorch", "2.13.0+cpu sees no GPU: Torch not compiled with CUDA enabled", "a CUDA build of PyTorch"),
    ),
    "PyTorch without a GPU": (
        {"torch": {"version": "2.13.0", "cuda": "13.0", "gpus": [], "error": "the driver is too old"}},
        ["PyTorch"],
        ("PyTorch", "2.13.0 sees no GPU: the driver is too old", "that the driver supports"),
    ),
    "no libraries": (
        {"libraries": NO_LIBRARIES},
        ALL_LIBRARIES,
        ("libcublas", "not found", "pip install 'maxwhisper[cuda13]'"),
    ),
    "no libraries, older driver": (
        {"libraries": NO_LIBRARIES, "driver": {"version": "550.54.14", "cuda": [12, 4]}},
        ALL_LIBRARIES,
        ("libcublasLt", "not found", "pip install 'maxwhisper[cuda12]'"),
    ),
    "not a library": (
        {"libraries": rejected("/site/libcublas.so.13: invalid ELF header")},
        ALL_LIBRARIES,
        (
            "libcublas",
            "/site/libcublas.so.13 is not loaded: /site/libcublas.so.13: invalid ELF header",
            "remove or reinstall what is incomplete or does not load",
        ),
    ),
    "broken link": (
        {
            "libraries": rejected(
                "/site/libcublas.so.13 is a broken link to gone",
                files={"cudart": FILES["cudart"], "cublasLt": FILES["cublasLt"]},
                problems={"cublas": "/site/libcublas.so.13 is a broken link to gone"},
            )
        },
        ALL_LIBRARIES,
        ("libcublas", "/site/libcublas.so.13 is a broken link to gone", "pip install"),
    ),
    "incomplete": (
        {"libraries": rejected("libcublas.so.13 is missing", **lacking("cublas"))},
        ALL_LIBRARIES,
        ("libcublasLt", "/site/libcublasLt.so.13 is not loaded: libcublas.so.13 is missing", "pip install"),
    ),
    "found by the dynamic loader, damaged": (
        {"libraries": rejected("/lib/libcublasLt.so.13: file too short", kind="dynamic loader")},
        ALL_LIBRARIES,
        ("libcublasLt", "/lib/libcublasLt.so.13: file too short", "pip install"),
    ),
    "MAX opens others than the driver supports": (
        {"driver": {"version": "550.54.14", "cuda": [12, 4]}},
        ["opened by MAX"],
        ("opened by MAX", "the driver supports CUDA 12.4", "MAX tries CUDA 13 first"),
    ),
    "MAX opens a mixture": (
        {"libraries": opening(cublasLt=(13, FILES["cublasLt"]), cublas=(12, OTHER))},
        ["opened by MAX"],
        ("opened by MAX", f"{FILES['cublasLt']}, {OTHER}: of different CUDA versions", "MAX tries CUDA 13 first"),
    ),
    "MAX is not installed": (
        {"max": "ModuleNotFoundError: No module named 'max'"},
        ["MAX"],
        ("MAX", "No module named 'max'", "-m maxwhisper.doctor max`"),
    ),
    "PyTorch takes the process down": (
        {"torch": "ended by SIGSEGV"},
        ["PyTorch"],
        ("PyTorch", "ended by SIGSEGV", "-m maxwhisper.doctor torch`"),
    ),
    "libraries take the process down": (
        {"libraries": "ended by SIGABRT"},
        ["CUDA libraries"],
        ("CUDA libraries", "ended by SIGABRT", "-m maxwhisper.doctor libraries`"),
    ),
    "cache out of reach": (
        {"cache": "PermissionError: [Errno 13] Permission denied"},
        ["compile cache"],
        ("compile cache", "Permission denied", "-m maxwhisper.doctor cache`"),
    ),
    "memory out of reach": (
        {"memory": "no answer within 120 s"},
        ["memory"],
        ("memory", "no answer within 120 s", "-m maxwhisper.doctor memory`"),
    ),
    "an answer of another form": (
        {"cache": {}},
        ["compile cache"],
        ("compile cache", "KeyError: 'bytes'", "report this as a defect"),
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_wrong_is_red_and_nothing_else(machine: str) -> None:
    changes, expected, (check, found, remedy) = MACHINES[machine]
    report = report_on(changes)
    assert red(report) == expected
    assert found in row(report, check).found and remedy in row(report, check).remedy
    assert all(each.remedy for each in report.red)
    if "driver" not in expected:
        assert report.verdict.startswith("The GPU is there, but --device gpu cannot be relied on")


def test_a_machine_that_starts_no_process() -> None:
    def ask(probe: str) -> Answer:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    report = examine(ask)
    reason = "BlockingIOError: [Errno 11] Resource temporarily unavailable"
    assert red(report) == ["driver", "GPU", "CUDA libraries", "MAX", "PyTorch", "compile cache", "memory"]
    assert all(reason in each.found for each in report.red)


def test_what_is_not_needed_is_not_red() -> None:
    assert red(report_on({"pci": "no such folder", "smi": "nvidia-smi: no such file", "cuda": "lost"})) == []


def test_a_library_that_max_does_not_open_is_not_red() -> None:
    answer = LIBRARIES | {"chosen": SET | lacking("cudart"), "versions": {"cublasLt": [13, 0, 2], "cublas": [13, 0, 2]}}
    report = report_on({"libraries": answer})
    assert red(report) == []
    assert row(report, "libcudart").state == "note"
    assert row(report, "libcudart").found == "libcudart.so.13 is missing; MAX does not open it"


def test_reasons_that_are_the_same_are_given_once() -> None:
    loader = {"libraries": SET | {"kind": "dynamic loader"}, "reason": "libcublasLt.so.13: no such file"}
    report = report_on({"libraries": NO_LIBRARIES | {"rejected": [loader, loader]}})
    assert row(report, "libcublasLt").found == "libcublasLt.so.13: no such file"


def test_gpus_that_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    unseen = {"gpus": [], "error": "no device"}
    hidden = {"max": HEALTHY["max"] | unseen, "torch": HEALTHY["torch"] | unseen, "cuda": "no device"}
    report = report_on(hidden)
    assert red(report) == ["MAX", "PyTorch"]
    for check in ("MAX", "PyTorch"):
        assert row(report, check).found.endswith("; CUDA_VISIBLE_DEVICES is ''")
        assert row(report, check).remedy.startswith("unset CUDA_VISIBLE_DEVICES")
    without_smi = report_on(hidden | {"smi": "no such file"})
    assert row(without_smi, "GPU").remedy.startswith("unset CUDA_VISIBLE_DEVICES")
    for_the_cpu = report_on(hidden | {"torch": NO_GPU["torch"]})
    assert "a CUDA build" in row(for_the_cpu, "PyTorch").remedy
    # On a machine without any, the variable hides nothing.
    assert "CUDA_VISIBLE_DEVICES" not in report_on(NO_GPU).text()


@pytest.mark.parametrize(
    ("unseeing", "source"),
    [([], "MAX"), (["max"], "PyTorch"), (["max", "torch"], "nvidia-smi"), (["max", "torch", "smi"], "libcuda")],
)
def test_where_the_gpu_is_known_from(unseeing: Sequence[str], source: str) -> None:
    lost = {"version": "1", "cuda": "13.0", "gpus": [], "error": "lost"}
    report = report_on({probe: lost for probe in unseeing})
    assert row(report, "GPU").found == f"NVIDIA H100, by {source}"
    assert row(report, "compute capability").found == "9.0"
    assert row(report, "GPU memory").found == ("not known" if source == "libcuda" else "79.0 GiB free of 80.0 GiB")


@pytest.mark.parametrize(
    ("architecture", "capability"),
    [("sm_75", "7.5"), ("sm_90a", "9.0"), ("sm_100a", "10.0"), ("sm_121", "12.1"), ("gfx942", "gfx942")],
)
def test_the_compute_capability_of_an_architecture(architecture: str, capability: str) -> None:
    stats = {"free_memory": 0, "total_memory": 4 * GIB}  # MAX gives 0 for what it does not know
    gpu = SimpleNamespace(model_name="GPU", architecture_name=architecture, stats=stats, is_compatible=True)
    answer = doctor.max_gpu(gpu)
    assert (answer["compute_capability"], answer["free_bytes"]) == (capability, None)


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 MiB"), (GIB - 1, "1024.0 MiB"), (3 * GIB // 2, "1.5 GiB")])
def test_sizes_for_people(count: int, text: str) -> None:
    assert doctor.size(count) == text


def test_several_gpus_have_rows_each() -> None:
    gpus = [GPU | {"compatible": True}, GPU | {"name": "NVIDIA A100", "compute_capability": "8.0", "compatible": True}]
    report = report_on({"max": HEALTHY["max"] | {"gpus": gpus}})
    assert [each.check for each in report.rows[1:7]] == [
        *("GPU 0", "compute capability 0", "GPU memory 0", "GPU 1", "compute capability 1", "GPU memory 1"),
    ]
    assert row(report, "compute capability 1").found == "8.0"
    assert row(report, "MAX").found == "26.7.0 sees 2 GPUs"


# ---- renderings ----------------------------------------------------------------------------------------------------


def test_the_table_has_every_row_and_every_remedy() -> None:
    report = report_on(NO_GPU)
    table, verdict, remedies = report.text().split("\n\n")
    head, *lines = table.splitlines()
    assert head.split() == ["check", "state", "found"]
    assert len(lines) == len(report.rows) == len(CHECKS)
    for line, each in zip(lines, report.rows, strict=True):
        assert re.fullmatch(rf"{re.escape(each.check)} +{each.state} +{re.escape(each.found)}", line)
    assert len({line.index(each.state, len(each.check)) for line, each in zip(lines, report.rows, strict=True)}) == 1
    assert verdict == report.verdict
    remedied = [line[2:].split(": ", 1) for line in remedies.splitlines()[1:]]
    expected = {check: row(report, check).remedy for check in red(report)}
    assert {check: remedy for checks, remedy in remedied for check in checks.split(", ")} == expected
    assert len(remedied) == len(set(expected.values())) < len(expected)


def test_nothing_is_to_be_done_where_all_is_well() -> None:
    assert report_on().text().endswith(report_on().verdict)


def test_json_holds_all_that_is_known() -> None:
    report = report_on(MACHINES["not a library"][0])
    document = json.loads(report.json())
    assert set(document) == {"version", "maxwhisper", "ok", "verdict", "rows"}
    assert (document["version"], document["maxwhisper"], document["ok"]) == (1, __version__, False)
    assert document["verdict"] == report.verdict
    assert [Row(**each) for each in document["rows"]] == list(report.rows)
    assert json.loads(report_on().json())["ok"] is True


def test_json_has_numbers_and_paths() -> None:
    rows = {each["check"]: each["data"] for each in json.loads(report_on().json())["rows"]}
    assert rows["driver"] == {"version": "580.65.06", "cuda": [13, 0]}
    assert rows["compute capability"] == {"compute_capability": "9.0"}
    assert rows["GPU memory"] == {"free_bytes": 79 * GIB, "total_bytes": 80 * GIB}
    assert rows["libcublas"] == {"loaded": True, "version": "13.0.2", "path": FILES["cublas"], "from": "pip"}
    assert rows["MAX"] == {"version": "26.7.0", "gpus": 1, "error": None}
    assert rows["PyTorch"] == {"version": "2.13.0", "cuda": "13.0", "gpus": 1, "error": None}
    assert rows["compile cache"] == HEALTHY["cache"] and rows["memory"] == HEALTHY["memory"]


@pytest.mark.parametrize(("changes", "expected"), [({}, 0), (MACHINES["PyTorch for the CPU"][0], 1), (NO_GPU, 1)])
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_exit_status(
    changes: Any,
    expected: int,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = report_on(changes)
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert cli.main(["doctor", *arguments]) == expected
    captured = capsys.readouterr()
    assert captured.out == (report.json() if arguments else report.text()) + "\n" and captured.err == ""


# ---- probes on machines made of files ------------------------------------------------------------------------------

FAKE_MAX = """
def accelerator_count(): return {count}
REASONS = ["failed to create device: none", "  CUDA information: no driver", "  HIP information: no"]
class Accelerator:
    def __init__(self, id=0):
        if not {count}: raise ValueError("\\n".join(REASONS))
    model_name, architecture_name, is_compatible = "NVIDIA Fake", "sm_90a", True
    stats = {{"free_memory": 3 * 2**30, "total_memory": 4 * 2**30}}
"""
FAKE_TORCH = """
__version__ = "2.13.0+fake"
class version: cuda = "13.0"
class cuda:
    init = staticmethod(lambda: None)
    device_count = staticmethod(lambda: 1)
    mem_get_info = staticmethod(lambda index: (3 * 2**30, 4 * 2**30))
    get_device_capability = staticmethod(lambda index: (9, 0))
    get_device_name = staticmethod(lambda index: "NVIDIA Fake")
"""
SMI = """#!/bin/sh
echo "$*" > "$0.arguments"
echo 'NVIDIA Fake, 9.0, 4096, 3072'
"""


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


# The libraries of the machine that runs the tests are not those of the machine under test.
ISOLATION = """
from functools import partial
from pathlib import Path
from maxwhisper.engine import cuda
cuda.places = partial(cuda.places, [{site!r}], {{}}, Path({folder!r}))
cuda.FOLDERS_OF_MAX = {{13: (), 12: ()}}
"""


class Machine:
    """A folder that stands for a machine with everything that a GPU needs, until a test takes something away."""

    def __init__(self, folder: Path):
        self.folder, self.site = folder, folder / "site"
        write(self.site / "sitecustomize.py", ISOLATION.format(site=str(self.site), folder=str(folder)))
        write(self.site / "max" / "__init__.py", "")
        write(self.site / "max" / "driver.py", FAKE_MAX.format(count=1))
        write(self.site / "torch.py", FAKE_TORCH)
        pip(self.site, (13, 0, 2))
        self.smi = write(folder / "bin" / "nvidia-smi", SMI, 0o755)
        self.driver = fake_cuda.driver(folder / "driver", (13, 0))
        self.cache = folder / "cache"
        write(self.cache / ".max_cache" / "graph.mef", "x" * 1000)

    @property
    def env(self) -> dict[str, str]:
        path = f"{self.smi.parent}{os.pathsep}{os.environ['PATH']}"
        libraries = [self.driver, shield(self.folder / "shield")]
        return environment([self.site], libraries, PATH=path, MODULAR_CACHE_DIR=str(self.cache))

    def ask(self, probe: str, monkeypatch: pytest.MonkeyPatch) -> Answer:
        monkeypatch.setattr(os, "environ", self.env)
        monkeypatch.setattr(sys, "path", [str(self.site), str(ROOT), *sys.path])
        return doctor.ask(probe)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "maxwhisper", "doctor", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def ask(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Answer]:
    return lambda probe: machine.ask(probe, monkeypatch)


def rows_of(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {each["check"]: each for each in json.loads(process.stdout)["rows"]}


def test_doctor_on_a_machine_that_has_everything(machine: Machine) -> None:
    process = machine.run("--json")
    rows = rows_of(process)
    assert {check: each["found"] for check, each in rows.items() if each["state"] != "ok"} == {}
    assert (process.returncode, process.stderr) == (0, "")
    assert rows["driver"]["found"] == "580.65.06, for CUDA 13.0 and older"
    assert rows["GPU"]["found"] == "NVIDIA Fake, by MAX"
    assert rows["compute capability"]["found"] == "9.0"
    assert rows["GPU memory"]["found"] == "3.0 GiB free of 4.0 GiB"
    folder = machine.site / "nvidia" / "cu13" / "lib"
    assert rows["libcublas"]["found"] == f"13.0.2, loaded from {folder}/libcublas.so.13 (pip)"
    assert rows["opened by MAX"]["found"] == f"{folder}/libcublasLt.so.13, {folder}/libcublas.so.13"
    assert rows["compile cache"]["data"] == {"folders": [str(machine.cache)], "files": 1, "bytes": 1000}
    assert 0 < rows["memory"]["data"]["free_bytes"] <= rows["memory"]["data"]["total_bytes"]


def test_doctor_on_a_machine_with_nothing(machine: Machine) -> None:
    shield(machine.driver, "libcuda.so.1", "libnvidia-ml.so.1")
    write(machine.site / "max" / "driver.py", FAKE_MAX.format(count=0))
    write(machine.site / "torch.py", "raise ImportError('libcublas.so.13: cannot open shared object file')")
    write(machine.smi, "#!/bin/sh\necho failed\nexit 9", 0o755)
    for file in (machine.site / "nvidia").rglob("*.so.*"):
        file.write_bytes(b"")
    process = machine.run()
    assert (process.returncode, process.stderr) == (1, "")
    table = {line[:20].strip(): line for line in process.stdout.split("\n\n")[0].splitlines()}
    assert "libcuda.so.1: invalid ELF header" in table["driver"]
    assert "ImportError: libcublas.so.13: cannot open shared object file" in table["PyTorch"]
    assert "26.7.0 sees no GPU: CUDA information: no driver" in table["MAX"]
    assert "libcudart.so.13: file too short" in table["libcudart"]
    assert "no libcublasLt, no libcublas" in table["opened by MAX"]


def test_doctor_starts_where_torch_and_max_end_the_process(machine: Machine) -> None:
    for path in ("torch.py", "max/driver.py"):
        write(machine.site / path, "import os, signal\nos.kill(os.getpid(), signal.SIGABRT)")
    process = machine.run("--json")
    rows = rows_of(process)
    assert (process.returncode, process.stderr) == (1, "")
    assert [rows[check]["found"] for check in ("MAX", "PyTorch", "CUDA libraries")] == ["ended by SIGABRT"] * 3
    assert rows["GPU"]["found"] == "NVIDIA Fake, by nvidia-smi"


def test_the_command_line_imports_neither_max_nor_torch() -> None:
    code = "import sys; from maxwhisper.cli import build_parser; import maxwhisper.doctor; build_parser()\n"
    code += "result = [name for name in ('max', 'torch', 'whisper', 'numpy') if name in sys.modules]"
    assert fake_cuda.in_child(code, environment()) == []


def test_a_probe_that_hangs(machine: Machine, ask: Callable[[str], Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    write(machine.site / "torch.py", "import time\ntime.sleep(60)")
    monkeypatch.setattr(doctor, "TIMEOUT", 0.5)
    with pytest.raises(ProbeError, match="no answer within 0.5 s"):
        ask("torch")


def test_what_libraries_print_is_no_answer(machine: Machine, ask: Callable[[str], Answer]) -> None:
    write(
        machine.site / "torch.py",
        FAKE_TORCH + "\nimport atexit\nprint('hello', end='')\natexit.register(print, 'goodbye')",
    )
    assert ask("torch")["version"] == "2.13.0+fake"


def test_an_answer_that_cannot_be_read(machine: Machine, ask: Callable[[str], Answer]) -> None:
    write(machine.site / "torch.py", "import os\nprint('goodbye', flush=True)\nos._exit(0)")
    with pytest.raises(ProbeError, match="its answer cannot be read: goodbye"):
        ask("torch")


def test_files_of_the_working_directory_are_not_imported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    write(machine.folder / "cwd" / "torch.py", "raise RuntimeError('the wrong one')")
    monkeypatch.chdir(machine.folder / "cwd")
    monkeypatch.setattr(os, "environ", machine.env)
    monkeypatch.setattr(sys, "path", ["", str(machine.site), str(ROOT), *sys.path])
    assert doctor.ask("torch")["version"] == "2.13.0+fake"


def test_ctrl_c_ends_the_probe_too(machine: Machine) -> None:
    started = machine.folder / "started"
    code = f"""
import os, time
with open({str(started)!r} + ".part", "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, {str(started)!r})
time.sleep(600)
"""
    write(machine.site / "torch.py", code)
    # Python leaves SIGINT alone where a shell has started it in the background.
    main = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    main += "from maxwhisper.cli import main; sys.exit(main(['doctor']))"
    command = [sys.executable, "-c", main]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=machine.env, **pipes) as process:
        wait_until(started.exists)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, "", "maxwhisper: interrupted\n")
    wait_until(lambda: has_ended(int(started.read_text())))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """Whether a process has ended, its parent having asked for its status or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")
    except OSError:
        return True


def test_the_driver_and_its_gpus(ask: Callable[[str], Answer]) -> None:
    assert ask("driver") == {"version": "580.65.06", "cuda": [13, 0]}
    assert ask("cuda") == {"gpus": [{"name": "NVIDIA Fake", "compute_capability": "9.0"}]}


def test_a_driver_that_fails(machine: Machine, ask: Callable[[str], Answer]) -> None:
    fake_cuda.driver(machine.driver, (12, 4), cuda_status=100, nvml_status=18)
    with pytest.raises(ProbeError, match="^NVML returns status 18: version mismatch$"):
        ask("driver")
    with pytest.raises(ProbeError, match=r"^cuInit returns status 100: no GPU\.$"):
        ask("cuda")


def test_nvidia_smi(machine: Machine, ask: Callable[[str], Answer]) -> None:
    known = {"name": "NVIDIA Fake", "compute_capability": "9.0", "total_bytes": 4 * GIB, "free_bytes": 3 * GIB}
    assert ask("smi") == {"gpus": [known]}
    query = "--query-gpu=name,compute_cap,memory.total,memory.free --format=csv,noheader,nounits\n"
    assert Path(f"{machine.smi}.arguments").read_text() == query
    write(machine.smi, "#!/bin/sh\necho 'NVIDIA Thor, 11.0, [N/A], [N/A]'", 0o755)
    unknown = {"name": "NVIDIA Thor", "compute_capability": "11.0", "total_bytes": None, "free_bytes": None}
    assert ask("smi") == {"gpus": [unknown]}
    write(machine.smi, "#!/bin/sh\necho No devices were found\nexit 6", 0o755)
    with pytest.raises(ProbeError, match="^nvidia-smi ends with status 6: No devices were found$"):
        ask("smi")
    machine.smi.unlink()
    if not any(Path(folder, "nvidia-smi").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        with pytest.raises(ProbeError, match="nvidia-smi"):
            ask("smi")


def test_libraries_follow_torch(machine: Machine, ask: Callable[[str], Answer]) -> None:
    pip(machine.site, (12, 8, 4))
    folder = machine.site / "nvidia" / "cublas" / "lib"
    loads = f"\nimport ctypes\nctypes.CDLL('{folder}/libcublasLt.so.12')\nctypes.CDLL('{folder}/libcublas.so.12')"
    assert ask("libraries")["chosen"]["major"] == 13
    write(machine.site / "torch.py", FAKE_TORCH + loads)
    answer = ask("libraries")
    assert answer["chosen"]["major"] == 12 and answer["versions"]["cublas"] == [12, 8, 4]
    assert answer["opened"]["cublas"] == {"major": 12, "path": f"{folder}/libcublas.so.12", "error": None}


def test_libraries_that_the_dynamic_loader_finds_have_paths(machine: Machine, ask: Callable[[str], Answer]) -> None:
    (machine.site / "nvidia").rename(machine.folder / "gone")
    fake_cuda.put(machine.driver, (13, 0, 2))
    answer = ask("libraries")
    assert answer["files"]["cublas"] == f"{machine.driver}/libcublas.so.13"


def test_the_caches_of_max_and_of_its_graphs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = machine.folder / "graphs"
    write(graphs / "a" / "b.mef", "x" * 500)
    (graphs / "gone").symlink_to("nowhere")
    env = machine.env | {"MODULAR_MAX_CACHE_DIR": str(graphs)}
    monkeypatch.setattr(os, "environ", env)
    answer = doctor.ask("cache")
    assert answer == {"folders": [str(machine.cache), str(graphs)], "files": 3, "bytes": 1500 + len("nowhere")}


def test_gpus_on_the_pci_bus(tmp_path: Path) -> None:
    devices = [("0x10de", "0x030200"), ("0x10de", "0x030000"), ("0x10de", "0x040300"), ("0x8086", "0x030000")]
    for number, (vendor, kind) in enumerate(devices):
        write(tmp_path / str(number) / "vendor", f"{vendor}\n")
        write(tmp_path / str(number) / "class", f"{kind}\n")
    assert doctor.probe_pci(tmp_path) == {"gpus": 2}


# ---- probes on this machine ----------------------------------------------------------------------------------------


def test_max_and_torch_answer_for_themselves() -> None:
    for probe, version in (("max", metadata.version("max")), ("torch", torch.__version__)):
        answer = doctor.ask(probe)
        assert answer["version"] == version
        assert bool(answer["gpus"]) == (answer["error"] is None)


def test_every_probe_answers_or_says_why() -> None:
    answers = doctor.Answers(doctor.ask)
    for probe in doctor.PROBES:
        try:
            assert isinstance(answers[probe], dict)
        except ProbeError as error:
            assert error.probe == probe and re.fullmatch(r"\S.*", str(error))
