"""Where files are kept that can be made again, and where instead if nothing can be written there."""

import atexit
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from ..errors import OptionError

log = logging.getLogger("maxwhisper")

ROOM = 2**28
"""Bytes that must be free where files are to be kept: what is compiled for a model takes some 100 MB."""


def folder_named(option: str, name: str | os.PathLike[str]) -> Path:
    """Returns the folder that an option names; raises OptionError for what is no name: of an empty one that would be
    the folder one happens to be in."""
    if not isinstance(name, str | os.PathLike) or not os.fspath(name) or "\0" in os.fspath(name):
        raise OptionError(f"{option} is {name!r}, expected the name of a folder")
    return Path(name)


def cache_folder(kind: str) -> Path:
    """Returns the folder for files of a kind: `$MAXWHISPER_CACHE_DIR/<kind>`, else `$XDG_CACHE_HOME/maxwhisper/<kind>`,
    else the same under `~/.cache`; where nothing can be written there, a temporary one, as `writable` says.

    Raises OptionError where nothing can be written at all.
    """
    return writable(cache_root()) / kind


def cache_root() -> Path:
    """Returns the folder that is wanted for all kinds, whether it can be written to or not."""
    return Path(os.getenv("MAXWHISPER_CACHE_DIR") or cache_home() / "maxwhisper")


def cache_home() -> Path:
    """Returns `$XDG_CACHE_HOME`, or `~/.cache`; of a user without a home, that path with its "~"."""
    return Path(os.getenv("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


@cache
def writable(folder: Path, quiet: bool = False) -> Path:
    """Returns the folder, made if it was not there, or one that stands in for it: with a warning unless `quiet`, once,
    if it cannot be written to or has not ROOM free. What it holds is found in the other one too.

    Raises OptionError where nothing can be written at all.
    """
    try:
        free = free_bytes(folder)
        reason = f"only {free // 2**20} MB are free there"
    except OSError as error:
        free, reason = -1, error.strerror or str(error)
    if free >= ROOM:
        return folder
    try:
        instead = stand_in(folder)
        if free_bytes(instead) <= free:
            return folder  # it is nowhere better
        mirror(folder, instead)
    except OSError as error:
        raise OptionError(
            f"{folder}: cannot be written to ({reason}), and neither can a temporary folder"
            f" ({error.strerror or error}); set MAXWHISPER_CACHE_DIR or TMPDIR to a folder that can"
        ) from error
    if not quiet:
        log.warning(
            "%s: cannot be used as a cache (%s): %s is used instead, and what is in it must be made again, in minutes,"
            " when the system has emptied it; MAXWHISPER_CACHE_DIR and MODULAR_CACHE_DIR can name other folders",
            *(folder, reason, instead),
        )
    return instead


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Has processes of this machine that share a cache run the body one after the other, for the same `what`. Where
    files cannot be locked they do not wait for each other."""
    folder = cache_folder("locks")
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / hashlib.sha256(os.fsencode(what)).hexdigest()[:16]).open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_bytes(folder: Path) -> int:
    """Returns how much can be written to a folder, which is made if it was not there; raises OSError if nothing can."""
    if folder.parts[:1] == ("~",):
        raise OSError("this user has no home folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return shutil.disk_usage(folder).free


def stand_in(folder: Path) -> Path:
    """Returns a temporary folder for what another one cannot take, the same in every process of this user.

    Raises OSError where there is no folder for temporary files.
    """
    digest = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()
    instead = temporary_folder() / f"{folder.name}-{digest[:8]}"
    instead.mkdir(exist_ok=True)
    return instead


@cache
def temporary_folder() -> Path:
    """Returns a temporary folder of this user's own, since what is compiled is run: the same in every process, or of
    this process alone where somebody else has one of that name. Raises OSError where there is no place for it."""
    folder = Path(tempfile.gettempdir(), f"maxwhisper-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    folder = Path(tempfile.mkdtemp(prefix="maxwhisper-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def mirror(folder: Path, into: Path) -> None:
    """Links every file of a folder into the same place of another one, where there is none yet; but for empty ones,
    which are locks: they cannot be taken where they cannot be written to."""
    for path, folders, files in os.walk(folder):
        there = into / Path(path).relative_to(folder)
        there.mkdir(exist_ok=True)
        for name in (*files, *(name for name in folders if Path(path, name).is_symlink())):
            file = Path(path, name).absolute()
            with suppress(FileExistsError, FileNotFoundError):
                if not file.is_file() or file.stat().st_size:
                    (there / name).symlink_to(file)
