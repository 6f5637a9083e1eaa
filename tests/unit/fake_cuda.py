"""CUDA libraries, drivers and the places that hold them, as far as maxwhisper looks, for machines without a GPU.

The libraries are real ones, which answer with the version they were made for. They are made by LLVM, which
openai-whisper brings (numba, llvmlite), and by the linker that MAX brings, as not every machine has a C compiler.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from mojo._package_root import get_package_root

from reference.fixtures import ROOT

LIBRARIES = ("cudart", "cublasLt", "cublas")
Version = tuple[int, int, int]

# What CUDA's calls return is a status; 0 is success.
PROPERTY = """
@version = private constant [3 x i32] [i32 {0}, i32 {1}, i32 {2}]
define i32 @{name}GetProperty(i32 %part, ptr %value) {{
  %place = getelementptr [3 x i32], ptr @version, i32 0, i32 %part
  %number = load i32, ptr %place
  store i32 %number, ptr %value
  ret i32 0
}}
"""
CUDART = """
define i32 @cudaRuntimeGetVersion(ptr %value) {{
  store i32 {number}, ptr %value
  ret i32 0
}}
"""
# One GPU, of compute capability 9.0, where cuInit succeeds.
LIBCUDA = """
@gpu = private constant [12 x i8] c"NVIDIA Fake\\00"
@why = private constant [8 x i8] c"no GPU.\\00"
declare ptr @memcpy(ptr, ptr, i64)
define i32 @cuInit(i32 %flags) {{
  ret i32 {status}
}}
define i32 @cuDriverGetVersion(ptr %value) {{
  store i32 {number}, ptr %value
  ret i32 0
}}
define i32 @cuDeviceGetCount(ptr %value) {{
  store i32 1, ptr %value
  ret i32 0
}}
define i32 @cuDeviceGet(ptr %value, i32 %ordinal) {{
  store i32 %ordinal, ptr %value
  ret i32 0
}}
define i32 @cuDeviceGetName(ptr %name, i32 %length, i32 %device) {{
  call ptr @memcpy(ptr %name, ptr @gpu, i64 12)
  ret i32 0
}}
define i32 @cuDeviceGetAttribute(ptr %value, i32 %attribute, i32 %device) {{
  %major = icmp eq i32 %attribute, 75
  %number = select i1 %major, i32 9, i32 0
  store i32 %number, ptr %value
  ret i32 0
}}
define i32 @cuGetErrorString(i32 %status, ptr %text) {{
  store ptr @why, ptr %text
  ret i32 0
}}
"""
NVML = """
@version = private constant [10 x i8] c"580.65.06\\00"
@why = private constant [17 x i8] c"version mismatch\\00"
declare ptr @memcpy(ptr, ptr, i64)
define i32 @nvmlInit_v2() {{
  ret i32 {status}
}}
define i32 @nvmlSystemGetDriverVersion(ptr %version, i32 %length) {{
  call ptr @memcpy(ptr %version, ptr @version, i64 10)
  ret i32 0
}}
define ptr @nvmlErrorString(i32 %status) {{
  ret ptr @why
}}
"""
EMPTY = "define i32 @unrelated() {{ ret i32 0 }}"


@cache
def shared_library(code: str, soname: str, needs: bytes = b"", needed: str = "") -> bytes:
    """Writes a shared library of this LLVM code; `needs` is a library that it is linked with, called `needed`."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic", codemodel="default")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "code.o").write_bytes(machine.emit_object(llvm.parse_assembly(code)))
        inputs = ["code.o"]
        if needed:
            (folder / needed).write_bytes(needs)
            inputs += ["--no-as-needed", needed]
        command = [str(get_package_root() / "bin" / "lld"), "-flavor", "gnu", "-shared", "-soname", soname]
        subprocess.run([*command, "-o", "library.so", *inputs], cwd=folder, check=True)
        return (folder / "library.so").read_bytes()


def cuda_library(library: str, version: Version, major: int = 0) -> bytes:
    """Writes cudart, cublasLt or cublas of a version, under the name of a CUDA major version if that is another."""
    soname = f"lib{library}.so.{major or version[0]}"
    if library == "cudart":
        return shared_library(CUDART.format(number=1000 * version[0] + 10 * version[1]), soname)
    code = PROPERTY.format(*version, name=library)
    if library == "cublasLt":
        return shared_library(code, soname)
    needed = soname.replace("cublas", "cublasLt")
    return shared_library(code, soname, shared_library(EMPTY.format(), needed), needed)


def put(folder: Path, version: Version, libraries: Sequence[str] = LIBRARIES) -> Path:
    """Puts libraries of a version into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        (folder / f"lib{library}.so.{version[0]}").write_bytes(cuda_library(library, version))
    return folder


def pip(site: Path, version: Version) -> Path:
    """Writes what NVIDIA's wheels leave in a folder of packages: one folder since CUDA 13, before that one each."""
    if version[0] >= 13:
        put(site / "nvidia" / f"cu{version[0]}" / "lib", version)
    else:
        put(site / "nvidia" / "cuda_runtime" / "lib", version, ["cudart"])
        put(site / "nvidia" / "cublas" / "lib", version, ["cublasLt", "cublas"])
    return site


def driver(folder: Path, cuda: tuple[int, int], cuda_status: int = 0, nvml_status: int = 0) -> Path:
    """Writes the libraries of a driver that supports a CUDA version."""
    folder.mkdir(parents=True, exist_ok=True)
    code = LIBCUDA.format(number=1000 * cuda[0] + 10 * cuda[1], status=cuda_status)
    (folder / "libcuda.so.1").write_bytes(shared_library(code, "libcuda.so.1"))
    (folder / "libnvidia-ml.so.1").write_bytes(shared_library(NVML.format(status=nvml_status), "libnvidia-ml.so.1"))
    return folder


def shield(folder: Path, *names: str) -> Path:
    """Writes files that end the dynamic loader's search, so that it finds none that this machine may have."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or [f"lib{library}.so.{major}" for library in LIBRARIES for major in (12, 13)]:
        (folder / name).write_text("This is no library. " * 10)
    return folder


def environment(packages: Sequence[Path] = (), libraries: Sequence[Path] = (), **variables: str) -> dict[str, str]:
    """Returns an environment with folders of Python packages and of shared libraries."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "CONDA_", "MODULAR_"))}
    env["PYTHONPATH"] = os.pathsep.join(map(str, [*packages, ROOT]))
    env["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, libraries))
    return env | variables


def in_child(code: str, env: dict[str, str]) -> Any:
    """Returns what the code leaves in `result`, run by a Python of its own, since libraries do not leave a process."""
    code += "\nimport json; print(json.dumps(result))"
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])
