"""What `maxwhisper bulk` makes of files that it cannot read, at once or at all."""

# ruff: noqa: E402 - what is imported below the skips is installed by the extra

import errno
import io
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any

import fsspec
import numpy as np
import pytest

from maxwhisper.bulk import stages
from maxwhisper.bulk.inputs import inputs_of
from maxwhisper.errors import AudioError, MaxWhisperError

from .bulk import decoded
from .command import CLIP


@pytest.fixture(params=["pipe", "socket", "device", "folder"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yields what has the name of a file of audio, and is none; of a pipe the end comes after a while."""
    path = tmp_path / "x.wav"
    with ExitStack() as stack:
        if request.param == "pipe":
            os.mkfifo(path)
            writing = Timer(5, os.close, [os.open(path, os.O_RDWR)])
            writing.start()
            stack.callback(writing.cancel)
        elif request.param == "socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        yield path


def test_what_is_no_regular_file_is_not_waited_for(special: Path) -> None:
    [row] = decoded((str(special), None))
    assert row["error"].startswith(f"{special}: is no regular file") and not row["transient"]
    found = [] if special.is_dir() else [str(special)]
    (special.parent / "y.wav").touch()
    for source in (special.parent, special.parent / "*.wav"):
        assert inputs_of(str(source)).paths == [*found, str(special.parent / "y.wav")]


@pytest.mark.parametrize("ending", ["txt", "parquet"])
def test_a_list_that_is_a_pipe_is_not_waited_for(ending: str, tmp_path: Path) -> None:
    pipe = tmp_path / f"x.{ending}"
    os.mkfifo(pipe)
    writing = Timer(5, os.close, [os.open(pipe, os.O_RDWR)])
    writing.start()
    with pytest.raises(MaxWhisperError, match="x.* is no regular file"):
        inputs_of(str(pipe))
    writing.cancel()


def of_libav(number: int) -> AudioError:
    """Returns what reading a file raises where the system gives this error."""
    error = AudioError("x.wav: cannot be read as audio")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


@pytest.mark.parametrize(
    ("path", "error", "transient"),
    [
        ("store://x.wav", OSError(errno.EIO, "Input/output error"), True),
        ("store://x.wav", TimeoutError(), True),
        ("store://x.wav", ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        ("store://x.wav", RuntimeError("a store's own"), True),
        ("store://x.wav", FileNotFoundError(errno.ENOENT, "No such file"), False),
        ("x.wav", of_libav(errno.ESTALE), True),
        ("x.wav", of_libav(errno.EACCES), False),
        ("x.wav", AudioError("x.wav: no audio stream"), False),
    ],
)
def test_a_file_is_read_again_where_the_error_may_pass(
    path: str, error: Exception, transient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, waited = [error], []

    def flaky(result: Any) -> Any:
        if errors:
            raise errors.pop()
        return result

    monkeypatch.setattr(stages, "load_audio", lambda _: flaky(np.zeros(9, np.float32)))
    monkeypatch.setattr(fsspec, "open", lambda *_: flaky(io.BytesIO(CLIP.read_bytes())))
    monkeypatch.setattr(stages.time, "sleep", waited.append)
    [row] = decoded((path, None))
    assert (row["audio"] is not None, len(waited)) == ((True, 1) if transient else (False, 0))
    errors += [error] * 9
    [row] = decoded((path, None))
    assert row["audio"] is None and row["transient"] == transient and str(error) in row["error"]
    assert waited[1:] == (list(stages.WAITS) if transient else [])
