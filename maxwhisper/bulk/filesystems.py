"""Files and folders on a disk or in an object store, by fsspec."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from ..errors import AudioError, OptionError
from ..files import replacing
from ..pipes import is_regular, status_of


def filesystem_of(url: str) -> tuple[Any, str]:
    """Returns the file system of a path or a URL, as in s3://bucket/folder, and the path in it.

    Raises OptionError for a URL that fsspec knows nothing of, or whose package is not installed, and for no name.
    """
    if not url.strip():  # to fsspec, the folder that one happens to be in
        raise OptionError("the name of a file or folder is empty")
    if "::" in url and "://" not in url:  # a name on a disk, and none of the chains that fsspec takes it for
        return fsspec.filesystem("file"), os.path.abspath(url)
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise OptionError(f"{url}: cannot be opened: {error}") from error


def is_local(system: Any) -> bool:
    return isinstance(system, LocalFileSystem)


def check_regular(path: str) -> None:
    """Raises AudioError for what is on a disk and no regular file: a pipe would be waited for, perhaps for ever."""
    if status_of(path) and not is_regular(path):
        raise AudioError(f"{path}: is no regular file: folders, pipes, sockets and devices are not read")


def full_name(system: Any, path: str) -> str:
    """Returns what opens a path of a file system from anywhere: an absolute path, or a URL."""
    return os.path.abspath(path) if is_local(system) else str(system.unstrip_protocol(path))


def for_arrow(system: Any) -> pyarrow.fs.FileSystem:
    """Returns a file system as Arrow, and so Ray Data, takes it."""
    if is_local(system):
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system))


@contextmanager
def appearing(system: Any, *paths: str) -> Iterator[list[IO[bytes]]]:
    """Gives files to write, which are at `paths` once all are complete; where the block raises, nothing changes."""
    with ExitStack() as stack:
        if is_local(system):
            unfinished = [stack.enter_context(replacing(Path(path))) for path in paths]
            yield [stack.enter_context(path.open("wb")) for path in unfinished]
        else:
            stack.enter_context(system.transaction)
            yield [stack.enter_context(system.open(path, "wb")) for path in paths]
