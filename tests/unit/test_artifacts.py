"""Graphs compiled ahead of time: what they save, and that nothing which does not fit is used."""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from maxwhisper import cli
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.engine import artifacts
from maxwhisper.engine.artifacts import HOST, MANIFEST, Artifacts, aim_at, source_hash, writing
from maxwhisper.engine.folders import cache_folder
from maxwhisper.engine.instructions import EMITTED, PORTABLE_FEATURES, cpu_features, listed_features
from maxwhisper.errors import ArtifactError, OptionError
from maxwhisper.whisper import Whisper, compile_model, load_model
from reference.compile_log import CompileRecord, compilations
from reference.fixtures import FIXTURES, NANO, ROOT

from .compiling import nothing_compiles

CLIP = FIXTURES / "clips" / "english-1.wav"
PACKAGE = ROOT / "maxwhisper"

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiles the fixture's graphs for this machine."""
    folder = tmp_path_factory.mktemp("artifacts") / "nano-host"
    compile_model(NANO, HOST, folder)
    return folder


@pytest.fixture
def other_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has no graphs built to see that they are others, which takes half a second."""
    monkeypatch.setattr(artifacts, "built_from", lambda _: "other graphs")


@pytest.fixture
def changed(compiled: Path, tmp_path: Path) -> Callable[[Callable[[Manifest], object]], Path]:
    """Returns the folder with a change in its manifest."""

    def change(how: Callable[[Manifest], object]) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir()
        for file in compiled.iterdir():
            (folder / file.name).symlink_to(file)
        manifest = json.loads((compiled / MANIFEST).read_text())
        how(manifest)
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return change


def network(manifest: Manifest) -> Manifest:
    return next(entry for entry in manifest["artifacts"] if entry["unit"] == "network")


# ---- what they save ------------------------------------------------------------------------------------------------

# Only threads beside the main one import, load and use anything, and two of them at once need what is loaded lazily.
ALONE = """
import json, os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from reference.compile_log import compilations

checkpoint, artifacts, kept, clip = sys.argv[1:]


def load(artifacts):
    import maxwhisper

    if not artifacts:
        from maxwhisper.engine import program

        os.environ["MAXWHISPER_CACHE_DIR"] = kept
        program.kernel_library = None  # without which no graph is built
    return maxwhisper.load_model(checkpoint, artifacts=artifacts)


def transcribe(model, temperature):
    return model.transcribe(clip, word_timestamps=True, temperature=temperature, beam_size=None)["text"]


def found(given):
    records = []
    with compilations(records.append):
        with ThreadPoolExecutor(1) as pool:
            model = pool.submit(load, given).result()
        with ThreadPoolExecutor(2) as pool:
            texts = list(pool.map(transcribe, [model, model], [0, 0]))

    from maxwhisper.engine.kernel_library import kernel_library

    return texts, len(records) + kernel_library.cache_info().currsize


both = found(artifacts), found(None)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([*both, used.ru_utime + used.ru_stime, "torch._dynamo" in sys.modules]))
"""
TEXT = " Where is the young doctor that Hector found?"
Found = list[Any]
"""Transcripts made by two threads, and how much was compiled for them, kernels included."""


@dataclass
class Alone:
    """What another process found, by artifacts that it was given and by what is kept in a folder; its processor time,
    its complaints, its temporary files, and what it left in MAX's cache, which was empty."""

    given: Found
    kept: Found
    cpu_seconds: float
    complaints: str
    temporary: Path
    cached: list[Path]


@pytest.fixture(scope="module")
def n_kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Returns a folder in which this process has kept what it compiled for two threads, moved since, and how much."""
    first = tmp_path_factory.mktemp("kept") / "first"
    first.mkdir()
    (first / "kernels").symlink_to(cache_folder("kernels"))
    records: list[CompileRecord] = []
    options: dict[str, Any] = {"word_timestamps": True, "temperature": 0, "beam_size": None}
    with pytest.MonkeyPatch.context() as patch, compilations(records.append), ThreadPoolExecutor(2) as pool:
        patch.setenv("MAXWHISPER_CACHE_DIR", str(first))
        model = pool.submit(load_model, NANO).result()
        texts = pool.map(lambda _: model.transcribe(str(CLIP), **options)["text"], range(2))
        assert list(texts) == [TEXT] * 2
    return first.rename(first.parent / "moved"), len(records)


@pytest.fixture(scope="module")
def alone(compiled: Path, n_kept: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Runs a process with an empty compile cache that has no place for another."""
    folder = tmp_path_factory.mktemp("alone")
    cache = folder / "cache"
    cache.mkdir()
    environment = {"MODULAR_CACHE_DIR": str(cache), "MODULAR_MAX_CACHE_DIR": str(cache), "TMPDIR": str(folder)}
    home = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "", "MAXWHISPER_CACHE_DIR": ""}
    numba = {"NUMBA_DISABLE_JIT": "1"}  # which takes a second to load what it compiled
    command = [sys.executable, "-c", ALONE, NANO, compiled, n_kept[0], CLIP]
    env = dict(os.environ) | environment | home | numba
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    given, kept, cpu_seconds, imported = json.loads(done.stdout.splitlines()[-1])
    assert not imported, "PyTorch's compiler takes a second to import"
    return Alone(given, kept, cpu_seconds, done.stderr, folder, list(cache.iterdir()))


def test_a_process_with_an_empty_compile_cache_transcribes_in_seconds(alone: Alone) -> None:
    assert alone.given == [[TEXT] * 2, 0] and not alone.cached
    [warning] = alone.complaints.splitlines()
    assert "/proc/nowhere/.cache/maxwhisper: cannot be used as a cache (No such file or directory)" in warning
    assert str(alone.temporary / f"maxwhisper-{os.getuid()}") in warning
    assert alone.cpu_seconds < 60, "compiling these graphs takes minutes"


def test_results_are_those_of_a_compilation(compiled: Path) -> None:
    precompiled, here = load_model(NANO, artifacts=compiled), Whisper(load_checkpoint(NANO))
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[50258, 50259, 50359]])
    assert torch.equal(precompiled(mel, tokens), here(mel, tokens))


# ---- what does not fit is not used ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("other_graphs")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=1), "format is 1, expected 2"),
        (lambda m: m.update(max="25.1.0"), r"max is 25\.1\.0, expected \d"),
        (lambda m: m.update(target="sm_90a"), "target is sm_90a, expected host"),
        (lambda m: m["cpu"].update(machine="riscv64"), "machine is riscv64, expected"),
        (lambda m: m["cpu"]["features"].append("avx1024"), "cpu.features has avx1024, which this CPU has not"),
        (lambda m: m.pop("cpu"), "manifest.json: is incomplete: 'cpu'"),
        (lambda m: network(m).pop("sha256"), "manifest.json: is incomplete: 'sha256'"),
        (lambda m: network(m).update(weights={"a": "int3"}), "manifest.json: is incomplete: 'int3'"),
        (lambda m: m.pop("format"), "manifest.json: is no manifest of artifacts"),
        (lambda m: network(m)["dims"].update(n_audio_state=384), "dims.n_audio_state is 384, expected 128"),
        (lambda m: network(m)["blocks"].reverse(), r"blocks is \['decoder.start', .*\], expected \['log_mel', "),
        (lambda m: network(m).update(storage="float32"), "storage is float32, expected float16"),
        (lambda m: network(m).update(compute="bfloat16"), "compute is bfloat16, expected float32"),
        (lambda m: network(m).update(source="0" * 64), "source is 0000.*, expected [0-9a-f]{64}"),
        (
            lambda m: m["artifacts"].remove(network(m)),
            "unit is alignment, decoding, expected network",
        ),
        (lambda m: network(m).update(sha256="0" * 64), r"network-.*\.mef: sha256 is .*, expected 000"),
    ],
)
def test_a_mismatch_is_refused_by_name(
    changed: Callable[..., Path], change: Callable[[Manifest], object], message: str
) -> None:
    folder = changed(change)
    with pytest.raises(ArtifactError, match=message) as raised:
        load_model(NANO, artifacts=folder)
    assert str(folder) in str(raised.value)


def test_artifacts_of_the_same_graphs_fit(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else has changed in the sources since."""
    monkeypatch.setattr(artifacts, "source_hash", lambda _: "of other comments")
    with nothing_compiles():
        load_model(NANO, artifacts=compiled)
        monkeypatch.setattr(artifacts, "built_from", lambda _: "something else")
        with pytest.raises(ArtifactError, match="source is .*, expected of other comments"):
            load_model(NANO, artifacts=compiled)


def test_files_that_are_missing_are_named(compiled: Path, changed: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere/manifest\.json: cannot be read: No such file"):
        Artifacts(tmp_path / "nowhere", "cpu")
    folder = changed(lambda _: None)
    next(folder.glob("network-*")).unlink()
    with pytest.raises(ArtifactError, match=r"network-.*\.mef: cannot be read: No such file"):
        load_model(NANO, artifacts=folder)


def test_every_mismatch_is_named_at_once(changed: Callable[..., Path]) -> None:
    folder = changed(lambda m: network(m).update(storage="float32", source="other"))
    with pytest.raises(ArtifactError, match="storage is float32, expected float16; source is other, expected"):
        load_model(NANO, artifacts=folder)


@pytest.mark.parametrize("where", ["folder", "unit"])
def test_what_does_not_fit_is_compiled_if_asked_for(
    changed: Callable[..., Path], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(
        lambda m: (m if where == "folder" else network(m)).update(max="25.1.0", source="other", built_from="")
    )
    records: list[CompileRecord] = []
    with caplog.at_level(logging.WARNING, "maxwhisper"), compilations(records.append):
        model = load_model(NANO, artifacts=folder, or_compile=True)
    assert isinstance(model, Whisper) and records
    reason = "max is 25.1.0" if where == "folder" else "source is other"
    assert any(reason in line and line.endswith("compiling instead") for line in caplog.messages)


def test_a_gpus_artifacts_are_for_its_architecture(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class H100:
        architecture_name = "sm_90a"

    monkeypatch.setattr(artifacts, "Accelerator", H100)
    folder = changed(lambda m: m.update(target="sm_80"))
    with pytest.raises(ArtifactError, match="target is sm_80, expected sm_90a"):
        Artifacts(folder, "gpu")
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("sm_80", "sm_90a"))
    assert Artifacts(folder, "gpu").held


@pytest.mark.usefixtures("other_graphs")
def test_the_command_says_what_does_not_fit_in_one_line(
    changed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(lambda m: network(m).update(source="other"))
    options = ["--model", str(NANO), "--artifacts", str(folder), "-o", str(tmp_path)]
    assert cli.main(["transcribe", str(CLIP), *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "source is other, expected" in lines[0]


def test_what_max_cannot_read_is_named(changed: Callable[..., Path]) -> None:
    content = b"not MAX's"
    folder = changed(lambda m: network(m).update(sha256=hashlib.sha256(content).hexdigest()))
    [file] = folder.glob("network-*")
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"network-.*\.mef: MAX cannot read it: "):
        load_model(NANO, artifacts=folder)


# ---- what load_model keeps -----------------------------------------------------------------------------------------


def test_a_second_process_compiles_nothing(n_kept: tuple[Path, int], alone: Alone) -> None:
    """Also where the cache has been moved to; and what the first one compiled, for two threads, it compiled once."""
    assert n_kept[1] == 3 and alone.kept == [[TEXT] * 2, 0]


def test_artifacts_count_whatever_was_loaded_before(changed: Callable[..., Path]) -> None:
    """Each model has its own graphs, and not the first one's of the process."""

    def without_network(manifest: Manifest) -> None:
        manifest["artifacts"] = [entry for entry in manifest["artifacts"] if entry["unit"] != "network"]

    load_model(NANO)
    with pytest.raises(ArtifactError, match="expected network"):
        load_model(NANO, artifacts=changed(without_network))


# ---- the hash ------------------------------------------------------------------------------------------------------


def test_the_hash_follows_the_sources_of_the_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(PACKAGE, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(artifacts, "PACKAGE", tmp_path)
    before = source_hash()
    (tmp_path / "audio.py").write_text("another")
    assert source_hash() == before
    (tmp_path / "kernels" / "another.mojo").write_text("fn product()")
    with_kernel = source_hash()
    (tmp_path / "network" / "model.py").write_text("another")
    assert len({before, with_kernel, source_hash()}) == 3


def test_every_module_that_builds_graphs_counts() -> None:
    builds = re.compile(r"^from max\.graph import .*\b(ops|Graph|Weight)\b|^class Policy:", re.MULTILINE)
    building = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if builds.search(file.read_text())}
    assert {"network/model.py", "engine/session.py"} <= building
    assert all(name.startswith(artifacts.GRAPH_SOURCES) for name in building)


def test_the_key_of_the_compile_cache_has_maxs_version_and_the_hash(capsys: pytest.CaptureFixture[str]) -> None:
    artifacts.main()
    assert capsys.readouterr().out == f"max-{artifacts.version('max')}-graphs-{source_hash()[:16]}\n"


# ---- the CPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("processor : 0\nflags\t: fpu avx2 sse4_1 hypervisor tsc avx512f\n", ["avx2", "avx512f", "sse4_1"]),
        ("processor : 0\nFeatures\t: fp asimd sve2\n", ["asimd", "fp", "sve2"]),
        ("processor : 0\n", []),
    ],
)
def test_features_of_a_cpu(content: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(content)
    assert listed_features(tmp_path / "cpuinfo") == expected


def test_this_cpu_runs_what_is_compiled_for_gpus() -> None:
    portable = PORTABLE_FEATURES.get(platform.machine(), [])
    assert set(portable) <= set(cpu_features())
    assert all(EMITTED.fullmatch(feature) for feature in PORTABLE_FEATURES["x86_64"])


# ---- writing -------------------------------------------------------------------------------------------------------


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"), writing(tmp_path / "new", HOST) as writer:
        (writer.folder / "half.mef").write_bytes(b"half")
        raise RuntimeError("in the middle")
    assert not list(tmp_path.iterdir())


def test_earlier_artifacts_are_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("first", "second"):
        with writing(out, HOST) as writer:
            (writer.folder / name).touch()
        assert sorted(file.name for file in out.iterdir()) == sorted([name, MANIFEST])
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "mine.txt").touch()
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(OptionError, match="is there already"), writing(taken, HOST):
            pass
    with pytest.raises(OptionError, match="cannot be written: File exists"), writing(tmp_path / "mine.txt/x", HOST):
        pass


def test_targets() -> None:
    with pytest.raises(OptionError, match="target 'sm_1' is not known: expected host, sm_80, sm_90a"):
        aim_at("sm_1")
    artifacts.session("cpu")
    with pytest.raises(OptionError, match="target sm_80: must be compiled for in a process that has used no device"):
        aim_at("sm_80")
    assert aim_at(HOST) == "cpu"
