"""Standard input, pipes and sockets give the samples of the file that is sent through them, and nothing waits or reads
for ever."""

import os
import pty
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread, Timer

import av
import numpy as np
import pytest

from maxwhisper import pipes
from maxwhisper.audio import duration, load_audio, read_audio, read_upload
from maxwhisper.compare.material import recordings
from maxwhisper.errors import AudioError
from maxwhisper.pipes import Pipe

from .pipes import ctrl_c, fifo, in_background, pipe, standard_input
from .test_audio import LOSSLESS, LOSSY, message, noise, tone, write, write_video, write_wave


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    return write_wave(tmp_path / "a.wav", noise())


@pytest.mark.parametrize(("ending", "codec", "sample_format"), [*LOSSLESS, *LOSSY])
def test_every_format(tmp_path: Path, ending: str, codec: str, sample_format: str) -> None:
    path = write(tmp_path / f"a.{ending}", noise(), codec, sample_format)
    np.testing.assert_array_equal(load_audio(fifo(tmp_path / "pipe", path.read_bytes())), load_audio(path))


def test_a_video_whose_index_is_at_its_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", tone(20))
    data = path.read_bytes()
    assert data.index(b"moov") > data.index(b"mdat")
    np.testing.assert_array_equal(load_audio(fifo(tmp_path / "pipe", data)), load_audio(path))


def test_tags_that_are_not_utf_8(wav: Path) -> None:
    """As of players of the nineties: in a file, in a pipe, and in what is sent to a server."""
    tags = b"LIST" + struct.pack("<I", 22) + b"INFOINAM" + struct.pack("<I", 9) + b"Gespr\xe4ch\0\0"
    wav.write_bytes(wav.read_bytes() + tags)
    with pytest.raises(UnicodeDecodeError):
        av.open(str(wav))
    with wav.open("rb") as sent:
        uploaded = read_upload(sent, "a.wav", 1, Event())
    for found in (uploaded, load_audio(wav), load_audio(fifo(wav.with_name("pipe"), wav.read_bytes()))):
        np.testing.assert_array_equal(found, noise().astype(np.float32))
    assert duration(wav) == 1


def test_more_than_is_kept_in_memory(tmp_path: Path, wav: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "IN_MEMORY", 1000)
    np.testing.assert_array_equal(load_audio(fifo(tmp_path / "pipe", wav.read_bytes())), load_audio(wav))


def test_no_place_for_what_is_not_kept_in_memory(tmp_path: Path, wav: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "IN_MEMORY", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    text = message(AudioError, load_audio, fifo(tmp_path / "pipe", wav.read_bytes()))
    assert text == f"{tmp_path / 'pipe'}: cannot be kept in a temporary file: No such file or directory"


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0", Path("-")])
def test_standard_input(name: str | Path, wav: Path) -> None:
    with standard_input(pipe(wav.read_bytes())):
        np.testing.assert_array_equal(load_audio(name), noise().astype(np.float32))


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_from_a_file(name: str, wav: Path) -> None:
    with standard_input(os.open(wav, os.O_RDONLY)):
        np.testing.assert_array_equal(load_audio(name), noise().astype(np.float32))


def test_standard_input_from_where_another_has_read_to(tmp_path: Path, wav: Path) -> None:
    (tmp_path / "later").write_bytes(b"one line\n" + wav.read_bytes())
    with standard_input(os.open(tmp_path / "later", os.O_RDONLY)):
        assert os.read(0, 9) == b"one line\n"
        np.testing.assert_array_equal(load_audio("-"), noise().astype(np.float32))


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_from_a_socket(name: str, wav: Path) -> None:
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs:
            theirs.sendall(wav.read_bytes())

    in_background(send)
    with standard_input(ours.detach()):
        np.testing.assert_array_equal(load_audio(name), noise().astype(np.float32))


def test_process_substitution(wav: Path) -> None:
    descriptor = pipe(wav.read_bytes())
    np.testing.assert_array_equal(load_audio(f"/dev/fd/{descriptor}"), noise().astype(np.float32))
    os.close(descriptor)  # which is still the caller's


def test_a_writer_that_comes_later(tmp_path: Path, wav: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    Timer(0.3, lambda: path.write_bytes(wav.read_bytes())).start()
    np.testing.assert_array_equal(load_audio(path), noise().astype(np.float32))


STANDARD_INPUTS: dict[str, tuple[Callable[[], int], str]] = {
    "empty": (lambda: pipe(b""), "-: nothing came"),
    "text": (lambda: pipe(b"This is no audio.\n" * 100), "-: cannot be read as audio: Invalid data"),
    "zeros without end": (lambda: endless(b"\0"), "-: cannot be read as audio: Invalid data"),
    "folder": (lambda: os.open(".", os.O_RDONLY), "-: cannot be read: Is a directory"),
    "writable alone": (lambda: os.open(os.devnull, os.O_WRONLY), "-: is a device"),
    "null": (lambda: os.open(os.devnull, os.O_RDONLY), "-: is a device"),
    "device": (lambda: os.open("/dev/zero", os.O_RDONLY), "-: is a device"),
}


def endless(data: bytes) -> int:
    """Returns a pipe that never ends: 64 MB are more than anybody asks before giving it up."""
    return pipe(data * 2**26)


@pytest.mark.parametrize("case", STANDARD_INPUTS)
def test_standard_input_without_audio(case: str) -> None:
    make, expected = STANDARD_INPUTS[case]
    with standard_input(make()):
        assert message(AudioError, load_audio, "-").startswith(expected)


def test_a_terminal() -> None:
    master, slave = pty.openpty()
    with standard_input(slave):
        assert message(AudioError, load_audio, "-").startswith("-: is a terminal")
    os.close(master)


def test_closed_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor may be another file's by then."""
    monkeypatch.setattr(sys, "__stdin__", None)
    assert message(AudioError, load_audio, "-") == "-: standard input is closed"


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom", "/dev/full", "/dev/null", "/dev/tty"])
def test_devices(name: str) -> None:
    assert message(AudioError, load_audio, name).startswith(f"{name}: is a ")


def test_pipes_that_cannot_be_opened(tmp_path: Path) -> None:
    for name in ("/dev/fd/987", f"/dev/fd/{10**30}"):
        assert message(AudioError, load_audio, name).startswith(f"{name}: cannot be read")


def test_waiting_for_a_pipe_ends_with_ctrl_c(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ctrl_c(0.1), pytest.raises(KeyboardInterrupt):
        load_audio(tmp_path / "pipe")


@pytest.fixture
def unfinished(tmp_path: Path) -> Iterator[Path]:
    """Yields a pipe whose writer begins, and then neither goes on nor leaves."""
    path = tmp_path / "unfinished"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)
    os.write(descriptor, write_wave(tmp_path / "a.wav", noise()).read_bytes()[:20000])
    yield path
    os.close(descriptor)


def test_reading_ahead_ends_when_nobody_wants_it(unfinished: Path) -> None:
    stopped = Event()
    Timer(0.1, stopped.set).start()
    began = time.monotonic()
    with pytest.raises(AudioError, match="not read to its end"):
        read_audio(unfinished, 16000, stopped)
    assert time.monotonic() - began < 10  # it would wait for ever


def test_reading_ahead_ends_where_nobody_writes_yet(tmp_path: Path) -> None:
    """In a thread of its own, which would wait for ever, and no Ctrl-C comes to it."""
    os.mkfifo(tmp_path / "pipe")
    stopped, said = Event(), list[str]()
    stopped.set()
    reads = (AudioError, read_audio, tmp_path / "pipe", 16000, stopped)
    reader = Thread(target=lambda: said.append(message(*reads)), daemon=True)
    reader.start()
    reader.join(10)
    assert said and said[0].endswith("was not read to its end")


def test_a_pipe_is_read_as_a_file_is() -> None:
    with Pipe("a pipe", pipe(b"0123456789"), Event()) as read:
        assert (read.read(4), read.tell()) == (b"0123", 4)
        assert (read.seek(-2, os.SEEK_END), read.read(100), read.tell()) == (8, b"89", 10)
        assert (read.read(5), read.tell()) == (b"", 10)
        assert (read.seek(1), read.read(2), read.seek(2, os.SEEK_CUR), read.read(1)) == (1, b"12", 5, b"5")


def test_descriptors_are_closed(tmp_path: Path, wav: Path) -> None:
    before = os.listdir("/dev/fd")
    load_audio(fifo(tmp_path / "pipe", wav.read_bytes()))
    with standard_input(pipe(b"no audio" * 1000)):
        message(AudioError, load_audio, "-")
    time.sleep(0.05)  # for the threads that wrote
    assert len(os.listdir("/dev/fd")) == len(before)


def test_the_duration_of_what_can_be_read_once_is_not_known(tmp_path: Path, wav: Path) -> None:
    path = fifo(tmp_path / "pipe", wav.read_bytes())
    with standard_input(pipe(wav.read_bytes())):
        for name in (path, "-", "/dev/stdin", "http://localhost:1/a.wav", "/dev/zero"):
            assert duration(name) is None
        for name in (path, "-"):
            assert len(load_audio(name)) == len(noise())


def test_the_duration_of_files(tmp_path: Path, wav: Path) -> None:
    assert duration(wav) == 1
    assert duration(tmp_path / "missing.wav") == 0


def test_comparing_engines_reads_a_pipe_once(tmp_path: Path, wav: Path) -> None:
    """Their processes get the samples."""
    with standard_input(pipe(wav.read_bytes())):
        heard = recordings(["-", str(fifo(tmp_path / "pipe", wav.read_bytes()))], None)
    assert [(each.name, len(each.audio)) for each in heard] == [("-", len(noise())), ("pipe", len(noise()))]


def test_what_has_come_is_read_at_once() -> None:
    """Though the pipe is open, and more may come."""
    reading, writing = os.pipe()
    os.write(writing, b"0123456789")
    stopped = Event()
    timer = Timer(10, stopped.set)
    timer.start()
    try:
        with Pipe("a pipe", reading, stopped) as read:
            assert (read.read(4), read.read(6)) == (b"0123", b"456789")
            assert (read.seek(-99, os.SEEK_CUR), read.tell(), read.read(1)) == (0, 0, b"0")
            assert not stopped.is_set()
    finally:
        timer.cancel()
        os.close(writing)
