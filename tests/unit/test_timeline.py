"""Audio that starts late in its file, or has gaps: samples are openai-whisper's, and a warning says what is lost."""

import itertools
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from maxwhisper.audio import NOTICEABLE, SAMPLE_RATE, Timeline, load_audio

from .command import StubModel, status
from .test_audio import LOSSLESS, LOSSY, noise, tone, write

Shift = tuple[float, float]
"""From a time on, in seconds, how much later than it was."""


def video(path: Path, audio: Path, *shifts: Shift) -> Path:
    """Writes a video of 30 s with that audio from its start on, but for the packets that are moved."""
    with av.open(audio) as source, av.open(path, "w") as container:
        begin = max(0, source.start_time or 0) / av.time_base
        sound = container.add_stream_from_template(source.streams.audio[0])
        picture = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=1)
        picture.width, picture.height, picture.pix_fmt = 16, 16, "yuv420p"
        for _ in range(30):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
        container.mux(picture.encode(None))
        for packet in source.demux(audio=0):
            if packet.pts is None or packet.dts is None or packet.time_base is None:
                continue
            later = sum(by for start, by in shifts if packet.pts * packet.time_base >= start)
            move = round((later - begin) / packet.time_base)
            packet.stream, packet.pts, packet.dts = sound, packet.pts + move, packet.dts + move
            container.mux(packet)
    return path


@pytest.mark.parametrize("rates", [(8000, 16000), (16000, 8000)])
def test_of_several_streams_the_one_that_libav_ranks_best(tmp_path: Path, rates: tuple[int, int]) -> None:
    """Of the higher bit rate, as of a film and its audio description, wherever it stands."""
    with av.open(tmp_path / "a.mkv", "w") as container:
        for stream in [container.add_stream("pcm_s16le", rate=rate, layout="mono") for rate in rates]:
            said = np.full((1, stream.rate), stream.rate, np.int16)
            frame = av.AudioFrame.from_ndarray(said, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = stream.rate, 0, Fraction(1, stream.rate)
            container.mux([*stream.encode(frame), *stream.encode(None)])
    assert (load_audio(tmp_path / "a.mkv") * 32768 == 16000).all()


LATE: dict[str, tuple[list[Shift], str]] = {
    "late": ([(-1, 5)], "starts {5} s after the file does, which"),
    "gap": ([(1, 10)], "has gaps of 10.00 s in all, which"),
    "gaps": ([(0.5, 3), (1, 2)], "has gaps of 5.00 s in all, which"),
    "both": ([(-1, 3), (1, 2)], "starts {3} s after the file does and has gaps of 2.00 s in all, which"),
}


@pytest.mark.parametrize(("ending", "codec", "rate"), [("mkv", "aac", 16000), ("mp4", "aac", 16000)])
@pytest.mark.parametrize("case", LATE)
def test_what_no_samples_fill_is_announced(tmp_path: Path, case: str, ending: str, codec: str, rate: int) -> None:
    audio = write(tmp_path / "a.m4a", tone(2, rate), codec, "fltp", rate=rate)
    shifts, expected = LATE[case]
    primed = 1024 / rate  # samples that the encoder puts before the first
    for seconds in (3, 5):
        expected = expected.replace(f"{{{seconds}}}", f"{seconds - primed:.2f}")
    path = video(tmp_path / f"a.{ending}", audio, *shifts)
    with pytest.warns(RuntimeWarning) as caught:
        samples = load_audio(path)
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(f"{path}: its audio {expected}") and "aresample=async=1:first_pts=0" in text
    assert "\n" not in text and warning.filename == __file__
    assert -3 * 1024 <= len(samples) - 2 * SAMPLE_RATE <= 3 * 1024  # nothing is put in


@pytest.mark.parametrize("ending", ["webm", "ts"])
def test_opus_that_starts_late(tmp_path: Path, ending: str) -> None:
    audio = write(tmp_path / "a.opus", tone(2, 48000), "libopus", "flt", rate=48000)
    with pytest.warns(RuntimeWarning, match=r"starts (4.99|5.00) s after the file does"):
        load_audio(video(tmp_path / f"a.{ending}", audio, (-1, 5)))


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
@pytest.mark.parametrize(("ending", "codec", "sample_format"), LOSSLESS + LOSSY)
def test_ordinary_files_are_taken_as_they_are(
    tmp_path: Path, ending: str, codec: str, sample_format: str, rate: int
) -> None:
    """Whatever encoders put before the first sample."""
    path = write(tmp_path / f"a.{ending}", tone(1, rate), codec, sample_format, rate=rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(path)


@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize(
    ("source", "codec", "ending"),
    [("m4a", "aac", "mp4"), ("m4a", "aac", "mkv"), ("m4a", "aac", "mov"), ("mp3", "libmp3lame", "avi")]
    + [("mp3", "libmp3lame", "mkv"), ("opus", "libopus", "webm"), ("opus", "libopus", "ts")],
)
def test_ordinary_videos_are_taken_as_they_are(tmp_path: Path, source: str, codec: str, ending: str, rate: int) -> None:
    rate = 48000 if (codec, rate) == ("libopus", 44100) else rate
    audio = write(tmp_path / f"a.{source}", tone(1, rate), codec, "flt" if codec == "libopus" else "fltp", rate=rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(video(tmp_path / f"video.{ending}", audio))


def test_recordings_in_one_file_are_taken_as_they_are(tmp_path: Path) -> None:
    """Where the sample rate changes, libav guesses times by the first one."""
    parts = [write(tmp_path / f"{rate}.aac", tone(1, rate), "aac", "fltp", rate=rate) for rate in (16000, 44100, 8000)]
    path = tmp_path / "all.aac"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(path)


def test_the_command_says_it_once_and_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: StubModel())
    path = video(tmp_path / "late.mkv", write(tmp_path / "a.m4a", noise(), "aac", "fltp"), (-1, 5))
    assert status(["transcribe", path, "-o", tmp_path]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"maxwhisper: warning: {path}: its audio starts 4.94 s") and error.count("\n") == 1


# ---- times ---------------------------------------------------------------------------------------------------------


def unfilled(times: list[float | None], start: int | None = 0, duration: int | None = None) -> str | None:
    """Returns what is said of frames of a second that have these times."""
    timeline = Timeline(start, duration)
    for time in times:
        timeline.add(SimpleNamespace(time=time, samples=8000, sample_rate=8000))  # type: ignore[arg-type]
    return timeline.unfilled


def test_times_that_are_rounded_are_no_gaps() -> None:
    """Those of Matroska are milliseconds: what is lost by that adds up to more than is noticeable, what is won too."""
    timeline, frames = Timeline(0, None), 20_000
    for frame in range(frames):
        exact = Fraction(1024 * frame, 44100)
        time = round(exact, 3)
        timeline.add(SimpleNamespace(time=float(time), samples=1024, sample_rate=44100))  # type: ignore[arg-type]
    assert timeline.unfilled is None


@pytest.mark.parametrize(
    ("times", "start", "duration"),
    [
        ([None, None, None], 0, None),
        ([], 0, None),
        ([7.0, 8.0, 9.0], 7_000_000, 3_000_000),
        ([7.0, 8.0, 9.0], None, None),
        ([-0.03, 0.97, 1.97], 0, None),
        ([95443.7, 1.0, 2.0], 0, 3_000_000),  # the first is one before the start, of a format whose times wrap around
        ([0.0, 1.0, 0.0, 1.0], 0, None),  # two recordings in one
        ([NOTICEABLE, 1 + NOTICEABLE], 0, None),
    ],
)
def test_times_that_say_nothing(times: list[float | None], start: int | None, duration: int | None) -> None:
    assert unfilled(times, start, duration) is None


def test_times_that_are_missing_for_a_while() -> None:
    assert unfilled([0.0, None, None, 8.0]) == "has gaps of 5.00 s in all"
    assert unfilled([None, 6.0, 7.0]) == "starts 5.00 s after the file does"
    assert unfilled([10.0, 11.0, 13.0], 10_000_000, 0) == "has gaps of 1.00 s in all"
    assert unfilled([0.0, 3.0, 2.5]) == "has gaps of 2.00 s in all", "the most of them"


def test_small_gaps_add_up() -> None:
    times = list(itertools.accumulate([1 + NOTICEABLE / 2] * 10, initial=0.0))
    assert unfilled(list(times)) == f"has gaps of {5 * NOTICEABLE:.2f} s in all"
