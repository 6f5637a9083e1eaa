"""What another process compiles meanwhile: it is waited for, and done without where it fails."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import maxwhisper.precompile
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compare.material import SIZES
from maxwhisper.compiled import DECODING, Network
from maxwhisper.decoding.cpu import SELECT_TOKENS
from maxwhisper.engine import precompile
from maxwhisper.engine.artifacts import Cache
from maxwhisper.engine.precompile import MEMORY, Job, Precompiler, compile_in_background
from maxwhisper.engine.program import Program
from reference.fixtures import NANO

from .compiling import nothing_compiles

MODULE = """
import sys, time
for job in sys.argv[1:]:
    if job == "fails": sys.exit("as it was told to")
    time.sleep(0.2)
    print(job, flush=True)
time.sleep(60)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Writes a module that only this process has in its path, and has machines of two cores with enough memory."""
    (tmp_path / "does_jobs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(precompile, "cores", lambda: 2)
    monkeypatch.setattr(precompile, "free_memory", lambda: MEMORY)
    return "does_jobs"


def test_a_job_is_waited_for(module: str) -> None:
    other = Precompiler(module, ["first", "second", "third"])
    other.start()
    other.wait("second", "the second")
    assert other.done == {"first", "second"}
    other.wait("first", "the first")
    other.wait("somebody else's", "nothing")
    assert other.done == {"first", "second"}
    other.stop()
    assert other.process is not None and other.process.returncode < 0


def test_a_process_that_fails_is_not_waited_for(module: str) -> None:
    other = Precompiler(module, ["fails", "second"])
    other.start()
    other.wait("second", "the second")
    assert not other.done


@pytest.mark.parametrize(("cores", "memory"), [(1, MEMORY), (2, MEMORY - 1)])
def test_a_small_machine_has_no_other_process(
    module: str, cores: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompile, "cores", lambda: cores)
    monkeypatch.setattr(precompile, "free_memory", lambda: memory)
    other = Precompiler(module, ["first"])
    other.start()
    start = time.perf_counter()
    other.wait("first", "the first")
    assert other.process is None and time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    ("cpu", "memory", "has_room"),
    [
        ("max 100000", "max", True),
        ("200000 100000", str(MEMORY + 2**30), True),
        ("150000 100000", "max", False),
        ("max 100000", str(MEMORY + 2**30 - 1), False),
    ],
)
def test_a_container_has_room_within_its_limits(
    cpu: str, memory: str, has_room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine that has more: where a process takes too much, the kernel may end them all."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(precompile, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(precompile, "CONTAINER", tmp_path)
    assert precompile.has_room()
    for name, text in (("cpu.max", cpu), ("memory.max", memory), ("memory.stat", f"file 9\nanon {2**30}\n")):
        (tmp_path / name).write_text(text)
    assert precompile.has_room() == has_room


def test_memory_that_holds_files_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has read and written for a while, most of it does."""
    monkeypatch.setattr(precompile, "CONTAINER", tmp_path)
    monkeypatch.setattr(precompile, "MEMINFO", tmp_path / "meminfo")
    assert precompile.free_memory() == MEMORY, "as where the system does not say"
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n")
    assert precompile.free_memory() == 5000 * 1024


@pytest.mark.parametrize(
    ("name", "value"), [("executable", ""), ("executable", None), ("executable", "/usr/bin/uwsgi"), ("frozen", True)]
)
def test_a_program_that_holds_python_is_not_started_again(
    module: str, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyInstaller's would be, and a server that Python is embedded in."""
    assert precompile.has_room()
    monkeypatch.setattr(sys, name, value, raising=False)
    assert not precompile.has_room()


def test_where_no_process_can_start_whoever_asks_does_the_job(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*command: object, **options: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(precompile.subprocess, "Popen", refused)
    other = Precompiler(module, ["first"])
    other.start()
    other.wait("first", "the first")
    assert other.process is None and not other.done


def test_in_the_background_one_process_compiles_for_a_cache(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps others out until it ends, and is none of this one's group, which Ctrl-C interrupts."""
    children: list[subprocess.Popen] = []
    start = precompile.started

    def started(command: list[str], **options: Any) -> subprocess.Popen[str]:
        assert command[:4] == ["-P", "-m", "maxwhisper.precompile", precompile.IDLE]
        children.append(start(["-P", "-m", module, *command[4:]], **options))
        return children[-1]

    monkeypatch.setattr(precompile, "started", started)
    jobs = [Job(unit, {}, "float16", "float32", str(tmp_path / "cache")) for unit in ("network", "decoding")]
    with monkeypatch.context() as small:
        small.setattr(precompile, "cores", lambda: 1)
        compile_in_background(jobs)
    assert not children
    for _ in range(3):
        compile_in_background(jobs)
    [child] = children
    assert [Job(**json.loads(each)) for each in child.args[4:]] == jobs
    assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
    child.kill()
    child.wait()
    compile_in_background(jobs)
    assert len(children) == 2
    children[1].kill()
    children[1].wait()


def test_in_the_background_only_what_nobody_wants_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of time; and of memory: where it runs out, that process is ended and not one that is larger."""
    nice: list[int] = []
    monkeypatch.setattr(os, "nice", nice.append)
    monkeypatch.setattr(precompile, "OOM_SCORE", tmp_path / "score")
    for arguments in ([], [precompile.IDLE]):
        assert not (tmp_path / "score").exists()
        monkeypatch.setattr(sys, "argv", ["maxwhisper.precompile", *arguments])
        maxwhisper.precompile.main()
    assert nice == [19] and (tmp_path / "score").read_text() == "1000"
    monkeypatch.setattr(precompile, "OOM_SCORE", tmp_path / "score" / "of no file")
    maxwhisper.precompile.main()


def test_what_has_compiled_in_the_background_leaves_no_zombie(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """In a server, which starts no other process that would reap it; and no warning of Python's while it runs."""
    started, pids = precompile.started, []

    def quick(command: list[str], **options: Any) -> subprocess.Popen[str]:
        child = started(["-S", "-c", "import time; time.sleep(0.05)"], **options)
        pids.append(child.pid)
        return child

    monkeypatch.setattr(precompile, "started", quick)
    compile_in_background([Job("network", {}, "float16", "float32", str(tmp_path))])
    gc.collect()
    assert not [each for each in recwarn if each.category is ResourceWarning]
    give_up = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < give_up:
            os.kill(pids[0], 0)
            time.sleep(0.01)


def test_every_job_is_done_and_kept_where_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[Any, ...]] = []

    def artifact(unit: str, programs: list[Program], device: str, load: tuple[Any, ...]) -> None:
        folder, unit_kept, dims, policy = load
        assert {program.name for program in programs} and unit_kept == unit and device == "cpu"
        done.append((unit, vars(dims), policy.storage.name, policy.compute.name, str(folder)))

    monkeypatch.setattr(maxwhisper.precompile, "Artifact", artifact)
    kept = lambda folder: SimpleNamespace(loader=lambda *given: (folder, *given))  # noqa: E731
    monkeypatch.setattr(maxwhisper.precompile, "Cache", kept)
    dims = vars(SIZES["tiny"])
    jobs = [Job(unit, dims, "float16", "float32", unit) for unit in ("network", "alignment")]
    monkeypatch.setattr(sys, "argv", ["maxwhisper.precompile", *map(str, jobs)])
    maxwhisper.precompile.main()
    assert done == [(*vars(job).values(),) for job in jobs]
    assert capsys.readouterr().out == "".join(f"{job}\n" for job in jobs)


@pytest.mark.nightly
def test_what_another_process_compiles_is_what_this_one_asks_for(tmp_path: Path) -> None:
    """Its key is the same, so that it is found."""
    network = Network(load_checkpoint(NANO), "cpu", Cache(tmp_path), "float32")
    [job] = network.precompiler.jobs
    assert Job(**json.loads(job)).unit == DECODING
    subprocess.run([sys.executable, *network.precompiler.command], check=True)
    with nothing_compiles():
        assert network[SELECT_TOKENS]
