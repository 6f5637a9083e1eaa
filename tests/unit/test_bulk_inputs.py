"""What `maxwhisper bulk` finds to transcribe, and the ids of it."""

# ruff: noqa: E402 - what is imported below the skips is installed by the extra

import os
import resource
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxwhisper.bulk.inputs import IDENTIFIED, identified, identify, inputs_of
from maxwhisper.bulk.parts import Parts
from maxwhisper.errors import OptionError

# ---- ids -----------------------------------------------------------------------------------------------------------


def test_ids_are_the_same_for_ever() -> None:
    assert identify("/calls/a.mp3", None) == "a24dbdbb93761f7cb00e7af9dc8bb987"
    assert identify(None, b"bytes") == "e1f0eb969356bcbdb84186bb6067a22b"


def test_ids_tell_inputs_apart() -> None:
    inputs = [("a", None), ("b", None), (None, b"a"), ("a", b""), ("a", b"a"), ("b", b"a"), (None, None)]
    assert len({identify(*each) for each in inputs}) == len(inputs)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"path": ["x.wav", None], "bytes": pa.array([b"1", b"2"])}),
        pa.table({"audio": [{"bytes": b"1", "path": "x.wav"}, {"bytes": b"2", "path": None}]}),
    ],
    ids=["columns", "struct"],
)
def test_bytes_are_found_in_every_form(table: pa.Table) -> None:
    found = identified(table)
    assert found.schema == IDENTIFIED and identified(found) is found
    assert found["id"].to_pylist() == [identify("x.wav", b"1"), identify(None, b"2")]
    assert found["bytes"].to_pylist() == [b"1", b"2"] and found["path"].to_pylist() == ["x.wav", None]
    assert len(identified(table.slice(0, 0))) == 0


# ---- inputs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Makes a folder of two files of audio, one of them deeper, and a text."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.MP3", "deep/a.wav", "notes.txt"):
        (tmp_path / "in" / name).touch()
    return tmp_path / "in"


def test_a_folder_has_its_audio(folder: Path) -> None:
    assert inputs_of(str(folder)).paths == [str(folder / "b.MP3"), str(folder / "deep" / "a.wav")]


def test_a_folder_in_it_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("deep"):  # to root none is closed
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OptionError, match="INPUT .*: cannot be read: .*Permission denied: '.*/deep'"):
        inputs_of(str(folder))


def test_a_pattern_has_what_it_names(folder: Path) -> None:
    assert inputs_of(f"{folder}/**/*.*").paths == sorted(map(str, folder.rglob("*.*")))
    (folder / "[1].wav").touch()
    assert inputs_of(f"{folder}/[1].wav").paths == [f"{folder}/[1].wav"]  # a file is what it is called


def test_a_list_has_a_name_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "list.txt").write_text("b.MP3\n\n \n/elsewhere/ü.wav\r\nb.MP3\nmemory://store/c.wav\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    found = inputs_of("list.txt")
    assert found.paths == [str(folder / "b.MP3"), "/elsewhere/ü.wav", "memory:///store/c.wav"] and found.number == 3


def test_a_list_has_names_as_they_are(tmp_path: Path) -> None:
    names = [f"{tmp_path}/{name}.mp3" for name in ("first", "std::vector", "a\u2028b", "100%25 #1? [x]; 'y'", "last")]
    (tmp_path / "list.txt").write_text("\r\n".join(names), encoding="utf-8-sig", newline="")
    assert inputs_of(f"{tmp_path}/list.txt").paths == names


def test_a_file_may_be_called_as_fsspec_joins_urls(tmp_path: Path) -> None:
    (tmp_path / "std::vector.mp3").touch()
    assert inputs_of(f"{tmp_path}/std::vector.mp3").paths == [f"{tmp_path}/std::vector.mp3"]


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_folder(name: str) -> None:
    with pytest.raises(OptionError, match="the name of a file or folder is empty"):
        inputs_of(name)


def test_an_object_store_is_as_good_as_a_disk() -> None:
    fsspec.filesystem("memory").pipe_file("/archive/deep/x.wav", b"")
    assert inputs_of("memory://archive").paths == ["memory:///archive/deep/x.wav"]


def test_parquet_of_paths(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["/a.wav", "/b.wav", "/a.wav"], "id": [1, 2, 3]}), tmp_path / "x.parquet")
    assert inputs_of(f"{tmp_path}/*.parquet").paths == ["/a.wav", "/b.wav"]


@pytest.mark.parametrize("columns", [["bytes"], ["bytes", "path"], ["audio"]])
def test_parquet_of_bytes(columns: list[str], tmp_path: Path) -> None:
    values = {"bytes": [b"1"], "path": ["a"], "audio": [{"bytes": b"1", "path": "a"}]}
    table = pa.table({"other": [1]} | {name: values[name] for name in columns})
    for name in ("x", "y"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    found = inputs_of(f"{tmp_path}/*.parquet")
    assert (found.number, found.paths, found.columns) == (2, [], columns) and len(found.parquet) == 2


def write(path: Path, content: Any) -> None:
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    elif content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("nothing", None, "there is no such file or folder"),
        ("*.wav", None, "names no file"),
        ("*.parquet", None, "names no file"),
        ("empty.txt", b"\n", "names no file"),
        ("latin.txt", b"\xfc.wav", "cannot be read"),
        ("no.parquet", b"PAR1 or not", "cannot be read"),
        ("other.parquet", {"sound": [1]}, "has the columns sound: expected `path`"),
        ("null.parquet", {"path": ["a", None]}, "a path is null"),
        ("empty.parquet", {"path": pa.array([], pa.string())}, "has no row"),
        ("no_bytes.parquet", {"bytes": pa.array([], pa.binary())}, "has no row"),
        ("numbers.parquet", {"bytes": [b"1"], "path": [1]}, "has the columns bytes, path: expected `path`"),
        ("texts.parquet", {"audio": [{"bytes": "1"}]}, "has the columns audio: expected `path`"),
        (".", None, "no file in this folder ends as audio or video does"),
    ],
)
def test_inputs_that_are_none(name: str, content: Any, expected: str, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    with pytest.raises(OptionError, match=f"INPUT .*{expected}"):
        inputs_of(str(tmp_path / name))


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    for name in (b"\xfc.wav", b"a.wav", b"\xe4.wav"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    with pytest.raises(OptionError, match="INPUT: names of 2 files are not UTF-8, as .*/\udce4.wav: rename them"):
        inputs_of(str(tmp_path))


def test_columns_of_sizes_and_of_no_names(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", {"path": ["/a"], "bytes": [5]})
    assert inputs_of(f"{tmp_path}/x.parquet").paths == ["/a"]
    write(tmp_path / "y.parquet", {"audio": [{"bytes": b"1", "path": None}]})
    assert inputs_of(f"{tmp_path}/y.parquet").columns == ["audio"]


def test_parquet_files_are_more_than_a_process_may_open(tmp_path: Path) -> None:
    for number in range(100):
        write(tmp_path / f"{number}.parquet", {"bytes": [b"1"]})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        assert inputs_of(f"{tmp_path}/*.parquet").number == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_that_nobody_knows() -> None:
    with pytest.raises(OptionError, match="nowhere://calls: cannot be opened: Protocol not known: nowhere"):
        inputs_of("nowhere://calls")


def test_a_store_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unable to locate credentials")  # botocore's is no OSError either

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refuse)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "makedirs", refuse)
    with pytest.raises(OptionError, match="INPUT memory://calls: cannot be read: Unable to locate credentials"):
        inputs_of("memory://calls")
    with pytest.raises(OptionError, match="OUTPUT memory://texts: cannot be written to: Unable to locate credentials"):
        Parts("memory://texts")


def test_parquet_files_that_differ(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"bytes": [b""]})
    write(tmp_path / "b.parquet", {"path": ["x"]})
    with pytest.raises(OptionError, match="b.parquet: its columns are not those of .*a.parquet"):
        inputs_of(f"{tmp_path}/*.parquet")
