"""What `load_model` keeps of what it compiles: found again if nothing that decides the outcome has changed."""

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from max.graph import DeviceRef

import maxwhisper.engine.built_from
import maxwhisper.network.model
import maxwhisper.whisper
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compiled import policy_of, programs_of
from maxwhisper.engine import artifacts
from maxwhisper.engine.artifacts import HOST, MANIFEST, PACKAGE, PORTABLE, Artifacts, Cache, Identity
from maxwhisper.engine.built_from import built_from
from maxwhisper.engine.instructions import CPU, PORTABLE_CPU, PORTABLE_FEATURES
from maxwhisper.engine.precompile import Job
from maxwhisper.engine.program import Stored
from maxwhisper.whisper import Whisper
from reference.fixtures import NANO


class Compiled(Exception):
    """Raised where a compilation would begin."""


def read(cache: Cache, compiled: Stored | None = None) -> Stored:
    """Reads the fixture's network from a cache; compiled: what a compilation gives, if it may begin."""
    checkpoint = load_checkpoint(NANO)
    policy = policy_of(checkpoint.tensors, "cpu", "float32")

    def compile_them() -> Stored:
        if compiled is None:
            raise Compiled
        return compiled

    return cache.loader("network", checkpoint.dims, policy)(
        programs_of("network", checkpoint.dims, policy), compile_them
    )


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns what one load keeps of the network."""
    folder = tmp_path_factory.mktemp("once")
    Whisper(load_checkpoint(NANO), artifacts=Cache(folder))
    [place] = folder.glob("network-*")
    return place


@pytest.fixture
def same_graphs(once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the graphs not built again to see that they are the same, which takes half a second."""
    [held] = Artifacts(once, "cpu").held
    monkeypatch.setattr(artifacts, "built_from", lambda _: held.built_from)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def become_a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.touch()


@pytest.mark.usefixtures("same_graphs")
@pytest.mark.parametrize(
    "damage",
    [
        lambda place: truncate(next(place.glob("*.mef"))),
        lambda place: truncate(place / MANIFEST),
        lambda place: next(place.glob("*.mef")).unlink(),
        lambda place: (place / MANIFEST).unlink(),
        become_a_file,
    ],
    ids=["artifact truncated", "manifest truncated", "no artifact", "no manifest", "no folder"],
)
def test_what_is_damaged_is_compiled_again_and_replaced(
    once: Path, damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored, place = read(Cache(once.parent)), tmp_path / once.name
    shutil.copytree(once, place)
    cache = Cache(tmp_path)
    read(cache)
    damage(place)
    with pytest.raises(Compiled):
        read(cache)
    [message] = caplog.messages
    assert message.startswith(str(place)) and message.endswith(": compiling again")
    assert read(cache, stored) is stored
    caplog.clear()
    read(cache)
    assert not caplog.messages and not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("same_graphs")
@pytest.mark.parametrize(
    "change",
    [
        lambda patch: [patch.setattr(artifacts, name, lambda _: "another") for name in ("source_hash", "built_from")],
        lambda patch: patch.setattr(artifacts, "version", lambda _: "25.1.0"),
        lambda patch: patch.setattr(artifacts, "cpu_features", lambda: ["avx1024"]),
        lambda patch: patch.setattr(artifacts, "cpu_target", lambda: "another"),
        lambda patch: patch.setattr(artifacts, "target_of", lambda _: "sm_90a"),
        lambda patch: patch.delenv(CPU, raising=False) or patch.setattr(platform, "machine", lambda: "riscv64"),
        lambda patch: patch.setenv("MODULAR_MAX_DEBUG_ASSERT_LEVEL", "all"),
    ],
    ids=["sources", "MAX", "CPU", "CPU compiled for", "target", "machine", "settings"],
)
def test_what_is_compiled_from_with_or_for_something_else_is_not_found(
    once: Path, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    read(Cache(once.parent))
    change(monkeypatch)
    with pytest.raises(Compiled):
        read(Cache(once.parent))
    assert not caplog.messages  # it is no damage


def test_what_is_compiled_from_the_same_graphs_is_found(once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else has changed in the sources; and the next time without building them, as long as nothing has."""
    built = []
    monkeypatch.setattr(artifacts, "built_from", lambda programs: built.append(1) or built_from(programs))
    read(Cache(once.parent))
    assert len(built) == 0
    monkeypatch.setattr(artifacts, "source_hash", lambda _: "of other comments")
    for _ in range(2):
        read(Cache(once.parent))
    assert len(built) == 1


def test_a_link_that_was_left_half_made_is_made_again(tmp_path: Path) -> None:
    """By a process of the same number, as a container's have, that was killed."""
    (tmp_path / "network-1").mkdir()
    (tmp_path / f"sources-2-{os.getpid()}").symlink_to("nowhere")
    artifacts.link_to(tmp_path / "network-1", tmp_path / "sources-2")
    assert (tmp_path / "sources-2").resolve() == tmp_path / "network-1"
    assert len(list(tmp_path.iterdir())) == 2


def test_where_maxs_cache_lies_does_not_count(once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULAR_CACHE_DIR", "elsewhere")
    read(Cache(once.parent))


@pytest.mark.usefixtures("same_graphs")
def test_a_folder_that_cannot_be_written_is_named_once(
    once: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache, stored = Cache(tmp_path / "file" / "artifacts"), read(Cache(once.parent))
    for _ in range(2):
        assert read(cache, stored) is stored
    expected = f"{cache.folder}: compiled graphs cannot be kept there: Not a directory"
    assert [line for line in caplog.messages if "kept" in line] == [expected]


@pytest.mark.usefixtures("same_graphs")
def test_what_another_process_keeps_meanwhile_is_no_failure(
    once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stored, place = read(Cache(once.parent)), tmp_path / once.name
    policy = policy_of(load_checkpoint(NANO).tensors, "cpu", "float32")
    dims = load_checkpoint(NANO).dims
    identity = Identity.of("network", dims, policy, programs_of("network", dims, policy))
    finish = artifacts.Writer.finish

    def finish_later(writer: artifacts.Writer) -> None:
        finish(writer)
        monkeypatch.setattr(Path, "exists", lambda path: path != place and os.path.exists(path))
        shutil.copytree(once, place)  # after `replacing` has looked

    monkeypatch.setattr(artifacts.Writer, "finish", finish_later)
    artifacts.keep(stored, identity, HOST, place)
    assert not caplog.messages and list(tmp_path.iterdir()) == [place]
    read(Cache(tmp_path))


def test_a_model_without_a_spectrogram_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("Network", "AudioEncoder", "TextDecoder", "stepper_of"):
        monkeypatch.setattr(maxwhisper.whisper, part, lambda *_: None)
    checkpoint = load_checkpoint(NANO)
    other = replace(checkpoint, dims=replace(checkpoint.dims, n_mels=40))
    assert Whisper(other, artifacts=Cache(tmp_path)).dims.n_mels == 40


# ---- what came with the package ------------------------------------------------------------------------------------


@pytest.fixture
def portable(once: Path, tmp_path: Path) -> Path:
    """Returns a folder of artifacts for any CPU: the fixture's network, and by its manifest what decodes. There are
    some of another model beside it, and of another version of MAX."""
    folder = tmp_path / "portable" / "fixture"
    shutil.copytree(once, folder)
    checkpoint = load_checkpoint(NANO)
    policy = policy_of(checkpoint.tensors, "cpu", "float32")
    identity = Identity.of("network", checkpoint.dims, policy, programs_of("network", checkpoint.dims, policy))
    next(folder.glob("*.mef")).rename(folder / identity.file)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["artifacts"][0]["source"] = identity.source
    manifest["cpu"]["features"] = PORTABLE_FEATURES.get(platform.machine(), [])
    manifest["artifacts"].append(manifest["artifacts"][0] | {"unit": "decoding"})
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for name, change in (("another", {"artifacts": []}), ("another-max", {"max": "25.1.0"})):
        (tmp_path / "portable" / name).mkdir()
        (tmp_path / "portable" / name / MANIFEST).write_text(json.dumps(manifest | change))
    return folder


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Returns what is to be compiled for this CPU."""
    jobs: list[Job] = []
    monkeypatch.setattr(artifacts, "compile_in_background", jobs.extend)
    return jobs


def test_what_came_with_the_package_is_used_until_this_cpus_own_is_there(
    once: Path, portable: Path, in_background: list[Job], tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", portable.parent)
    read(cache)
    expected = [(unit, "float16", "float32") for unit in ("network", "decoding")]
    assert [(job.unit, job.storage, job.compute) for job in in_background] == expected
    assert in_background[0].folder == str(cache.folder) and not cache.folder.exists()
    shutil.copytree(once.parent, cache.folder, symlinks=True)
    in_background.clear()
    read(cache)
    assert not in_background


def test_what_came_with_the_package_is_this_cpus_own_where_the_environment_says_so(
    portable: Path, in_background: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU, PORTABLE_CPU[platform.machine()])
    read(Cache(tmp_path / "cache", portable.parent))
    assert not in_background


@pytest.mark.usefixtures("same_graphs")
def test_what_came_with_the_package_is_for_no_gpu(
    portable: Path, in_background: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(NANO)
    policy = policy_of(checkpoint.tensors, "cpu", "float32")
    programs = programs_of("network", checkpoint.dims, policy)
    monkeypatch.setattr(artifacts, "target_of", lambda device: HOST if device == "cpu" else "sm_90a")
    on_gpu = Cache(tmp_path / "cache", portable.parent).loader(
        "network", checkpoint.dims, replace(policy, device=DeviceRef.GPU())
    )
    with pytest.raises(ZeroDivisionError):
        on_gpu(programs, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert not in_background


@pytest.mark.usefixtures("same_graphs")
@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["artifacts"][0].update(source="of other sources"),
        lambda manifest: manifest["artifacts"][0].update(storage="float32"),
        lambda manifest: manifest["artifacts"][0]["dims"].update(n_text_layer=9),
        lambda manifest: manifest.update(max="25.1.0"),
        lambda manifest: manifest["cpu"].update(features=["avx1024"]),
    ],
    ids=["sources", "storage", "dimensions", "MAX", "CPU"],
)
def test_what_came_with_the_package_and_does_not_fit_is_compiled(
    portable: Path, in_background: list[Job], change: Callable[[Any], None], tmp_path: Path, caplog: Any
) -> None:
    """Without a word: nobody has asked for it."""
    manifest = json.loads((portable / MANIFEST).read_text())
    change(manifest)
    (portable / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(Compiled):
        read(Cache(tmp_path / "cache", portable.parent))
    assert not in_background and not caplog.messages


@pytest.mark.usefixtures("same_graphs")
def test_what_came_with_the_package_and_is_damaged_is_compiled_with_a_warning(
    portable: Path, in_background: list[Job], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate(next(portable.glob("*.mef")))
    with pytest.raises(Compiled):
        read(Cache(tmp_path / "cache", portable.parent))
    [message] = caplog.messages
    assert message.startswith(str(portable)) and message.endswith(": compiling instead") and not in_background


def test_load_model_looks_into_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Cache] = []
    monkeypatch.setattr(maxwhisper.whisper, "Whisper", lambda _, __, artifacts, ___: given.append(artifacts))
    maxwhisper.load_model(NANO)
    assert given[0].portable == PORTABLE and PORTABLE.is_relative_to(PACKAGE)
