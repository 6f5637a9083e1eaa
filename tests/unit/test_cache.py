"""Where what was compiled is kept, and where instead."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from maxwhisper.engine import folders as cache
from maxwhisper.engine import process
from maxwhisper.engine.folders import ROOM, cache_folder, temporary_folder, writable
from maxwhisper.errors import OptionError

PROBLEM = "cannot be used as a cache"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields the folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    for function in (writable, temporary_folder):
        function.cache_clear()
    yield folder
    for function in (writable, temporary_folder):
        function.cache_clear()


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """Returns the path of a folder that cannot be made."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "cache"


def full(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Leaves 2 MB in these folders and more than enough elsewhere."""

    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=2 * 2**20 if any(map(path.is_relative_to, folders)) else ROOM)

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_the_folder_is_that_of_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXWHISPER_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("kernels") == tmp_path / "own" / "kernels"
    monkeypatch.delenv("MAXWHISPER_CACHE_DIR")
    assert cache_folder("kernels") == tmp_path / "xdg" / "maxwhisper" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("kernels") == tmp_path / "home" / ".cache" / "maxwhisper" / "kernels"


def test_a_folder_that_cannot_be_made_costs_a_warning(
    nowhere: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = writable(nowhere), writable(nowhere)
    assert first == second and first.is_relative_to(temporary / f"maxwhisper-{os.getuid()}")
    [message] = caplog.messages
    assert message.startswith(f"{nowhere}: {PROBLEM} (Not a directory): {first} is used instead")


def test_a_user_without_a_home_has_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("MAXWHISPER_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert cache_folder("kernels").is_relative_to(temporary)
    assert not (tmp_path / "~").exists() and "(this user has no home folder)" in caplog.text


def test_a_full_disk_is_avoided_and_what_it_holds_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = tmp_path / "cache"
    (held / "kernels").mkdir(parents=True)
    (held / "kernels" / "a.mojoc").write_text("compiled")
    (held / "linked").symlink_to(held / "kernels")
    full(monkeypatch, held)
    for _ in range(2):  # as in a later process
        instead = writable(held)
        writable.cache_clear()
    assert f"{PROBLEM} (only 2 MB are free there)" in caplog.text
    assert (instead / "kernels" / "a.mojoc").read_text() == (instead / "linked" / "a.mojoc").read_text() == "compiled"
    (instead / "kernels" / "b.mojoc").touch()
    assert [file.name for file in (held / "kernels").iterdir()] == ["a.mojoc"]


def test_what_locks_one_folder_locks_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file is opened for that, one that cannot be written to would keep this process from it."""
    held = tmp_path / "cache"
    (held / "artifacts").mkdir(parents=True)
    (held / "artifacts" / "in_background").touch()
    full(monkeypatch, held)
    assert not os.path.lexists(writable(held) / "artifacts" / "in_background")


def test_where_nothing_is_better_a_folder_with_little_room_is_used(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full(monkeypatch, tmp_path)
    assert writable(tmp_path / "cache") == tmp_path / "cache" and not caplog.messages


def test_where_nothing_can_be_written_both_folders_are_named(
    nowhere: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(nowhere))
    with pytest.raises(OptionError, match=rf"{nowhere}: cannot be written to .*set MAXWHISPER_CACHE_DIR or TMPDIR"):
        writable(nowhere)


@pytest.mark.parametrize("whose", ["somebody else's", "a link", "open to others"])
def test_compiled_code_is_not_read_from_a_folder_that_others_can_write(
    temporary: Path, tmp_path: Path, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = temporary / f"maxwhisper-{os.getuid()}"
    if whose == "a link":
        (tmp_path / "theirs").mkdir()
        taken.symlink_to(tmp_path / "theirs")
    else:
        taken.mkdir()
        taken.chmod(0o777 if whose == "open to others" else 0o700)
    if whose == "somebody else's":
        uid = os.getuid() + 1
        taken = taken.rename(temporary / f"maxwhisper-{uid}")
        monkeypatch.setattr(cache.os, "getuid", lambda: uid)
    assert temporary_folder().parent == temporary and temporary_folder() != taken


def max_cache(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Path:
    """Returns where MAX's cache is after the search for a folder."""
    for name in ("MODULAR_CACHE_DIR", "MODULAR_MAX_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # or it would not be taken away afterwards, if it is not there now
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process.find_place_for_max_cache.__wrapped__()
    return Path(process._core.engine.max_cache_dir())


@pytest.mark.parametrize("name", ["MODULAR_CACHE_DIR", "MODULAR_MAX_CACHE_DIR"])
def test_max_has_a_cache_that_it_can_write(
    name: str,
    nowhere: Path,
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MAXWHISPER_CACHE_DIR", str(tmp_path / "own"))
    assert max_cache(monkeypatch, **{name: str(tmp_path / "max")}).is_relative_to(tmp_path / "max")
    assert not caplog.messages
    assert max_cache(monkeypatch, **{name: str(nowhere)}).is_relative_to(temporary)
    [message] = caplog.messages
    assert message.startswith(f"{nowhere}: {PROBLEM}")


def test_one_disk_costs_one_warning(
    nowhere: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAXWHISPER_CACHE_DIR", str(nowhere / "own"))
    max_cache(monkeypatch, MODULAR_CACHE_DIR=str(nowhere / "max"))
    assert len(caplog.messages) == 1
