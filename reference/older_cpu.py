"""Running as on a CPU with fewer instructions than this machine's: `pytest --cpu x86-64-v3`.

Everything that chooses its code by the CPU is told by the environment, which other processes of a run inherit. Most of
it is read once, when PyTorch and NumPy are imported.
"""

import argparse
import os
import shlex
import sys

from maxwhisper.engine.instructions import CPU

AS_ON = {
    "x86-64-v3": {
        CPU: "x86-64-v3",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "Haswell",
        "CT2_FORCE_CPU_ISA": "AVX2",
    },
    "x86-64-v4": {
        CPU: "x86-64-v4",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "NPY_DISABLE_CPU_FEATURES": "AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "SkylakeX",
        "CT2_FORCE_CPU_ISA": "AVX512",
    },
}
"""What the environment of MAX, PyTorch (its own code, oneDNN, MKL), NumPy, OpenBLAS and CTranslate2 says, by CPU."""


def asked_for() -> str | None:
    """Returns the CPU that this command line names, before pytest has read it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cpu")
    given = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *sys.argv[1:]]
    return parser.parse_known_args(given)[0].cpu


def as_on(cpu: str | None) -> None:
    """Sets the environment for a CPU of AS_ON; a name that is not there is left for pytest to refuse."""
    os.environ.update(AS_ON.get(cpu or "", {}))


def heeded(cpu: str) -> bool:
    """Returns whether this process computes as on a CPU of AS_ON."""
    import torch  # not before the environment is set

    told = all(os.environ.get(name) == value for name, value in AS_ON[cpu].items())
    return told and torch.backends.cpu.get_cpu_capability().lower() == AS_ON[cpu]["ATEN_CPU_CAPABILITY"]
