"""What is to be transcribed: files by their names, or Parquet files that hold the bytes of audio files."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import MaxWhisperError, OptionError
from .filesystems import check_regular, filesystem_of, full_name, is_local

AUDIO = "aac ac3 aif aiff amr au caf flac m4a m4b mp2 mp3 mpga oga ogg opus wav wave weba wma"
VIDEO = "3gp avi flv m4v mka mkv mov mp4 mpeg mpg mts ogv ts webm wmv"
ENDINGS = frozenset(f".{ending}" for ending in f"{AUDIO} {VIDEO}".split())
"""Endings of the files in a folder that are transcribed; a list and a pattern may name any file."""

IDENTIFIED = pa.schema([("id", pa.string()), ("path", pa.string()), ("bytes", pa.large_binary())])


@dataclass(frozen=True)
class Inputs:
    """Files by their names, or Parquet files with `columns` of bytes, and how many inputs these are."""

    number: int
    paths: list[str]
    parquet: list[str]
    columns: list[str]


def inputs_of(source: str) -> Inputs:
    """Finds what INPUT stands for: a folder, a pattern, a list (.txt), Parquet (.parquet, or a pattern that ends so),
    or one file of audio; on a disk or in an object store.

    Raises OptionError if there is nothing, or it cannot be read.
    """
    try:
        files = files_of(source)
        if source.endswith(".parquet"):
            return in_parquet(source, files)
        if source.endswith(".txt"):
            files = [path for file in files for path in lines_of(file)]
    except MaxWhisperError:
        raise
    except Exception as error:  # what a store's package raises, as for want of credentials, has no common class
        raise OptionError(f"INPUT {source}: cannot be read: {error}") from error
    if not files:
        raise OptionError(f"INPUT {source}: names no file")
    return named(files)


def named(paths: list[str]) -> Inputs:
    """Raises OptionError for a name that Parquet cannot hold."""
    unique = list(dict.fromkeys(paths))
    if wrong := [path for path in unique if path.encode(errors="ignore").decode() != path]:
        raise OptionError(f"INPUT: names of {len(wrong)} files are not UTF-8, as {wrong[0]}: rename them")
    return Inputs(len(unique), unique, [], [])


def files_of(source: str) -> list[str]:
    """Returns the full names of the files that a name, a folder or a pattern stands for, sorted; raises OptionError if
    there is none."""
    system, path = filesystem_of(source)
    if system.isdir(path):
        inside = below(path) if is_local(system) else system.find(path)
        found = [file for file in inside if PurePosixPath(file).suffix.lower() in ENDINGS]
        if not found:
            raise OptionError(f"INPUT {source}: no file in this folder ends as audio or video does, as in .mp3")
    elif system.exists(path):
        found = [path]
    elif any(character in path for character in "*?["):
        found = [file for file in system.glob(path) if is_input(system, file)]
    else:
        raise OptionError(f"INPUT {source}: there is no such file or folder")
    return sorted(full_name(system, file) for file in found)


def is_input(system: Any, path: str) -> bool:
    """Returns whether a pattern has found no folder: of a disk, what is no file either has a row that says so."""
    return not os.path.isdir(path) if is_local(system) else bool(system.isfile(path))


def below(folder: str) -> Iterator[str]:
    """Yields the files of a disk in a folder and those in it, of which fsspec leaves out what it may not read."""

    def refuse(error: OSError) -> None:
        raise error

    for path, _, names in os.walk(folder, onerror=refuse):
        yield from (os.path.join(path, name) for name in names)


def to_read(file: str) -> tuple[Any, str]:
    """Returns the file system of a file and its path there; raises AudioError for a pipe and the like."""
    system, path = filesystem_of(file)
    if is_local(system):
        check_regular(path)
    return system, path


def lines_of(file: str) -> Iterator[str]:
    """Yields the full names in a file that has one a line."""
    system, path = to_read(file)
    for line in system.read_text(path, encoding="utf-8-sig").split("\n"):  # splitlines cuts names at U+2028 too
        if line.strip():
            yield full_name(*filesystem_of(line.strip()))


def in_parquet(source: str, files: list[str]) -> Inputs:
    """Finds what Parquet files hold: a column `path` alone, or bytes; raises OptionError for others."""
    if not files:
        raise OptionError(f"INPUT {source}: names no file")
    columns: list[str] = []
    number, paths = 0, []
    for file in files:
        with opened_parquet(file) as opened:  # one after the other: there may be more than a process may open
            found = columns_of(file, opened.schema_arrow)
            columns = columns or found
            if found != columns:
                raise OptionError(f"INPUT {file}: its columns are not those of {files[0]}")
            number += opened.metadata.num_rows
            if columns == ["path"]:
                for batch in opened.iter_batches(columns=columns):
                    paths += batch.column(0).to_pylist()
    if not number:
        raise OptionError(f"INPUT {source}: has no row")
    if columns != ["path"]:
        return Inputs(number, [], files, columns)
    if None in paths:
        raise OptionError(f"INPUT {source}: a path is null")
    return named([full_name(*filesystem_of(path)) for path in paths])


def opened_parquet(file: str) -> pq.ParquetFile:
    system, path = to_read(file)
    return pq.ParquetFile(path if is_local(system) else system.open(path))


def is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_text(kind: pa.DataType | None) -> bool:
    """Returns whether a column can be of names: it may have none."""
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def columns_of(source: str, schema: pa.Schema) -> list[str]:
    """Returns those columns that say what to transcribe; raises OptionError if there are none."""
    types = {field.name: field.type for field in schema}
    kind = types.get("audio")
    within = {field.name: field.type for field in kind} if kind is not None and pa.types.is_struct(kind) else {}
    if is_bytes(within.get("bytes")) and is_text(within.get("path", pa.null())):
        return ["audio"]
    if is_bytes(types.get("bytes")) and is_text(types.get("path", pa.null())):
        return ["bytes", "path"] if "path" in types else ["bytes"]
    if is_text(types.get("path")):
        return ["path"]
    raise OptionError(
        f"INPUT {source}: has the columns {', '.join(types)}: expected `path` (strings), `bytes` (binary), or `audio`"
        " (a struct with `bytes`)"
    )


def identify(path: str | None, content: bytes | None) -> str:
    """Returns the id of an input: a hash of its full name, or of its bytes and the name they have, if any."""
    found = hashlib.sha256((path or "").encode("utf-8", "surrogateescape"))
    if content is not None:
        found.update(b"\0" + content)
    return found.hexdigest()[:32]


def identified(table: pa.Table) -> pa.Table:
    """Returns a table of inputs as IDENTIFIED, with their ids; one that is so already as it is."""
    if table.schema.equals(IDENTIFIED):
        return table
    rows = [row.get("audio") or row for row in table.to_pylist()]
    plain = [(row.get("path"), row.get("bytes")) for row in rows]
    ids = [identify(path, content) for path, content in plain]
    paths, contents = zip(*plain, strict=True) if plain else ((), ())
    columns = (ids, paths, contents)
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, IDENTIFIED, strict=True)], IDENTIFIED
    )
