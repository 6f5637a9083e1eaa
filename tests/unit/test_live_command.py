"""`maxwhisper live`: what comes through standard input or from a microphone, a machine too slow, Ctrl-C, the files."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest

from maxwhisper.audio import SAMPLE_RATE, load_audio
from maxwhisper.cli.outputs import FORMATS
from maxwhisper.live import AlignAtt
from maxwhisper.live.listening import listen
from maxwhisper.live.screen import Lines
from maxwhisper.live.source import Source, is_of_a_file
from maxwhisper.whisper import Whisper

from .command import CLIP, RESULT, assert_one_line, status
from .pipes import pipe, standard_input

PCM = (load_audio(CLIP) * 32768).astype("<i2").tobytes()


class Heard:
    """A session that settles a word for every piece it is fed."""

    def __init__(self, *_: Any, **options: Any):
        self.options = options
        self.policy: Any = None
        self.is_multilingual = True
        self.fed: list[np.ndarray] = []
        self.skipped: list[np.ndarray] = []
        self.settled, self.tentative = "", " maybe"

    @property
    def samples(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float32), *self.fed])

    @property
    def seconds(self) -> float:
        return sum(map(len, self.fed + self.skipped)) / SAMPLE_RATE

    def feed(self, samples: np.ndarray) -> None:
        self.fed.append(samples)
        self.settled += " Word."

    def skip(self, samples: np.ndarray) -> None:
        self.skipped.append(samples)

    def finish(self) -> dict[str, Any]:
        return RESULT


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """Returns what the command makes, with a model that does nothing."""
    found = Heard()

    def made(_: Any, policy: Any, **options: Any) -> Heard:
        found.policy, found.options = policy, options
        return found

    monkeypatch.setattr("maxwhisper.live.command.Session", made)
    monkeypatch.setattr("maxwhisper.live.command.prepare", lambda model: None)
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: found)
    return found


def test_standard_input(session: Heard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with standard_input(pipe(PCM)):
        options = ["--language", "en", "--beam_size", "2", "--policy", "align-att"]
        assert status(["live", "-", "-o", tmp_path, *options]) == 0
    assert session.policy is AlignAtt
    assert np.array_equal(session.samples, load_audio(CLIP))
    assert session.options["beam_size"] == 2 and session.options["language"] == "en"
    assert capsys.readouterr().out == "Word.\n" * len(session.fed), "settled lines and nothing else"
    assert sorted(os.listdir(tmp_path)) == sorted(f"stdin.{ending}" for ending in FORMATS)
    assert (tmp_path / "stdin.txt").read_text() == "Hello there.\n"


def test_a_model_of_english_alone(session: Heard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session.is_multilingual = False
    with standard_input(pipe(PCM)):
        assert status(["live", "-", "-o", tmp_path, "--language", "de", "--task", "translate"]) == 0
    assert (session.options["language"], session.options["task"]) == ("en", "transcribe")
    assert capsys.readouterr().err.count("the model knows English only") == 2


def test_another_rate_and_half_a_sample(session: Heard, tmp_path: Path) -> None:
    tone = (9000 * np.sin(np.arange(48000) * 2 * np.pi * 440 / 48000)).astype("<i2").tobytes()
    with standard_input(pipe(tone + b"x")):
        assert status(["live", "-", "--rate", "48000", "-o", tmp_path]) == 0
    assert SAMPLE_RATE - 100 < len(session.samples) <= SAMPLE_RATE
    of_20_ms = np.abs(np.fft.rfft(session.samples[8000:8320]))
    assert of_20_ms.argmax() == round(440 * 0.02)


def test_the_command_on_the_trained_fixture(
    model: Whisper, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: model)
    words = ["--word_timestamps", "True", "--max_words_per_line", "2"]
    with standard_input(pipe(PCM)):
        assert status(["live", "-", "-o", tmp_path / "live", *words]) == 0
    assert capsys.readouterr().out.startswith("Where is the young doctor")
    assert status(["transcribe", CLIP, "-o", tmp_path / "all", *words]) == 0
    for ending in FORMATS:
        offline = tmp_path / "all" / f"{CLIP.stem}.{ending}"
        assert (tmp_path / "live" / f"stdin.{ending}").read_text() == offline.read_text()


def test_nothing_came(session: Heard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with standard_input(pipe(b"")):
        assert status(["live", "-", "-o", tmp_path]) == 1
    assert_one_line(capsys, "nothing came to listen to")
    assert not os.listdir(tmp_path)


def encoded(form: str, codec: str, **options: Any) -> bytes:
    """Returns a second of noise as a file of a form."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=16000, layout="mono")
        noise = (np.random.default_rng(0).standard_normal((1, 16000)) / 8).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return file.getvalue()


CLIPS = ["english-1.wav", "english-2.flac", "english-3.mp3", "english-4.ogg"]
FILES = {clip: partial(Path.read_bytes, CLIP.parent / clip) for clip in CLIPS} | {
    "mp3 without tags": partial(encoded, "mp3", "mp3", id3v2_version="0", write_xing="0"),
    "aac": partial(encoded, "adts", "aac"),
    "m4a": partial(encoded, "ipod", "aac"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_kind_is_no_samples(
    file: str, session: Heard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with standard_input(pipe(FILES[file]())):
        assert status(["live", "-", "-o", tmp_path]) == 1
    assert_one_line(capsys, "-: begins as a file of audio does: expected samples alone, as `ffmpeg -i FILE -f s16le")
    assert not session.fed and not os.listdir(tmp_path)


@pytest.mark.parametrize("first", [-1, -1025, -3585, -3841])
def test_samples_that_begin_as_a_frame_of_a_file_are_samples(first: int) -> None:
    for loudness in (0, 2, 3000):
        samples = np.rint(loudness * np.random.default_rng(loudness).standard_normal(1600)).astype("<i2")
        samples[0] = first
        assert not is_of_a_file(samples.tobytes())
    assert not is_of_a_file(np.full(1600, first, "<i2").tobytes())


@pytest.mark.parametrize("rate", [2**31 - 1, 2**31, 10**12])
def test_a_rate_that_no_audio_has(
    rate: int, session: Heard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with standard_input(pipe(PCM)):
        assert status(["live", "-", "-o", tmp_path, "--rate", rate]) == 1
    assert_one_line(capsys, f"rate is {rate}, expected")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["live", "talk.wav"], "invalid choice: 'talk.wav'"),
        (["live", "--rate", "0"], "must be a whole number above 0"),
        (["live", "--policy", "guess"], "invalid choice: 'guess'"),
        (["live", "--beam_size", "0"], "argument --beam_size: must be from 1 to 1000, not 0"),
        (["live", "--highlight_words", "True"], "requires --word_timestamps True"),
        (["live", "-", "--clip_timestamps", "0,3"], "unrecognized arguments: --clip_timestamps 0,3"),
    ],
)
def test_unusable_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(arguments) == 2
    assert_one_line(capsys, message)


# ---- the microphone ------------------------------------------------------------------------------------------------


class Microphone:
    """What sounddevice has for one: gives a clip, and then somebody presses Ctrl-C."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lost: str = "", error: str = ""):
        self.lost, self.error = lost, error
        module = ModuleType("sounddevice")
        module.PortAudioError, module.RawInputStream = self.PortAudioError, self  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sounddevice", module)

    def __call__(self, rate: int, size: int, channels: int, dtype: str, callback: Any) -> "Microphone":
        if self.error:
            raise self.PortAudioError(self.error)
        assert (size, channels, dtype) == (rate // 10, 1, "int16")
        self.rate = rate
        for at in range(0, len(PCM), 2 * size):
            callback(memoryview(PCM[at : at + 2 * size]), size, None, self.lost if not at else "")
        return self

    def __enter__(self) -> None:
        self.at_once = True

    def __exit__(self, *_: object) -> None:
        pass


def test_the_microphone_until_ctrl_c(
    session: Heard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Microphone(monkeypatch, lost="input overflow")
    feed = session.feed

    def feed_and_interrupt(samples: np.ndarray) -> None:
        feed(samples)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(session, "feed", feed_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert status(["live", "-o", tmp_path, "-f", "txt"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert np.array_equal(session.samples, load_audio(CLIP)), "what was said before Ctrl-C is not lost"
    [name] = os.listdir(tmp_path)
    assert name.startswith("microphone-20") and name.endswith(".txt"), "no transcript replaces an earlier one"
    assert "warning: the microphone lost samples: input overflow" in capsys.readouterr().err


def test_a_microphone_of_another_rate(session: Heard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    microphone = Microphone(monkeypatch)

    def feed(samples: np.ndarray) -> None:
        if not session.fed:
            signal.raise_signal(signal.SIGINT)
        Heard.feed(session, samples)

    monkeypatch.setattr(session, "feed", feed)
    assert status(["live", "-o", tmp_path, "-f", "txt", "--rate", "48000"]) == 0
    assert microphone.rate == 48000 and len(session.samples) == len(PCM) // 2 // 3


def test_no_microphone(session: Heard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Microphone(monkeypatch, error="Error querying device -1")
    assert status(["live"]) == 1
    assert_one_line(capsys, "the microphone cannot be opened: Error querying device -1")


def test_no_sounddevice(session: Heard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert status(["live"]) == 1
    assert_one_line(capsys, "the microphone needs sounddevice: pip install 'maxwhisper[live]'")


# ---- a machine too slow --------------------------------------------------------------------------------------------


class Clock:
    """Seconds, and audio that comes by them."""

    def __init__(self, seconds: float, factor: float):
        """Takes the seconds that a session takes for a piece of any length."""
        self.now, self.factor, self.came, self.total = 0.0, factor, 0, int(seconds * SAMPLE_RATE)
        self.ended = False

    def __call__(self) -> float:
        return self.now

    def take(self) -> np.ndarray:
        self.now += 0.1
        until = min(self.total, int(self.now * SAMPLE_RATE))
        samples = np.full(until - self.came, self.came, np.float32)
        self.came, self.ended = until, until == self.total
        return samples


@pytest.mark.parametrize(("factor", "n_skipped"), [(0.3, 0), (15, 0), (50, 6)])
def test_lag_is_bounded_and_nothing_is_lost(
    factor: float, n_skipped: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Pieces of half a minute are decoded in as much or less time, or never in time."""
    clock, session = Clock(300, factor), Heard()
    late = []

    def feed(samples: np.ndarray) -> None:
        Heard.feed(session, samples)
        clock.now += factor
        late.append(clock.now - session.seconds)

    session.feed = feed  # type: ignore[method-assign]
    listen(session, clock, Lines().show, clock)  # type: ignore[arg-type]
    assert session.seconds == 300
    assert len(session.skipped) == n_skipped == caplog.text.count("this machine is too slow")
    assert max(late) < 30 + 2 * factor
    if n_skipped:
        assert "the text from 0 to 30 s is only in the transcript" in caplog.text
        assert all(len(piece) == 20 * SAMPLE_RATE for piece in session.fed[1:]), "and some of it is shown"


def test_a_file_is_not_late(caplog: pytest.LogCaptureFixture) -> None:
    """Five minutes that are there at once."""
    clock, session = Clock(300, 1), Heard()
    clock.now = 400.0
    listen(session, clock, Lines().show, clock)  # type: ignore[arg-type]
    assert not session.skipped and session.seconds == 300
    assert max(map(len, session.fed)) <= 20 * SAMPLE_RATE


def test_who_pauses_is_not_late(caplog: pytest.LogCaptureFixture) -> None:
    """Not by more than what there is to hear."""
    clock, session, rest = Clock(50, 0), Heard(), [1, 2]

    def take() -> np.ndarray:
        clock.now += 100
        clock.ended = rest.pop() == 1
        return np.zeros(25 * SAMPLE_RATE, np.float32)

    clock.take = take  # type: ignore[method-assign]
    listen(session, clock, Lines().show, clock)  # type: ignore[arg-type]
    assert not session.skipped and session.seconds == 50 and not caplog.text


def test_a_source_gives_what_reading_raised() -> None:
    blocks: Any = SimpleQueue()
    blocks.put(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        Source(blocks, SAMPLE_RATE).take()


def test_another_rate_gives_as_many_seconds_and_its_end() -> None:
    blocks: Any = SimpleQueue()
    source = Source(blocks, 8000)
    taken = []
    for pcm in (bytes(2 * 4000), bytes(2 * 4000), None):
        blocks.put(pcm)
        taken.append(source.take())
        assert source.ended == (pcm is None)
    assert sum(map(len, taken)) == SAMPLE_RATE and len(taken[-1]), "what the resampler holds back is not lost"


def test_what_comes_behind_the_end_does_not_undo_it() -> None:
    """As of a microphone that is stopped while it hears."""
    blocks: Any = SimpleQueue()
    for block in (bytes(4), None, bytes(6)):
        blocks.put(block)
    source = Source(blocks, SAMPLE_RATE)
    assert len(source.take()) == 5 and source.ended
