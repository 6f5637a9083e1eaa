"""`maxwhisper doctor`: what it asks a machine, and that nothing on one can bring it down."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maxwhisper import doctor
from maxwhisper.doctor import Answer, ProbeError, probes

from . import fake_cuda
from .fake_cuda import ROOT, environment, pip, shield

GIB = 2**30

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
cuda.locations = partial(cuda.locations, [{site!r}], {{}}, Path({folder!r}))
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
    monkeypatch.setattr(probes, "TIMEOUT", 0.5)
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
    """Tells whether a process has ended, its parent having asked for its status or not."""
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
    assert probes.probe_pci(tmp_path) == {"gpus": 2}


@pytest.mark.parametrize(
    ("architecture", "capability"),
    [("sm_75", "7.5"), ("sm_90a", "9.0"), ("sm_100a", "10.0"), ("sm_121", "12.1"), ("gfx942", "gfx942")],
)
def test_the_compute_capability_of_an_architecture(architecture: str, capability: str) -> None:
    stats = {"free_memory": 0, "total_memory": 4 * GIB}  # MAX gives 0 for what it does not know
    gpu = SimpleNamespace(model_name="GPU", architecture_name=architecture, stats=stats, is_compatible=True)
    answer = probes.max_gpu(gpu)
    assert (answer["compute_capability"], answer["free_bytes"]) == (capability, None)


# ---- probes on this machine ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers() -> doctor.Answers:
    return doctor.Answers(doctor.ask)


def test_max_and_torch_answer_for_themselves(answers: doctor.Answers) -> None:
    for probe, version in (("max", metadata.version("max")), ("torch", torch.__version__)):
        assert answers[probe]["version"] == version
        assert bool(answers[probe]["gpus"]) == (answers[probe]["error"] is None)


def test_every_probe_answers_or_says_why(answers: doctor.Answers) -> None:
    for probe in doctor.PROBES:
        try:
            assert isinstance(answers[probe], dict)
        except ProbeError as error:
            assert error.probe == probe and re.fullmatch(r"\S.*", str(error))
