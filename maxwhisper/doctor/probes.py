"""Probes: each asks one part of the machine, in a process of its own that `ask` starts, and answers in JSON."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..children import python_path
from ..engine import cuda

TIMEOUT = 120.0
"""Seconds for one probe; from a cold disk, importing MAX or PyTorch takes most of a minute."""

Answer = Mapping[str, Any]


class ProbeError(Exception):
    """A probe, of this name if it is known, that has no answer; the message is why."""

    def __init__(self, message: str, probe: str = ""):
        super().__init__(message)
        self.probe = probe


def probe_pci(bus: Path = Path("/sys/bus/pci/devices")) -> Answer:
    """Counts the display controllers of NVIDIA that the kernel lists, with a driver or without."""
    kinds = [((each / "vendor").read_text().strip(), (each / "class").read_text()[:4]) for each in bus.iterdir()]
    return {"gpus": kinds.count(("0x10de", "0x03"))}


def probe_driver() -> Answer:
    """Finds the version of the driver, and the CUDA version that it supports. MAX opens both of its libraries."""
    libcuda, nvml = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
    number, version = ctypes.c_int(), ctypes.create_string_buffer(80)
    check_cuda(libcuda, "cuDriverGetVersion", ctypes.byref(number))
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    if status := nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(version, len(version)):
        raise ProbeError(f"NVML returns status {status}: {nvml.nvmlErrorString(status).decode()}")
    return {"version": version.value.decode(), "cuda": [number.value // 1000, number.value % 1000 // 10]}


def probe_cuda() -> Answer:
    """Finds the GPUs that the driver gives to this process: those that CUDA_VISIBLE_DEVICES leaves."""
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
    """Finds the GPUs that nvidia-smi lists, whatever CUDA_VISIBLE_DEVICES says."""
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
    """Finds MAX, and the GPUs that it sees; `error` is why it sees none."""
    from importlib import metadata  # a third of what a probe imports

    from max.driver import Accelerator, accelerator_count

    def see() -> list[Answer]:
        gpus = [max_gpu(Accelerator(index)) for index in range(accelerator_count())]
        if not gpus:
            Accelerator()  # raises, and says why there is none
        return gpus

    return {"version": metadata.version("max"), **seen(see)}


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
    """Finds PyTorch, and the GPUs that it sees; `error` is why it sees none."""
    import torch

    def see() -> list[Answer]:
        torch.cuda.init()  # raises, and says why, where is_available() says no
        return [torch_gpu(torch.cuda, index) for index in range(torch.cuda.device_count())]

    return {"version": torch.__version__, "cuda": torch.version.cuda, **seen(see)}


def torch_gpu(torch_cuda: Any, index: int) -> Answer:
    free, total = torch_cuda.mem_get_info(index)
    capability = ".".join(map(str, torch_cuda.get_device_capability(index)))
    name = torch_cuda.get_device_name(index)
    return {"name": name, "compute_capability": capability, "total_bytes": total, "free_bytes": free}


def seen(see: Callable[[], list[Answer]]) -> Answer:
    """Returns the GPUs that `see` gives, or why it raises, in one line."""
    try:
        return {"gpus": see(), "error": None}
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        # MAX reports on every kind of GPU that it knows.
        return {"gpus": [], "error": next((line for line in lines if line.startswith("CUDA information: ")), lines[0])}


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
    """Finds where MAX keeps what it has compiled, and how much that is."""
    from mojo.run import subprocess_run_mojo

    result = subprocess_run_mojo(["--print-cache-location"], capture_output=True, check=True, text=True)
    folders = [str(Path(result.stdout.strip()).parent)]  # what it prints is the Mojo compiler's part
    if graphs := os.environ.get("MODULAR_MAX_CACHE_DIR"):
        folders.append(graphs)
    files = [os.path.join(folder, name) for top in folders for folder, _, names in os.walk(top) for name in names]
    return {"folders": folders, "files": len(files), "bytes": sum(os.lstat(file).st_size for file in files)}


def probe_memory() -> Answer:
    """Finds the machine's memory, and how much of it programs can still get."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return {"total_bytes": total, "free_bytes": free}


PROBES = {
    probe.__name__.removeprefix("probe_"): probe
    for probe in (
        *(probe_pci, probe_driver, probe_cuda, probe_smi, probe_max, probe_torch),
        *(probe_libraries, probe_cache, probe_memory),
    )
}
"""The probes by name, in the order in which they are asked."""


def main() -> None:
    """Prints the answer of the probe that the command line names, as the last line of standard output."""
    print("\n" + json.dumps(PROBES[sys.argv[1]]()), flush=True)
    os._exit(0)  # what libraries say or do at their end is not part of the answer


def ask(probe: str) -> Answer:
    """Returns a probe's answer, from a process of its own. Raises ProbeError if it has none."""
    command = [sys.executable, "-P", "-m", "maxwhisper.doctor", probe]
    # The same packages as here, and no file of the working directory in their place.
    env = {**os.environ, "PYTHONPATH": python_path()}
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        result = subprocess.run(command, env=env, timeout=TIMEOUT, **options)
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no answer within {TIMEOUT:g} s") from error
    if result.returncode < 0:
        raise ProbeError(f"ended by {signal.Signals(-result.returncode).name}")
    if result.returncode:
        # The last line of a traceback, without the name of an error whose text says enough.
        raise ProbeError(re.sub(r"^(OSError|[\w.]+\.ProbeError): ", "", last_line(result.stderr)))
    try:
        return json.loads(last_line(result.stdout))
    except ValueError as error:
        raise ProbeError(f"its answer cannot be read: {last_line(result.stdout)}") from error


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["it says nothing"])[-1]
