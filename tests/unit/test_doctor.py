"""`maxwhisper doctor`: what it says of machines that lack something."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from maxwhisper import __version__, cli, doctor
from maxwhisper.doctor import Answer, ProbeError, Report, Row, examine

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
    """Returns the report on a machine that has everything but for `changes`: other answers, or why there is none."""
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
    assert report.summary == "MAX and PyTorch see the GPU, and the CUDA libraries load."


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
    assert report.summary == (
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
        assert report.summary.startswith("The GPU is there, but --device gpu cannot be relied on")


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
    table, summary, remedies = report.text().split("\n\n")
    head, *lines = table.splitlines()
    assert head.split() == ["check", "state", "found"]
    assert len(lines) == len(report.rows) == len(CHECKS)
    for line, each in zip(lines, report.rows, strict=True):
        assert re.fullmatch(rf"{re.escape(each.check)} +{each.state} +{re.escape(each.found)}", line)
    assert len({line.index(each.state, len(each.check)) for line, each in zip(lines, report.rows, strict=True)}) == 1
    assert summary == report.summary
    remedied = [line[2:].split(": ", 1) for line in remedies.splitlines()[1:]]
    expected = {check: row(report, check).remedy for check in red(report)}
    assert {check: remedy for checks, remedy in remedied for check in checks.split(", ")} == expected
    assert len(remedied) == len(set(expected.values())) < len(expected)


def test_nothing_is_to_be_done_where_all_is_well() -> None:
    assert report_on().text().endswith(report_on().summary)


def test_json_holds_all_that_is_known() -> None:
    report = report_on(MACHINES["not a library"][0])
    document = json.loads(report.json())
    assert set(document) == {"version", "maxwhisper", "ok", "summary", "rows"}
    assert (document["version"], document["maxwhisper"], document["ok"]) == (2, __version__, False)
    assert document["summary"] == report.summary
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
