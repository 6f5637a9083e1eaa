"""Which instructions of its CPU a process may use."""

import ctypes
import logging
import os
import platform
import re
from functools import cache
from pathlib import Path

from ..errors import OptionError

log = logging.getLogger("maxwhisper")

CPU_INFO = Path("/proc/cpuinfo")
CPU = "MAXWHISPER_CPU"
"""The environment variable that names the CPU to compile for, where that is not the machine's own."""

# Names in /proc/cpuinfo of what compilers emit unasked; the other flags differ between machines that run the same code.
EMITTED = re.compile(
    r"pni|ssse3|sse\w*|avx\w*|amx\w*|fma4?|f16c|bmi[12]|abm|movbe|popcnt|cx16|adx|aes|vaes|v?pclmulqdq|gfni|sha\w*|clwb"
)
# CPUs that can be compiled for on another, and what these have, by kind of machine; the first runs nearly everywhere.
X86_64_V3 = [
    *("sse", "sse2", "pni", "ssse3", "sse4_1", "sse4_2", "cx16", "popcnt"),
    *("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"),
]
AVX_512 = ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
CPUS = {"x86_64": {"x86-64-v3": X86_64_V3, "x86-64-v4": [*X86_64_V3, *AVX_512]}}
PORTABLE_CPU = {"x86_64": "x86-64-v3"}
PORTABLE_FEATURES = {machine: CPUS[machine][cpu] for machine, cpu in PORTABLE_CPU.items()}
WITHOUT_AMX = "cooperlake"
"""A CPU that has most of what those with AMX have, but for that."""

# Numbers of Linux, on x86-64: of a system call, of what it is asked for, and of AMX's registers.
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18

# What computes in a dtype, by the names of Intel and Arm, and what of it a CPU may list.
FOR_DTYPE = {
    "bfloat16": ("AVX-512 BF16 or FEAT_BF16", {"avx512_bf16", "bf16"}),
    "float16": ("AVX-512 FP16 or FEAT_FP16", {"avx512_fp16", "asimdhp"}),
}


def cpu_target() -> str | None:
    """Returns the CPU that the environment says to compile for, None for the machine's own.

    Raises OptionError for one that is not known for this kind of machine.
    """
    named, known = os.environ.get(CPU), CPUS.get(platform.machine(), {})
    if named and named not in known:
        expected = " or ".join(known) or f"none on {platform.machine()}"
        raise OptionError(f"{CPU}={named} is not known: expected {expected}")
    return named or None


def virtual_cpu() -> str | None:
    """Returns the CPU to compile for where that is not the machine's own: the one that the environment names, or one
    without AMX where this process may not use it.

    Raises OptionError as `cpu_target` does.
    """
    has_amx = any(name.startswith("amx") for name in listed_features(CPU_INFO))
    return cpu_target() or (WITHOUT_AMX if has_amx and not may_use_amx() else None)


def cpu_features() -> list[str]:
    """Returns the instruction sets that this process may use, as Linux names them; elsewhere the CPU's own name."""
    if target := cpu_target():
        return sorted(CPUS[platform.machine()][target])
    features = listed_features(CPU_INFO)
    return features if may_use_amx() else [name for name in features if not name.startswith("amx")]


@cache
def may_use_amx() -> bool:
    """Asks Linux for the registers of AMX, Intel's unit for products; returns whether this process has them now, with
    all its threads and forks. A sandbox refuses, and a kernel before 5.16."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


def listed_features(cpuinfo: Path) -> list[str]:
    """Returns the instruction sets that a file like /proc/cpuinfo names, or where there is none, the CPU's own name."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return [platform.processor()]
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    listed = {name.strip(): value.split() for name, value in named.items()}
    if "Features" in listed:  # Arm
        return sorted(listed["Features"])
    return sorted(flag for flag in listed.get("flags", []) if EMITTED.fullmatch(flag))


@cache
def warn_of_slow_dtype(dtype: str) -> None:
    """Says once where the CPU has no instructions for arithmetic in a dtype, and what that costs; nothing where it is
    not known what the CPU has."""
    instructions, names = FOR_DTYPE.get(dtype, ("", set()))
    if not instructions or platform.system() != "Linux" or names & set(cpu_features()):
        return
    log.warning(
        "dtype %s: this CPU has no instructions for it (%s), so every number is converted to float32 and back, which"
        " makes encoding two to three times slower than in float32; float32, the default, is faster and more accurate",
        *(dtype, instructions),
    )
