"""Checkpoints by name, which are fetched, and what `convert` writes."""

import errno
import hashlib
import io
import os
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import whisper
from safetensors.torch import save_file
from whisper.model import Whisper

from maxwhisper import checkpoint as checkpoint_module
from maxwhisper.checkpoint import Checkpoint, convert, load_checkpoint
from maxwhisper.errors import CheckpointError, OptionError

from .checkpoints import (
    DIMS,
    HEADS,
    Tensors,
    assert_refused,
    assert_same,
    random_tensors,
    write_pt,
    write_safetensors,
)

# Names


NAMED_DIMS = replace(
    DIMS, n_text_layer=4, n_text_head=6, n_audio_state=24, n_text_state=24
)  # as tiny has for its heads


class Server:
    """Stands in for the network: answers `urlopen` with `content`, or raises it if it is an exception."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes | Exception, sha256: str) -> None:
        self.requests = 0
        self.content = content
        monkeypatch.setitem(whisper._MODELS, "tiny", f"https://models.invalid/{sha256}/tiny.pt")
        monkeypatch.setattr(urllib.request, "urlopen", self.answer)

    def answer(self, url: str) -> io.BytesIO:
        self.requests += 1
        if isinstance(self.content, Exception):
            raise self.content
        answer = io.BytesIO(self.content)
        answer.info = lambda: {"Content-Length": str(len(self.content))}  # type: ignore[attr-defined, arg-type]
        return answer


@pytest.fixture
def named(tmp_path: Path) -> tuple[Tensors, bytes, str]:
    tensors = random_tensors(dims=NAMED_DIMS)
    content = write_pt(tmp_path / "served.pt", tensors, asdict(NAMED_DIMS)).read_bytes()
    return tensors, content, hashlib.sha256(content).hexdigest()


def test_a_name_is_fetched_once_and_verified(
    tmp_path: Path, named: tuple[Tensors, bytes, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, content, sha256 = named
    server = Server(monkeypatch, content, sha256)
    for _ in range(2):
        loaded = load_checkpoint("tiny", download_root=tmp_path / "root")
        assert_same(loaded, tensors, NAMED_DIMS)
        assert (loaded.name, loaded.path) == ("tiny", tmp_path / "root" / "tiny.pt")
    assert server.requests == 1

    judge = Whisper(NAMED_DIMS)
    judge.set_alignment_heads(whisper._ALIGNMENT_HEADS["tiny"])
    assert loaded.alignment_heads == tuple(map(tuple, judge.alignment_heads.indices().T.tolist()))
    assert load_checkpoint(tmp_path / "root" / "tiny.pt").alignment_heads is None


def test_two_that_want_a_name_at_once_fetch_it_once(
    tmp_path: Path, named: tuple[Tensors, bytes, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lock files, as processes do: the workers of a server start together."""
    server, both = Server(monkeypatch, named[1], named[2]), threading.Barrier(2)

    def slow(url: str) -> io.BytesIO:
        time.sleep(0.3)
        return server.answer(url)

    monkeypatch.setattr(urllib.request, "urlopen", slow)

    def load(_: int) -> Checkpoint:
        both.wait()
        return load_checkpoint("tiny", download_root=tmp_path / "root")

    with ThreadPoolExecutor(2) as pool:
        for loaded in pool.map(load, range(2)):
            assert_same(loaded, named[0], NAMED_DIMS)
    assert server.requests == 1


def test_the_cache_is_openai_whispers_own(
    tmp_path: Path, named: tuple[Tensors, bytes, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Server(monkeypatch, named[1], named[2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert load_checkpoint("tiny").path == tmp_path / "xdg" / "whisper" / "tiny.pt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_checkpoint("tiny").path == tmp_path / "home" / ".cache" / "whisper" / "tiny.pt"


def test_a_file_with_another_checksum_is_refused(
    tmp_path: Path, named: tuple[Tensors, bytes, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Server(monkeypatch, named[1][:-1] + b"\1", named[2])
    assert_refused("tiny", "cannot be fetched", "SHA256", download_root=tmp_path)


@pytest.mark.parametrize(
    ("failure", "part"),
    [
        (urllib.error.URLError("Name or service not known"), "Name or service not known"),
        (urllib.error.HTTPError("https://models.invalid", 503, "Service Unavailable", {}, None), "503"),  # type: ignore[arg-type]
        (TimeoutError(), "TimeoutError"),
        (urllib.error.URLError("proxy refused:\nno route"), "proxy refused:"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
    ],
)
def test_a_network_failure_is_one_line(
    tmp_path: Path, failure: Exception, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Server(monkeypatch, failure, "0" * 64)
    assert_refused("tiny", "cannot be fetched into", str(tmp_path), part, download_root=tmp_path)


def test_a_path_object_is_never_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(Path("tiny"), "no such file or folder")


# Writing


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_convert_leaves_nothing(
    tmp_path: Path, interruption: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pt(tmp_path / "model.pt", random_tensors())
    folder = tmp_path / "folder"
    folder.mkdir()
    old = folder / "old.safetensors"
    old.write_bytes(b"old")

    def interrupted(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        os.truncate(path, 1000)
        raise interruption

    monkeypatch.setattr(checkpoint_module, "save_file", interrupted)
    for destination in (old, folder / "new.safetensors"):
        with pytest.raises(KeyboardInterrupt if isinstance(interruption, KeyboardInterrupt) else OptionError):
            convert(source, destination)
        assert list(folder.iterdir()) == [old]
        assert old.read_bytes() == b"old"


def test_convert_replaces_even_its_own_source(tmp_path: Path) -> None:
    tensors = random_tensors()
    path = write_safetensors(tmp_path / "model.safetensors", tensors, heads=HEADS)
    mapped = load_checkpoint(path)
    convert(path, path)
    assert_same(mapped, tensors)
    assert_same(load_checkpoint(path), tensors)
    assert load_checkpoint(path).alignment_heads == mapped.alignment_heads == ((0, 1), (1, 0))
    assert list(tmp_path.iterdir()) == [path]


def test_a_converted_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    written = convert(write_pt(tmp_path / "model.pt", random_tensors()), tmp_path / "model.safetensors")
    assert written.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_destination_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pt(tmp_path / "model.pt", random_tensors())
    (tmp_path / "folder.safetensors").mkdir()

    def refused(destination: Path, reason: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OptionError, match=f"^{re.escape(str(destination))}: .*{reason}$"):
            convert(source, destination)
        assert sorted(tmp_path.rglob("*")) == before

    refused(tmp_path / "absent" / "model.safetensors", "No such file or directory")
    refused(source / "model.safetensors", "Not a directory")
    refused(tmp_path / "folder.safetensors", "Is a directory")
    refused(tmp_path / "model.ckpt", "must be a file name that ends in .safetensors")

    def read_only(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", read_only)
    refused(tmp_path / "model.safetensors", "Permission denied")


def test_convert_of_a_bad_checkpoint_names_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(CheckpointError, match="model.pt"):
        convert(tmp_path / "model.pt", tmp_path / "model.safetensors")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model.pt"]
