"""What stands between this machine and its GPU: the command `maxwhisper doctor`.

A probe asks one part of the machine, in a process of its own, since a damaged driver or library can end the process
that loads it, or hang it. Rows are made from the answers; a probe that fails makes a red row, with its reason.
`python -m maxwhisper.doctor PROBE` runs one probe alone.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..engine import cuda
from .probes import PROBES, Answer, ProbeError, ask
from .report import Report, Row

__all__ = ["Answer", "ProbeError", "Report", "Row", "ask", "examine"]


class Answers(dict[str, Answer]):
    """The answers of all probes, by name; that of one that failed is missing, and to look it up raises ProbeError."""

    def __init__(self, ask: Callable[[str], Answer]):
        super().__init__()
        self.failures: dict[str, ProbeError] = {}
        for probe in PROBES:
            try:
                self[probe] = ask(probe)
            except Exception as error:
                reason = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
                self.failures[probe] = ProbeError(reason, probe)

    def __missing__(self, probe: str) -> Answer:
        raise self.failures[probe]

    def optional(self, probe: str) -> Answer:
        """Returns the answer, or an empty one if the probe failed."""
        return self.get(probe, {})


DRIVER_REMEDY = "install the NVIDIA driver, 580 or newer (https://www.nvidia.com/drivers)"
NO_GPU_REMEDY = (
    "nothing, if the CPU is to compute; else take a machine with an NVIDIA GPU, and start containers on it with "
    "`docker run --gpus all`"
)
VISIBLE_REMEDY = "unset CUDA_VISIBLE_DEVICES, or name a GPU there"
FOLLOWS_REMEDY = "follows from the rows above"
MAX_REMEDY = (
    "MAX needs the NVIDIA driver 580 or newer, or, for an older one, MODULAR_NVPTX_COMPILER_PATH set to a ptxas that "
    "fits it (https://modul.ar/gpu-requirements)"
)
TORCH_REMEDY = "install a CUDA build of PyTorch that the driver supports (https://pytorch.org/get-started/locally)"


def driver_rows(answers: Answers) -> Iterator[Row]:
    try:
        driver = answers["driver"]
    except ProbeError as error:
        in_slot = answers.optional("pci").get("gpus", 0)
        yield Row("driver", "red", str(error), DRIVER_REMEDY if in_slot else NO_GPU_REMEDY)
    else:
        yield Row("driver", "ok", f"{driver['version']}, for CUDA {cuda.dotted(driver['cuda'])} and older", data=driver)


def gpu_rows(answers: Answers) -> Iterator[Row]:
    sources = {"MAX": "max", "PyTorch": "torch", "nvidia-smi": "smi", "libcuda": "cuda"}
    lists = {source: answers.optional(probe).get("gpus") for source, probe in sources.items()}
    source, gpus = next(((source, gpus) for source, gpus in lists.items() if gpus), ("", []))
    if not gpus:
        yield no_gpu_row(answers)
        yield Row("compute capability", "note", "not known without a GPU")
        yield Row("GPU memory", "note", "not known without a GPU")
    for index, gpu in enumerate(gpus):
        number = f" {index}" if len(gpus) > 1 else ""
        yield Row(f"GPU{number}", "ok", f"{gpu['name']}, by {source}", data={"name": gpu["name"], "source": source})
        capability = gpu["compute_capability"]
        yield Row(f"compute capability{number}", "ok", capability, data={"compute_capability": capability})
        yield memory_row(f"GPU memory{number}", gpu)


def no_gpu_row(answers: Answers) -> Row:
    """Says why there is none: what is in the machine, and what the driver says."""
    in_slot = answers.optional("pci").get("gpus")
    found = "none" if in_slot == 0 else "none that the driver gives"
    if in_slot:
        found += f", though the PCI bus has {in_slot}"
    try:
        answers["cuda"]
    except ProbeError as error:
        found += f"; {error}"
    if hidden := hidden_by(answers):
        return Row("GPU", "red", f"{found}; {hidden}", VISIBLE_REMEDY)
    return Row("GPU", "red", found, FOLLOWS_REMEDY if in_slot else NO_GPU_REMEDY)


def hidden_by(answers: Answers) -> str:
    """Says what CUDA_VISIBLE_DEVICES is, if it is set on a machine that has a GPU."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = answers.optional("smi").get("gpus") or answers.optional("pci").get("gpus")
    return f"CUDA_VISIBLE_DEVICES is '{value}'" if value is not None and there else ""


def memory_row(check: str, memory: Answer) -> Row:
    free, total = memory.get("free_bytes"), memory.get("total_bytes")
    data = {"free_bytes": free, "total_bytes": total}
    if free is None or total is None:
        return Row(check, "note", "not known", data=data)
    return Row(check, "ok", f"{size(free)} free of {size(total)}", data=data)


def library_rows(answers: Answers) -> Iterator[Row]:
    libraries, driver = answers["libraries"], answers.optional("driver").get("cuda")
    remedy = cuda.install_hint(driver)
    if any(each["libraries"]["kind"] != cuda.LOADER for each in libraries["rejected"]):
        remedy += ", and remove or reinstall what is incomplete or does not load"
    for library in cuda.LIBRARIES:
        yield library_row(library, libraries, remedy)
    yield opened_row(libraries, driver, remedy)


def library_row(library: str, libraries: Answer, remedy: str) -> Row:
    """Says whether a library is loaded: from where, and which version, or why not."""
    check, chosen = f"lib{library}", libraries["chosen"]
    if library in libraries["versions"]:
        version, path = cuda.dotted(libraries["versions"][library]), libraries["files"][library]
        data = {"loaded": True, "version": version, "path": path, "from": chosen["kind"]}
        return Row(check, "ok", f"{version}, loaded from {path} ({chosen['kind']})", data=data)
    data = {"loaded": False, "version": None, "path": None, "from": None}
    if chosen:  # only libcudart can be missing from a set that is loaded
        return Row(check, "note", f"{chosen['problems'][library]}; MAX does not open it", data=data)
    return Row(check, "red", "; ".join(why_not_loaded(library, libraries["rejected"])) or "not found", remedy, data)


def why_not_loaded(library: str, rejected: Sequence[Answer]) -> list[str]:
    """Returns a reason for each place that has the library, or, if none has it, what the dynamic loader says."""
    reasons = []
    for libraries, reason in ((each["libraries"], each["reason"]) for each in rejected):
        if libraries["kind"] != cuda.LOADER and library in libraries["files"]:
            reasons.append(f"{libraries['files'][library]} is not loaded: {reason}")
        elif "broken link" in libraries["problems"].get(library, ""):
            reasons.append(libraries["problems"][library])
    by_name = [each["reason"] for each in rejected if each["libraries"]["kind"] == cuda.LOADER]
    return reasons or list(dict.fromkeys(reason for reason in by_name if f"lib{library}.so" in reason))


def opened_row(libraries: Answer, driver: Sequence[int] | None, remedy: str) -> Row:
    """Says whether MAX gets the libraries that are loaded: it tries CUDA 13 first, whatever is loaded."""
    check, data = "opened by MAX", libraries["opened"]
    if missing := [f"no lib{library}" for library, each in data.items() if each["error"]]:
        return Row(check, "red", ", ".join(missing), remedy, data)
    found = ", ".join(each["path"] for each in data.values())
    majors = {each["major"] for each in data.values()}
    elsewhere = (
        "MAX tries CUDA 13 first, in LD_LIBRARY_PATH, the dynamic loader's configuration and /usr/local/cuda: remove "
        f"{found} from there, or install a driver for CUDA 13"
    )
    if len(majors) > 1:
        return Row(check, "red", f"{found}: of different CUDA versions", elsewhere, data)
    if driver and max(majors) > driver[0]:
        return Row(check, "red", f"{found}: the driver supports CUDA {cuda.dotted(driver)}", elsewhere, data)
    return Row(check, "ok", found, data=data)


def framework_row(check: str, framework: Answer, remedy: str, answers: Answers) -> Row:
    """Says whether MAX or PyTorch sees a GPU that it can use."""
    count, data = len(framework["gpus"]), {key: value for key, value in framework.items() if key != "gpus"}
    data = {**data, "gpus": count}
    if not count:
        found = f"{framework['version']} sees no GPU: {framework['error'] or 'it does not say why'}"
        if framework.get("cuda", check) is None:  # a PyTorch for the CPU, which would see none anywhere
            return Row(check, "red", found, remedy, data)
        if hidden := hidden_by(answers):
            return Row(check, "red", f"{found}; {hidden}", VISIBLE_REMEDY, data)
        return Row(check, "red", found, remedy if answers.optional("driver") else FOLLOWS_REMEDY, data)
    if not framework["gpus"][0].get("compatible", True):
        return Row(check, "red", f"{framework['version']} does not support this GPU or its driver", remedy, data)
    return Row(check, "ok", f"{framework['version']} sees {count} GPU{'s' if count > 1 else ''}", data=data)


def cache_row(compiled: Answer) -> Row:
    found = f"{size(compiled['bytes'])} in {compiled['files']} files in {' and '.join(compiled['folders'])}"
    return Row("compile cache", "ok", found, data=compiled)


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


ROWS: dict[str, Callable[[Answers], Iterable[Row]]] = {
    "driver": driver_rows,
    "GPU": gpu_rows,
    "CUDA libraries": library_rows,
    "MAX": lambda answers: [framework_row("MAX", answers["max"], MAX_REMEDY, answers)],
    "PyTorch": lambda answers: [framework_row("PyTorch", answers["torch"], TORCH_REMEDY, answers)],
    "compile cache": lambda answers: [cache_row(answers["cache"])],
    "memory": lambda answers: [memory_row("memory", answers["memory"])],
}


def examine(ask: Callable[[str], Answer] = ask) -> Report:
    """Asks every probe and reports on the answers; what cannot be found out is a red row."""
    answers = Answers(ask)
    rows: list[Row] = []
    for check, make in ROWS.items():
        try:
            rows += make(answers)
        except Exception as error:
            rows.append(failed_row(check, error))
    return Report(tuple(rows))


def failed_row(check: str, error: Exception) -> Row:
    if isinstance(error, ProbeError):
        return Row(check, "red", str(error), f"`{sys.executable} -m maxwhisper.doctor {error.probe}` shows all it says")
    return Row(check, "red", f"{type(error).__name__}: {error}", "report this as a defect of `maxwhisper doctor`")
