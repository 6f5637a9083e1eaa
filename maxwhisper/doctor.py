"""What stands between this machine and its GPU: the command `maxwhisper doctor`.

A probe asks one part of the machine, in a process of its own, since a damaged driver or library can end the process
that loads it, or hang it. Rows are made from the answers; a probe that fails makes a red row, with its reason.
`python -m maxwhisper.doctor PROBE` runs one probe alone.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from . import __version__
from .engine import cuda

JSON_VERSION = 1  # raised when a field goes or changes its meaning
TIMEOUT = 120.0  # seconds for one probe; from a cold disk, importing MAX or PyTorch takes most of a minute

Answer = Mapping[str, Any]


class ProbeError(Exception):
    """A probe, of this name if it is known, that has no answer; the message is why."""

    def __init__(self, message: str, probe: str = ""):
        super().__init__(message)
        self.probe = probe


# ---- what is reported ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    state: "ok"; "red" if it keeps a GPU from being used, or if its probe failed; "note" if it is unknown or missing and
        MAX does without.
    found: what is there, in one line.
    remedy: what to do about it, if it is red.
    data: the same for machines. Sizes are in bytes; what is not known is null.
    """

    check: str
    state: Literal["ok", "note", "red"]
    found: str
    remedy: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All rows; what comes first can be the cause of what comes after."""

    rows: tuple[Row, ...]

    @property
    def red(self) -> list[Row]:
        return [row for row in self.rows if row.state == "red"]

    @property
    def verdict(self) -> str:
        if not self.red:
            return "MAX and PyTorch see the GPU, and the CUDA libraries load."
        if any(row.check in ("driver", "GPU") for row in self.red):
            return "There is no NVIDIA GPU that can be used here: --device gpu fails, --device cpu does not need one."
        return "The GPU is there, but --device gpu cannot be relied on until what is red is put right."

    def text(self) -> str:
        """A table, the verdict, and what to do about the red rows."""
        table = [("check", "state", "found"), *((row.check, row.state, row.found) for row in self.rows)]
        width = max(len(check) for check, _, _ in table)
        lines = [f"{check:{width}}  {state:5}  {found}" for check, state, found in table]
        lines += ["", self.verdict]
        if self.red:
            lines += ["", "What to do about the red rows, from the top, as one can be the cause of those below it:"]
        for remedy in dict.fromkeys(row.remedy for row in self.red):
            lines.append(f"- {', '.join(row.check for row in self.red if row.remedy == remedy)}: {remedy}")
        return "\n".join(lines)

    def json(self) -> str:
        head = {"version": JSON_VERSION, "maxwhisper": __version__, "ok": not self.red, "verdict": self.verdict}
        return json.dumps({**head, "rows": [asdict(row) for row in self.rows]}, indent=2)


# ---- probes --------------------------------------------------------------------------------------------------------


def probe_pci(bus: Path = Path("/sys/bus/pci/devices")) -> Answer:
    """How many display controllers of NVIDIA the kernel lists, with a driver or without."""
    kinds = [((each / "vendor").read_text().strip(), (each / "class").read_text()[:4]) for each in bus.iterdir()]
    return {"gpus": kinds.count(("0x10de", "0x03"))}


def probe_driver() -> Answer:
    """The version of the driver, and the CUDA version that it supports. MAX opens both of its libraries."""
    libcuda, nvml = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
    number, version = ctypes.c_int(), ctypes.create_string_buffer(80)
    check_cuda(libcuda, "cuDriverGetVersion", ctypes.byref(number))
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    if status := nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
        raise ProbeError(f"NVML returns status {status}: {nvml.nvmlErrorString(status).decode()}")
    return {"version": version.value.decode(), "cuda": [number.value // 1000, number.value % 1000 // 10]}


def probe_cuda() -> Answer:
    """The GPUs that the driver gives to this process: those that CUDA_VISIBLE_DEVICES leaves."""
    libcuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    check_cuda(libcuda, "cuInit", 0)
    check_cuda(libcuda, "cuDeviceGetCount", ctypes.byref(count))
    return {"gpus": [cuda_gpu(libcuda, ordinal) for ordinal in range(count.value)]}


def cuda_gpu(libcuda: ctypes.CDLL, ordinal: int) -> Answer:
    device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    check_cuda(libcuda, "cuDeviceGet", ctypes.byref(device), ordinal)
    check_cuda(libcuda, "cuDeviceGetName", name, len(name), device)
    for attribute, number in ((75, major), (76, minor)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        check_cuda(libcuda, "cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
    return {"name": name.value.decode(), "compute_capability": f"{major.value}.{minor.value}"}


def check_cuda(libcuda: ctypes.CDLL, call: str, *arguments: Any) -> None:
    if status := libcuda[call](*arguments):
        text = ctypes.c_char_p()
        libcuda.cuGetErrorString(status, ctypes.byref(text))
        raise ProbeError(f"{call} returns status {status}: {(text.value or b'unknown').decode()}")


def probe_smi() -> Answer:
    """The GPUs that nvidia-smi lists, whatever CUDA_VISIBLE_DEVICES says."""
    query = "--query-gpu=name,compute_cap,memory.total,memory.free"
    result = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    if result.returncode:
        raise ProbeError(f"nvidia-smi ends with status {result.returncode}: {last_line(result.stdout + result.stderr)}")
    gpus = []
    for line in result.stdout.splitlines():
        name, capability, *memory = (cell.strip() for cell in line.split(","))
        total, free = (int(cell) * 2**20 if cell.isdigit() else None for cell in memory)  # MiB, or "[N/A]"
        gpus.append({"name": name, "compute_capability": capability, "total_bytes": total, "free_bytes": free})
    return {"gpus": gpus}


def probe_max() -> Answer:
    """MAX, and the GPUs that it sees; `error` is why it sees none."""
    from max.driver import Accelerator, accelerator_count

    answer: dict[str, Any] = {"version": metadata.version("max"), "gpus": [], "error": None}
    try:
        answer["gpus"] = [max_gpu(Accelerator(index)) for index in range(accelerator_count())]
        if not answer["gpus"]:
            Accelerator()  # raises, and says why there is none
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        # It reports on every kind of GPU that it knows.
        answer["error"] = next((line for line in lines if line.startswith("CUDA information: ")), lines[0])
    return answer


def max_gpu(gpu: Any) -> Answer:
    architecture = re.fullmatch(r"sm_(\d+)(\d)[a-z]?", gpu.architecture_name)
    return {
        "name": gpu.model_name,
        "compute_capability": f"{architecture[1]}.{architecture[2]}" if architecture else gpu.architecture_name,
        "total_bytes": gpu.stats.get("total_memory") or None,  # 0 where MAX does not know
        "free_bytes": gpu.stats.get("free_memory") or None,
        "compatible": gpu.is_compatible,
    }


def probe_torch() -> Answer:
    """PyTorch, and the GPUs that it sees; `error` is why it sees none."""
    import torch

    answer: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "error": None}
    try:
        torch.cuda.init()  # raises, and says why, where is_available() says no
        answer["gpus"] = [torch_gpu(torch.cuda, index) for index in range(torch.cuda.device_count())]
    except Exception as error:
        answer["error"] = (str(error).splitlines() or [repr(error)])[0]
    return answer


def torch_gpu(torch_cuda: Any, index: int) -> Answer:
    free, total = torch_cuda.mem_get_info(index)
    capability = ".".join(map(str, torch_cuda.get_device_capability(index)))
    name = torch_cuda.get_device_name(index)
    return {"name": name, "compute_capability": capability, "total_bytes": total, "free_bytes": free}


def probe_libraries() -> Answer:
    """Loads the CUDA libraries as a transcription does, after PyTorch, and opens them as MAX does."""
    with suppress(Exception):  # a probe of its own says why
        import torch  # noqa: F401
    result = cuda.preload()
    files = dict(result.chosen.files) if result.chosen else {}
    for (library, major), path in cuda.loaded().items():
        if result.chosen and major == result.chosen.major:
            files[library] = path  # for what was opened by name alone
    return {**asdict(result), "files": files, "opened": {name: opened(name) for name in cuda.OPENED_BY_MAX}}


def opened(library: str) -> Answer:
    try:
        major, path = cuda.open_as_max(library)
    except OSError as error:
        return {"major": None, "path": None, "error": str(error)}
    return {"major": major, "path": path, "error": None}


def probe_cache() -> Answer:
    """Where MAX keeps what it has compiled, and how much that is."""
    from mojo.run import subprocess_run_mojo

    result = subprocess_run_mojo(["--print-cache-location"], capture_output=True, check=True, text=True)
    folders = [str(Path(result.stdout.strip()).parent)]  # what it prints is the Mojo compiler's part
    if graphs := os.environ.get("MODULAR_MAX_CACHE_DIR"):
        folders.append(graphs)
    files = [os.path.join(folder, name) for top in folders for folder, _, names in os.walk(top) for name in names]
    return {"folders": folders, "files": len(files), "bytes": sum(os.lstat(file).st_size for file in files)}


def probe_memory() -> Answer:
    """The machine's memory, and how much of it programs can still get."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return {"total_bytes": total, "free_bytes": free}


PROBES: dict[str, Callable[[], Answer]] = {
    "pci": probe_pci,
    "driver": probe_driver,
    "cuda": probe_cuda,
    "smi": probe_smi,
    "max": probe_max,
    "torch": probe_torch,
    "libraries": probe_libraries,
    "cache": probe_cache,
    "memory": probe_memory,
}


def main() -> None:
    """Prints the answer of the probe that the command line names, as the last line of standard output."""
    print("\n" + json.dumps(PROBES[sys.argv[1]]()), flush=True)
    os._exit(0)  # what libraries say or do at their end is not part of the answer


def ask(probe: str) -> Answer:
    """A probe's answer, from a process of its own. Raises ProbeError if it has none."""
    command = [sys.executable, "-P", "-m", "maxwhisper.doctor", probe]
    # The same packages as here, and no file of the working directory in their place.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        result = subprocess.run(command, env=env, timeout=TIMEOUT, **options)
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no answer within {TIMEOUT:g} s") from error
    if result.returncode < 0:
        raise ProbeError(f"ended by {signal.Signals(-result.returncode).name}")
    if result.returncode:
        # The last line of a traceback, without the name of an error whose text says enough.
        raise ProbeError(re.sub(r"^(OSError|ProbeError): ", "", last_line(result.stderr)))
    try:
        return json.loads(last_line(result.stdout))
    except ValueError as error:
        raise ProbeError(f"its answer cannot be read: {last_line(result.stdout)}") from error


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["it says nothing"])[-1]


# ---- rows ----------------------------------------------------------------------------------------------------------


class Answers:
    """The answers of all probes, by name."""

    def __init__(self, ask: Callable[[str], Answer]):
        self._answers: dict[str, Answer] = {}
        self._failures: dict[str, ProbeError] = {}
        for probe in PROBES:
            try:
                self._answers[probe] = ask(probe)
            except Exception as error:
                reason = str(error) if isinstance(error, ProbeError) else f"{type(error).__name__}: {error}"
                self._failures[probe] = ProbeError(reason, probe)

    def __getitem__(self, probe: str) -> Answer:
        """Raises ProbeError if the probe failed."""
        if probe in self._failures:
            raise self._failures[probe]
        return self._answers[probe]

    def optional(self, probe: str) -> Answer:
        """Empty if the probe failed."""
        return self._answers.get(probe, {})


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
    """Why there is none: what is in the machine, and what the driver says."""
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
    """What CUDA_VISIBLE_DEVICES is, if it is set on a machine that has a GPU."""
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
    """Whether a library is loaded: from where, and which version, or why not."""
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
    """A reason for each place that has the library; what the dynamic loader says, if there is none."""
    reasons = []
    for libraries, reason in ((each["libraries"], each["reason"]) for each in rejected):
        if libraries["kind"] != cuda.LOADER and library in libraries["files"]:
            reasons.append(f"{libraries['files'][library]} is not loaded: {reason}")
        elif "broken link" in libraries["problems"].get(library, ""):
            reasons.append(libraries["problems"][library])
    by_name = [each["reason"] for each in rejected if each["libraries"]["kind"] == cuda.LOADER]
    return reasons or list(dict.fromkeys(reason for reason in by_name if f"lib{library}.so" in reason))


def opened_row(libraries: Answer, driver: Sequence[int] | None, remedy: str) -> Row:
    """Whether MAX gets the libraries that are loaded: it tries CUDA 13 first, whatever is loaded."""
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


def max_rows(answers: Answers) -> Iterator[Row]:
    yield framework_row("MAX", answers["max"], MAX_REMEDY, answers)


def torch_rows(answers: Answers) -> Iterator[Row]:
    yield framework_row("PyTorch", answers["torch"], TORCH_REMEDY, answers)


def framework_row(check: str, framework: Answer, remedy: str, answers: Answers) -> Row:
    """Whether MAX or PyTorch sees a GPU that it can use."""
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


def cache_rows(answers: Answers) -> Iterator[Row]:
    compiled = answers["cache"]
    found = f"{size(compiled['bytes'])} in {compiled['files']} files in {' and '.join(compiled['folders'])}"
    yield Row("compile cache", "ok", found, data=compiled)


def memory_rows(answers: Answers) -> Iterator[Row]:
    yield memory_row("memory", answers["memory"])


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


ROWS: dict[str, Callable[[Answers], Iterator[Row]]] = {
    "driver": driver_rows,
    "GPU": gpu_rows,
    "CUDA libraries": library_rows,
    "MAX": max_rows,
    "PyTorch": torch_rows,
    "compile cache": cache_rows,
    "memory": memory_rows,
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


if __name__ == "__main__":
    main()
