"""What `maxwhisper transcribe` reads and writes: inputs that can be read once, and outputs of which each is written
whatever becomes of the others."""

import io
import json
import os
import pty
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maxwhisper.cli.outputs import FORMATS

from .command import CLIP, RESULT, StubModel, assert_one_line, status, write_wav
from .pipes import ctrl_c, fifo, pipe, standard_input

NOBODY = 65534


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> StubModel:
    stub = StubModel()
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: stub)
    return stub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def written(out: Path) -> list[str]:
    return sorted(os.listdir(out))


def files_of(*stems: str) -> list[str]:
    return sorted(f"{stem}.{ending}" for stem in stems for ending in FORMATS)


# ---- inputs that can be read once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", ["True", "False"])
@pytest.mark.parametrize(("name", "stem"), [("-", "stdin"), ("/dev/stdin", "stdin"), ("/dev/fd/0", "0")])
def test_standard_input(name: str, stem: str, verbose: str, out: Path, model: StubModel) -> None:
    with standard_input(pipe(CLIP.read_bytes())):
        assert status(["transcribe", name, "-o", out, "--verbose", verbose]) == 0
    assert written(out) == files_of(stem)


def together(model: StubModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def batched(_: Any, audio: np.ndarray, batch_size: int, **options: Any) -> dict[str, Any]:
        return model.transcribe(audio)

    monkeypatch.setattr("maxwhisper.batched.transcribe_batched", batched)
    decoder = SimpleNamespace(on_device=False, of_thread=SimpleNamespace())
    monkeypatch.setattr(model, "decoder", decoder, raising=False)


@pytest.mark.parametrize("how", [[], ["--batch_size", "3"], ["--batched"]])
@pytest.mark.parametrize("verbose", ["True", "False"])
def test_files_and_pipes_in_one_run(
    how: list[str], verbose: str, tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(model, monkeypatch)
    named, substituted = fifo(tmp_path / "named", CLIP.read_bytes()), pipe(CLIP.read_bytes())
    with standard_input(pipe(CLIP.read_bytes())):
        names = ["-", named, CLIP, f"/dev/fd/{substituted}"]
        assert status(["transcribe", *names, "-o", out, "--verbose", verbose, *how]) == 0
    os.close(substituted)
    assert written(out) == files_of("stdin", "named", CLIP.stem, str(substituted))


def test_a_progress_bar_of_what_has_no_known_length(
    tmp_path: Path, out: Path, model: StubModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def transcribe(audio: np.ndarray, progress: Callable[[float], None], **_: Any) -> dict[str, Any]:
        progress(len(audio) / 16000)
        return RESULT

    monkeypatch.setattr(model, "transcribe", transcribe)
    files = [write_wav(tmp_path / f"{name}.wav", 16000 * seconds) for name, seconds in (("a", 3), ("b", 5))]
    piped = fifo(tmp_path / "pipe", files[1].read_bytes())
    assert status(["transcribe", files[0], piped, "-o", out, "-f", "txt", "--verbose", "False"]) == 0
    last = capsys.readouterr().err.strip().splitlines()[-1].split("\r")[-1]
    assert last.startswith("8 s, ") and last.endswith("x real time")


def test_one_pipe_by_two_names(out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    with standard_input(pipe(CLIP.read_bytes())):
        assert status(["transcribe", "-", "/dev/fd/0", "-o", out]) == 2
    assert_one_line(capsys, "'-' and '/dev/fd/0' are the same pipe")
    assert not model.calls


def test_one_output_name_for_standard_input(out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["transcribe", "-", "/dev/stdin", "-o", out]) == 2
    assert_one_line(capsys, "'stdin'")


def test_a_terminal(out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    master, slave = pty.openpty()
    with standard_input(slave):
        assert status(["transcribe", "-", "-o", out]) == 2
    os.close(master)
    assert_one_line(capsys, "-: is a terminal")
    assert not out.exists()


@pytest.mark.parametrize("bad", ["-", "/dev/zero"])
def test_an_input_without_end_or_audio_does_not_stop_the_others(
    bad: str, out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with standard_input(pipe(b"")):
        assert status(["transcribe", bad, CLIP, "-o", out, "-f", "txt"]) == 1
    assert_one_line(capsys, f"maxwhisper: error: {bad}: ")
    assert written(out) == [f"{CLIP.stem}.txt"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_ctrl_c_while_waiting_for_a_pipe(
    batch_size: int,
    tmp_path: Path,
    out: Path,
    model: StubModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    together(model, monkeypatch)
    for name in "ab":
        os.mkfifo(tmp_path / name)
    began = time.monotonic()
    with ctrl_c(0.3):
        assert status(["transcribe", tmp_path / "a", tmp_path / "b", "-o", out, "--batch_size", batch_size]) == 130
    assert time.monotonic() - began < 10  # it would wait for ever
    assert capsys.readouterr().err == "maxwhisper: interrupted\n"


@pytest.mark.parametrize("how", [[], ["--batched"]])
def test_ctrl_c_while_the_next_file_is_waited_for(
    how: list[str], tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "transcribe", interrupted)
    together(model, monkeypatch)
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    assert status(["transcribe", CLIP, tmp_path / "pipe", "-o", out, *how]) == 130
    assert time.monotonic() - began < 10  # it would wait for ever


def test_names_that_are_not_utf_8(
    tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, missing = (os.fsdecode(b"\xff %d.wav" % number) for number in (1, 2))
    write_wav(tmp_path / name, 1600)
    stdout = terminal_like(monkeypatch, "utf-8")
    together(model, monkeypatch)
    assert status(["transcribe", tmp_path / name, tmp_path / missing, "-o", out, "--batch_size", "2"]) == 1
    assert written(out) == files_of(Path(name).stem)
    assert b"? 1.wav:\n" in stdout.buffer.getvalue()
    assert_one_line(capsys, "2.wav: cannot be read")


@pytest.mark.parametrize("name", ["-talk.wav", "talk 10:30.wav", "--verbose"])
def test_names_that_look_like_something_else(
    name: str, tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wav(tmp_path / name, 1600)
    monkeypatch.chdir(tmp_path)
    assert status(["transcribe", "-o", out, "--", name]) == 0
    assert written(out) == files_of(os.path.splitext(name)[0])


@pytest.mark.parametrize(("output_format", "expected"), [("all", 2), ("txt", 2), ("srt", 0)])
def test_no_transcript_replaces_a_recording(
    output_format: str, expected: int, tmp_path: Path, model: StubModel, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = write_wav(tmp_path / "talk.txt", 1600)
    before = audio.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    given = ["transcribe", audio, CLIP, "-o", tmp_path / "link", "-f", output_format]
    assert status(given) == expected and audio.read_bytes() == before
    if expected:
        assert_one_line(capsys, f"argument AUDIO: the output {tmp_path / 'link' / 'talk.txt'} would replace '{audio}'")


# ---- outputs -------------------------------------------------------------------------------------------------------


def test_a_name_too_long_for_one_format(
    tmp_path: Path, out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = "n" * 251
    assert status(["transcribe", write_wav(tmp_path / f"{stem}.wav", 1600), CLIP, "-o", out]) == 1
    assert_one_line(capsys, f"{out / stem}.json: cannot be written: File name too long")
    assert written(out) == sorted(set(files_of(stem, CLIP.stem)) - {f"{stem}.json"})


def test_a_folder_where_a_file_should_be(out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    target = out / f"{CLIP.stem}.srt"
    target.mkdir(parents=True)
    assert status(["transcribe", CLIP, "-o", out]) == 1
    assert_one_line(capsys, f"{target}: cannot be written: Is a directory")
    assert written(out) == files_of(CLIP.stem) and not os.listdir(target)


@pytest.fixture
def folder_of_a_user() -> Iterator[Path]:
    """Yields a folder of somebody for whom files can be read-only, as whom the test runs; for root no file is."""
    with tempfile.TemporaryDirectory() as name:
        user = os.geteuid()
        if user == 0:
            os.chown(name, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        yield Path(name)
        os.seteuid(user)


def test_a_read_only_file(folder_of_a_user: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    audio, out = write_wav(folder_of_a_user / "a.wav", 1600), folder_of_a_user / "out"
    out.mkdir()
    (out / "a.vtt").write_text("old")
    (out / "a.vtt").chmod(0o444)
    assert status(["transcribe", audio, "-o", out]) == 1
    assert_one_line(capsys, f"{out}/a.vtt: cannot be written: Permission denied")
    assert written(out) == files_of("a")
    assert (out / "a.vtt").read_text() == "old"


@pytest.mark.parametrize("disk", [None, "/dev/shm"])
def test_a_link_stays_and_leads_to_the_transcript(out: Path, model: StubModel, disk: str | None) -> None:
    """As with OpenAI's command; /dev/shm is another file system wherever Linux runs as usual."""
    out.mkdir()
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        (link := out / f"{CLIP.stem}.txt").symlink_to(Path(folder, "there.txt"))
        for _ in range(2):
            assert status(["transcribe", CLIP, "-o", out]) == 0
            assert link.is_symlink() and Path(folder, "there.txt").read_text()
            assert os.listdir(folder) == ["there.txt"] and written(out) == files_of(CLIP.stem)


def test_who_may_read_an_earlier_file_stays(out: Path, model: StubModel) -> None:
    out.mkdir()
    (out / f"{CLIP.stem}.txt").touch(0o600)
    assert status(["transcribe", CLIP, "-o", out]) == 0
    assert (out / f"{CLIP.stem}.txt").stat().st_mode & 0o777 == 0o600 and (out / f"{CLIP.stem}.txt").read_text()


@contextmanager
def small_disk() -> Iterator[None]:
    """Lets no file become larger than 4,000 bytes, nor the one that pytest may be writing to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_with_room_for_some(
    out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that had been there remains, and no part of a new one appears."""
    out.mkdir()
    (out / f"{CLIP.stem}.json").write_text("old")
    monkeypatch.setattr(model, "transcribe", lambda *_, **__: RESULT | {"more": "x" * 10000})
    with small_disk():
        assert status(["transcribe", CLIP, "-o", out]) == 1
    assert_one_line(capsys, f"{CLIP.stem}.json: cannot be written: File too large")
    assert written(out) == files_of(CLIP.stem)
    assert (out / f"{CLIP.stem}.json").read_text() == "old"
    assert (out / f"{CLIP.stem}.txt").read_text() == "Hello there.\n"


def test_a_full_disk(
    tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file that is not there is named, and so are those of the next recording."""

    def fail(self: Any, result: Any, file: Any, **_: Any) -> None:
        file.write("half of ")
        raise OSError(28, "No space left on device")

    for writer in ("WriteTXT", "WriteJSON"):
        monkeypatch.setattr(f"whisper.utils.{writer}.write_result", fail)
    files = [write_wav(tmp_path / f"{name}.wav", 1600) for name in "ab"]
    assert status(["transcribe", *files, "-o", out]) == 1
    reason = "cannot be written: No space left on device\n"
    lost = [out / name for name in ("a.txt", "a.json", "b.txt", "b.json")]
    assert capsys.readouterr().err == "".join(f"maxwhisper: error: {file}: {reason}" for file in lost)
    assert written(out) == sorted(set(files_of("a", "b")) - {file.name for file in lost})


def test_a_format_that_fails_by_itself(out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    result = RESULT | {"duration": {1, 2}}  # no JSON
    model.transcribe = lambda *_, **__: result  # type: ignore[method-assign]
    assert status(["transcribe", CLIP, "-o", out]) == 1
    assert_one_line(capsys, f"{out / CLIP.stem}.json: cannot be written: TypeError: Object of type set is not JSON")
    assert written(out) == sorted(set(files_of(CLIP.stem)) - {f"{CLIP.stem}.json"})


def test_subtitles_that_fail_leave_the_text(out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    segments = [*RESULT["segments"], {"id": 1, "start": 1.5, "end": 2.0, "text": " Bye."}]  # without its words
    model.transcribe = lambda *_, **__: RESULT | {"segments": segments}  # type: ignore[method-assign]
    options = ["--word_timestamps", "True", "--max_line_width", "9"]
    assert status(["transcribe", CLIP, "-o", out, *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [f"{out / CLIP.stem}.{ending}" for ending in ("vtt", "srt")]
    assert written(out) == [f"{CLIP.stem}.{ending}" for ending in ("json", "tsv", "txt")]


def test_a_folder_that_is_lost_meanwhile(
    tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def transcribe(*_: Any, **__: Any) -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        out.write_text("")
        return RESULT

    monkeypatch.setattr(model, "transcribe", transcribe)
    assert status(["transcribe", CLIP, "-o", out]) == 1
    assert_one_line(capsys, f"{CLIP}: --output_dir {out}: cannot be written to: File exists")


# ---- standard output -----------------------------------------------------------------------------------------------


def terminal_like(monkeypatch: pytest.MonkeyPatch, encoding: str) -> Any:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    return stdout


def printing(model: StubModel, lines: int) -> None:
    def transcribe(*_: Any, **__: Any) -> dict[str, Any]:
        for _line in range(lines):
            print("[00:00.000 --> 00:01.500]  Grüße", flush=True)
        return RESULT

    model.transcribe = transcribe  # type: ignore[method-assign]


def test_characters_that_standard_output_has_not(out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch) -> None:
    printing(model, 1)
    stdout = terminal_like(monkeypatch, "ascii")
    assert status(["transcribe", CLIP, "-o", out]) == 0
    assert stdout.buffer.getvalue() == b"[00:00.000 --> 00:01.500]  Gr??e\n"
    assert written(out) == files_of(CLIP.stem)


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (closed_pipe, "standard output was closed"),
        (lambda: os.open("/dev/full", os.O_WRONLY), "standard output: No space left on device"),
    ],
)
@pytest.mark.parametrize("how", [[], ["--batch_size", "2"]])
def test_files_are_written_whatever_becomes_of_standard_output(
    how: list[str],
    make: Callable[[], int],
    reason: str,
    tmp_path: Path,
    out: Path,
    model: StubModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printing(model, 100)
    together(model, monkeypatch)
    files = [write_wav(tmp_path / f"{name}.wav", 1600) for name in "ab"]
    with open(make(), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert status(["transcribe", *files, "-o", out, *how]) == 1
    assert_one_line(capsys, reason)
    assert written(out) == files_of("a", "b")


@pytest.mark.parametrize("make", [closed_pipe, lambda: os.open("/dev/full", os.O_WRONLY)], ids=["closed", "full"])
def test_files_are_written_whatever_becomes_of_standard_error(
    make: Callable[[], int], tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, missing = write_wav(tmp_path / "a.wav", 1600), tmp_path / "missing.wav"
    with open(make(), "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert status(["transcribe", good, "-o", out, "--verbose", "False"]) == 0
        assert status(["transcribe", missing, good, "-o", out, "--verbose", "False"]) == 1
    assert written(out) == files_of("a")


def test_no_standard_output_at_all(
    out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printing(model, 1)
    monkeypatch.setattr(sys, "stdout", None)
    assert status(["transcribe", CLIP, "-o", out]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("argument", "expected"), [("--help", 0), ("doctor", 1)])
def test_what_is_printed_last_may_be_lost_too(
    argument: str, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits in a buffer until the end; of the help nobody is told."""
    report = SimpleNamespace(red=[], text=lambda: "")
    monkeypatch.setattr("maxwhisper.doctor.examine", lambda: report)
    with open(closed_pipe(), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert status([argument]) == expected
    assert capsys.readouterr().err == expected * "maxwhisper: error: standard output was closed\n"


def test_json_is_what_openai_writes(out: Path, model: StubModel) -> None:
    with standard_input(pipe(CLIP.read_bytes())):
        assert status(["transcribe", "-", "-o", out, "-f", "json"]) == 0
    assert json.loads((out / "stdin.json").read_text()) == RESULT
