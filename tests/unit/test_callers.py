"""Callers who come and go: each has what it has alone, in its turn, until it stops waiting."""

import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from whisper.audio import SAMPLE_RATE, pad_or_trim

from maxwhisper.audio import load_audio, read_upload
from maxwhisper.callers import Caller, Scheduler
from maxwhisper.decoding.batching import Stopped
from maxwhisper.errors import AudioError
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES

pytestmark = pytest.mark.usefixtures("encodes_once")

CLIPS = FIXTURES / "clips"


@pytest.fixture(scope="module")
def long() -> np.ndarray:
    """Returns a recording of two windows: two sentences in one, and one in the next."""
    audio = load_audio(CLIPS / "english-longer.ogg")
    return np.concatenate([pad_or_trim(audio[: 6 * SAMPLE_RATE]), audio[6 * SAMPLE_RATE : 9 * SAMPLE_RATE]])


@pytest.fixture(scope="module")
def short() -> np.ndarray:
    return load_audio(CLIPS / "english-1.wav")


@pytest.fixture
def scheduler(request: pytest.FixtureRequest, model: Whisper) -> Iterator[Scheduler]:
    """Yields one for two windows at once, or as many as a test says."""
    found = Scheduler(model, getattr(request, "param", 2))
    yield found
    found.close()


def test_each_has_what_it_has_alone(
    scheduler: Scheduler, model: Whisper, long: np.ndarray, short: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_text: list[int] = []
    advance = scheduler.stepper.inner.advance
    monkeypatch.setattr(
        scheduler.stepper.inner,
        "advance",
        lambda texts, *rest: (n_text.append(len(texts.tokens)), advance(texts, *rest))[1],
    )
    asked: list[tuple[np.ndarray, dict[str, Any]]] = [
        (long, {}),
        (short, {"word_timestamps": True}),
        (short, {"language": "de", "initial_prompt": "Anna"}),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda each: Caller(scheduler).transcribe(each[0], **each[1]), asked))
    assert max(n_text) == 2  # as many as may decode at once
    assert found == [model.transcribe(audio, **options) for audio, options in asked]


@pytest.mark.parametrize("scheduler", [1, 2], indirect=True)
def test_a_short_recording_is_done_before_a_long_one_that_came_first(
    scheduler: Scheduler, long: np.ndarray, short: np.ndarray
) -> None:
    begun, first = Event(), Caller(scheduler)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(first.transcribe, np.tile(long, 4), on_segments=lambda _: begun.set())
        assert begun.wait(30)
        assert Caller(scheduler).transcribe(short)["text"]
        assert not asked.done()
        first.stop()


def test_windows_drawn_at_random_hold_up_nobody(
    scheduler: Scheduler, short: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, go_on = Event(), Event()
    decode = Whisper.decode

    def slow(self: Whisper, mel: Any, options: Any) -> Any:
        if options.temperature:
            drawing.set()
            assert go_on.wait(30)
        return decode(self, mel, options)

    monkeypatch.setattr(Whisper, "decode", slow)
    with ThreadPoolExecutor(1) as pool:
        sampled = pool.submit(Caller(scheduler).transcribe, short, temperature=0.5)
        assert drawing.wait(30)
        assert Caller(scheduler).transcribe(short)["text"]
        go_on.set()
        assert sampled.result()["segments"]


def test_no_window_is_drawn_for_who_has_left(
    scheduler: Scheduler, short: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a thread takes the window before it can be cancelled."""
    sampled: list[float] = []
    decode, submit = Whisper.decode, scheduler.sampled.submit

    def leaving(self: Whisper, mel: Any, options: Any) -> Any:
        sampled.append(options.temperature)
        caller.stop()
        return decode(self, mel, options)

    monkeypatch.setattr(Whisper, "decode", leaving)
    monkeypatch.setattr(scheduler.sampled, "submit", lambda *work: (submit(*work), time.sleep(0.1))[0])
    caller = Caller(scheduler)
    with pytest.raises(Stopped):
        caller.transcribe(short, temperature=(0.2, 0.4), logprob_threshold=0.0)
    assert sampled == [0.2]


def test_who_stops_waiting_is_not_served(scheduler: Scheduler, long: np.ndarray, short: np.ndarray) -> None:
    begun = Event()
    first, waiting = Caller(scheduler), [Caller(scheduler) for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        minutes = np.tile(long, 4)  # so that none is done before it is stopped
        asked = [pool.submit(first.transcribe, minutes, on_segments=lambda _: begun.set())]
        asked += [pool.submit(each.transcribe, minutes) for each in waiting]
        assert begun.wait(30)
        for each in [*waiting, first]:
            each.stop()
        start = time.monotonic()
        assert all(isinstance(each.exception(), Stopped) for each in asked)
        assert time.monotonic() - start < 5
    assert scheduler.stepper.n_thread == 0
    assert Caller(scheduler).transcribe(short)["text"]


def test_segments_are_told_as_they_are_in_the_result(model: Whisper, long: np.ndarray) -> None:
    told: list[list[dict[str, Any]]] = []
    result = model.transcribe(long, on_segments=told.append)
    assert len(told) == 2
    assert [{"id": i, **each} for i, each in enumerate(sum(told, []))] == result["segments"]


# ---- uploads -------------------------------------------------------------------------------------------------------


def test_an_upload_is_the_file(short: np.ndarray) -> None:
    with (CLIPS / "english-1.wav").open("rb") as file:
        assert (read_upload(file, "file", 60, Event()) == short).all()


def test_an_upload_has_no_other_file_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file without a name, as uploads are, libav looks for others in the working directory."""
    monkeypatch.chdir(CLIPS)
    script = io.BytesIO(b"ffconcat version 1.0\nfile english-1.wav\n")
    with pytest.raises(AudioError, match="^file: cannot be read as audio"):
        read_upload(script, "file", 60, Event())


@pytest.mark.parametrize("rate", [1, 8000])
def test_an_upload_is_read_up_to_its_limit(rate: int, tmp_path: Path) -> None:
    wav = (CLIPS / "english-1.wav").read_bytes()
    upload = tmp_path / "upload"
    upload.write_bytes(wav[:24] + rate.to_bytes(4, "little") + wav[28:])
    with upload.open("rb") as file, pytest.raises(AudioError, match="file: has more than 5 s"):
        read_upload(file, "file", 5, Event())


def test_an_upload_that_nobody_waits_for_is_not_read() -> None:
    stopped = Event()
    stopped.set()
    with (CLIPS / "english-1.wav").open("rb") as file, pytest.raises(AudioError, match="nobody waits"):
        read_upload(file, "file", 60, stopped)
