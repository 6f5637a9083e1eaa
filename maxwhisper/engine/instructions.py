"""Which instructions of its CPU a process may use."""

import logging
import os
import platform
import re
from functools import cache
from pathlib import Path

from ..errors import OptionError

log = logging.getLogger("maxwhisper")

CPU = "MAXWHISPER_CPU"
"""The environment variable that names the CPU to compile for, where that is not the machine's own."""

# Names in /proc/cpuinfo of what compilers emit unasked; the other flags differ between machines that run the same code.
EMITTED = re.compile(
    r"pni|ssse3|sse\w*|avx\w*|amx\w*|fma4?|f16c|bmi[12]|abm|movbe|popcnt|cx16|adx|aes|vaes|v?pclmulqdq|gfni|sha\w*|clwb"
)
# What runs on nearly every CPU, and what it has, by kind of machine.
PORTABLE_CPU = {"x86_64": "x86-64-v3"}
PORTABLE_FEATURES = {
    "x86_64": [
        *("sse", "sse2", "pni", "ssse3", "sse4_1", "sse4_2", "cx16", "popcnt"),
        *("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"),
    ],
}

# What computes in a dtype, by the names of Intel and Arm, and what of it a CPU may list.
FOR_DTYPE = {
    "bfloat16": ("AVX-512 BF16 or FEAT_BF16", {"avx512_bf16", "bf16"}),
    "float16": ("AVX-512 FP16 or FEAT_FP16", {"avx512_fp16", "asimdhp"}),
}


def cpu_target() -> str | None:
    """Returns the CPU that the environment says to compile for, None for the machine's own.

    Raises OptionError for one that is not known for this kind of machine.
    """
    named, known = os.environ.get(CPU), PORTABLE_CPU.get(platform.machine())
    if named and named != known:
        raise OptionError(f"{CPU}={named} is not known: expected {known or f'none on {platform.machine()}'}")
    return named or None


def cpu_features() -> list[str]:
    """Returns the instruction sets that this process may use, as Linux names them; elsewhere the CPU's own name."""
    if cpu_target():
        return sorted(PORTABLE_FEATURES[platform.machine()])
    return listed_features(Path("/proc/cpuinfo"))


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
