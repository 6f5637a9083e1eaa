"""Computing as on a CPU with fewer instructions: whoever chooses code by the CPU is told so, and in time."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

import maxwhisper.whisper
from maxwhisper import load_model
from maxwhisper.engine import instructions, session
from maxwhisper.engine.artifacts import HOST, Writer
from maxwhisper.engine.instructions import (
    CPU,
    CPUS,
    PORTABLE_FEATURES,
    cpu_features,
    cpu_target,
    virtual_cpu,
    warn_of_slow_dtype,
)
from maxwhisper.errors import OptionError
from reference.fixtures import NANO
from reference.older_cpu import AS_ON, asked_for, heeded

V3 = "x86-64-v3"


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the machine be x86-64, with an environment that says nothing of its CPU."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in [*AS_ON[V3], "PYTEST_ADDOPTS"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("arguments", "more", "expected"),
    [
        (["tests/unit", "--cpu", V3], "", V3),
        ([f"--cpu={V3}", "-k", "mlp", "--unknown"], "", V3),
        ([], f"-q --cpu {V3}", V3),
        (["tests", "--cpus", "2"], "", None),
        ([], "", None),
    ],
)
def test_the_cpu_is_known_before_pytest_reads_its_options(
    arguments: list[str], more: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest", *arguments])
    monkeypatch.setenv("PYTEST_ADDOPTS", more)
    assert asked_for() == expected


def test_what_was_not_told_in_time_is_seen() -> None:
    assert not heeded(V3)


CHILD = """
import sys
from reference.older_cpu import as_on, heeded
as_on(sys.argv[1])
assert heeded(sys.argv[1])
import numpy
found = numpy.show_config("dicts")["SIMD Extensions"]["found"]
assert not [name for name in found if "512" in name or "V4" in name and sys.argv[1] == "x86-64-v3"]
"""


@pytest.mark.parametrize("cpu", AS_ON)
def test_pytorch_and_numpy_compute_with_its_instructions_alone(cpu: str) -> None:
    if missing := set(CPUS["x86_64"][cpu]) - set(cpu_features()):
        pytest.skip(f"the CPU has not all of {cpu}: {missing}")
    subprocess.run([sys.executable, "-c", CHILD, cpu], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.parametrize("target", [*CPUS["x86_64"], None])
def test_max_compiles_for_the_cpu_that_is_named(target: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Mock()
    monkeypatch.setattr(instructions, "may_use_amx", lambda: True)
    monkeypatch.setattr(session, "set_virtual_cpu_target", said)
    monkeypatch.setattr(session, "Session", Mock())
    if target:
        monkeypatch.setenv(CPU, target)
    session.session.__wrapped__("cpu")
    assert [each.args for each in said.mock_calls] == ([(target,)] if target else [])


AMX = ["amx_bf16", "amx_int8", "amx_tile"]


@pytest.fixture
def cpu_with_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cpu_info = tmp_path / "cpuinfo"
    cpu_info.write_text(f"flags : avx2 avx512_bf16 {' '.join(AMX)}\n")
    monkeypatch.setattr(instructions, "CPU_INFO", cpu_info)
    instructions.may_use_amx.cache_clear()
    yield
    instructions.may_use_amx.cache_clear()


@pytest.mark.usefixtures("cpu_with_amx")
@pytest.mark.parametrize(
    ("system", "answer", "target", "virtual"),
    [
        ("Linux", 0, None, None),
        ("Linux", -1, None, "cooperlake"),
        ("Darwin", 0, None, "cooperlake"),
        ("Linux", -1, V3, V3),
        ("Linux", 0, V3, V3),
    ],
)
def test_amx_is_used_where_linux_lets_a_process(
    system: str, answer: int, target: str | None, virtual: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does not, the first instruction would end the process; so nothing is compiled with any, and what was is
    not loaded."""
    linux = Mock()
    linux.return_value.syscall.return_value = answer
    monkeypatch.setattr(instructions.ctypes, "CDLL", linux)
    monkeypatch.setattr(platform, "system", lambda: system)
    if target:
        monkeypatch.setenv(CPU, target)
    assert virtual_cpu() == virtual
    assert ("amx_bf16" in cpu_features()) == (virtual is None)
    assert target or {"avx2", "avx512_bf16"} <= set(cpu_features())


def test_a_cpu_without_amx_is_compiled_for_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(instructions, "may_use_amx", lambda: False)
    assert virtual_cpu() is None


LOADED = """
import ctypes
from maxwhisper.engine import instructions
from maxwhisper.engine.session import session
session("cpu")
asked = ctypes.c_uint64()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(asked)) == 0  # ARCH_GET_XCOMP_PERM
print(bool(asked.value >> 18 & 1), any(name.startswith("amx") for name in instructions.cpu_features()))
"""


@pytest.mark.skipif("amx_bf16" not in cpu_features(), reason="the CPU has no AMX, or this process may not use it")
def test_a_process_that_computes_has_asked_for_amx() -> None:
    said = subprocess.run([sys.executable, "-c", LOADED], cwd=Path(__file__).parents[2], check=True, stdout=-1)
    assert said.stdout == b"True True\n"


def test_only_its_instructions_count_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for what is compiled ahead of time, which then runs wherever there are these."""
    monkeypatch.setenv(CPU, V3)
    features = sorted(PORTABLE_FEATURES["x86_64"])
    assert cpu_features() == features
    assert Writer(tmp_path, HOST).manifest["cpu"]["features"] == features


@pytest.mark.parametrize(
    ("machine", "expected"), [("x86_64", "x86-64-v3 or x86-64-v4"), ("aarch64", "none on aarch64")]
)
def test_a_cpu_that_is_not_known_is_named(machine: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv(CPU, "pentium")
    with pytest.raises(OptionError, match=f"MAXWHISPER_CPU=pentium is not known: expected {expected}"):
        cpu_target()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_without_instructions_is_said_to_be_slow_once(
    dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(CPU, V3)
    monkeypatch.setattr(maxwhisper.whisper, "Whisper", Mock())  # nothing is to be compiled for it
    for _ in range(2):
        load_model(NANO, dtype=dtype)
    said = [message for message in caplog.messages if "has no instructions for it" in message]
    assert len(said) == (dtype != "float32")
    assert all(f"dtype {dtype}: " in message and "float32, the default, is faster" in message for message in said)


@pytest.mark.parametrize(
    ("features", "slow"),
    [
        (["avx512_bf16", "avx512_fp16"], []),
        (["avx512f", "avx512_bf16"], ["float16"]),
        (["asimd", "asimdhp"], ["bfloat16"]),
        (["asimd", "asimdhp", "bf16"], []),
        (["avx2", "f16c"], ["bfloat16", "float16"]),
    ],
)
def test_only_what_the_cpu_lacks_is_slow(
    features: list[str], slow: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(instructions, "cpu_features", lambda: features)
    for dtype in ("float32", "bfloat16", "float16"):
        warn_of_slow_dtype(dtype)
    assert [message.split(":")[0].removeprefix("dtype ") for message in caplog.messages] == slow
