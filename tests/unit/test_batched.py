"""Audio cut at silences, and its pieces transcribed as a batch."""

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from whisper.audio import FRAMES_PER_SECOND, N_SAMPLES, SAMPLE_RATE

from maxwhisper import batched
from maxwhisper.audio import load_audio
from maxwhisper.batched import LONGEST, MARGIN, SHORTEST_SILENCE, language_of, pieces, transcribe_batched
from maxwhisper.errors import OptionError
from maxwhisper.speech import CHUNK, SILENCE, SPEECH, probabilities
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES

pytestmark = pytest.mark.usefixtures("encodes_once")

LONG = FIXTURES / "clips" / "english-long.mp3"
SENTENCES = next(
    clip for clip in json.loads((FIXTURES / "clips.json").read_text())["clips"] if clip["file"].endswith(LONG.name)
)["segments"]


WINDOW = N_SAMPLES // CHUNK


@example(np.pad(np.ones(WINDOW - 1), MARGIN), 1)  # with margins it would be longer than a window
@example(np.insert(np.ones(WINDOW + 1), WINDOW // 2, np.zeros(SHORTEST_SILENCE + 2)), 1)  # which no two share evenly
@given(
    arrays.arrays(np.float64, st.integers(0, 40), elements=st.sampled_from([0.0, 0.4, 0.6, 1.0])),
    st.integers(1, 200),
)
def test_pieces_hold_all_speech_and_fit_a_window(coarse: np.ndarray, times: int) -> None:
    found = np.repeat(coarse, times)
    spans = pieces(found)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges) and all(0 <= edge <= len(found) for edge in edges)
    assert all(0 < end - start <= WINDOW for start, end in spans)
    inside = np.zeros(len(found), bool)
    for start, end in spans:
        inside[start:end] = True
    assert inside[found >= SPEECH].all()


def test_pieces_are_cut_where_it_is_silent() -> None:
    found = np.zeros(3 * LONGEST)
    for start in (100, 700, 1400):
        found[start : start + 500] = 1
    assert pieces(found) == [(start - MARGIN, start + 500 + MARGIN) for start in (100, 700, 1400)]
    found[150:160] = SILENCE - 0.1
    assert len(pieces(found)) == 3


def test_a_piece_holds_as_much_as_fits_a_window() -> None:
    """With its margins 30 s, and no chunk more."""
    assert LONGEST == WINDOW - 2 * MARGIN
    for n_speech, cut in ((LONGEST, 1), (LONGEST + 1, 2)):
        whole = np.pad(np.ones(n_speech), 2 * MARGIN)
        assert len(pieces(whole)) == cut
        whole[100 : 100 + 2 * SHORTEST_SILENCE] = 0
        assert len(pieces(whole)) == cut


def test_a_piece_that_fails_is_the_error_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def transcribe_many(self, cut: Any, batch_size: int, **options: Any) -> Any:
            yield 0, OptionError("no luck")

    model: Any = Model()
    monkeypatch.setattr(batched, "probabilities", lambda audio: np.ones(len(audio) // CHUNK))
    with pytest.raises(OptionError, match="no luck"):
        transcribe_batched(model, np.zeros(SAMPLE_RATE, np.float32), language="en")


def test_speech_without_a_silence_is_cut_where_it_is_least_likely_speech() -> None:
    found = np.ones(LONGEST + 100)
    found[700] = SPEECH
    assert pieces(found) == [(0, 700), (700, len(found))]


def test_the_detector_hears_the_sentences() -> None:
    found = probabilities(load_audio(LONG))
    middles = [int((sentence["start"] + sentence["end"]) / 2 * SAMPLE_RATE) // CHUNK for sentence in SENTENCES]
    spans = pieces(found)
    assert len(spans) > 1
    assert all(any(start <= middle < end for start, end in spans) for middle in middles)


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """Returns what is cut into two pieces."""
    return load_audio(LONG)[: 36 * SAMPLE_RATE]


@pytest.fixture(scope="module")
def spans(audio: np.ndarray) -> list[tuple[int, int]]:
    return pieces(probabilities(audio))


@pytest.fixture(scope="module")
def expected(model: Whisper, audio: np.ndarray, spans: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Returns what is said in each piece of the recording."""
    options = {"language": "en", "word_timestamps": True}
    return [model.transcribe(audio[a * CHUNK : b * CHUNK], **options) for a, b in spans]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pieces_are_transcribed_as_recordings_of_their_own(
    model: Whisper,
    audio: np.ndarray,
    spans: list[tuple[int, int]],
    batch_size: int,
    expected: list[dict[str, Any]],
) -> None:
    done: list[float] = []
    result = transcribe_batched(model, audio, batch_size, progress=done.append, word_timestamps=True)
    assert result["language"] == "en" and len(spans) == 2
    assert result["text"] == "".join(each["text"] for each in expected)
    starts = [start * CHUNK / SAMPLE_RATE for start, _ in spans]
    moved = [(by, segment) for by, each in zip(starts, expected, strict=True) for segment in each["segments"]]
    for number, (found, (by, alone)) in enumerate(zip(result["segments"], moved, strict=True)):
        words = [{**word, **{edge: word[edge] + by for edge in ("start", "end")}} for word in alone["words"]]
        times = {"start": alone["start"] + by, "end": alone["end"] + by, "seek": alone["seek"] + round(100 * by)}
        assert found == alone | times | {"id": number, "words": words}
    words = [word for segment in result["segments"] for word in segment["words"]]
    assert words[-1]["end"] > 34 and all(word["start"] <= word["end"] for word in words)
    not_told = len(audio) / SAMPLE_RATE - sum(done)  # less than a frame of each piece
    assert 0 <= round(not_told, 6) < len(spans) / FRAMES_PER_SECOND


def test_the_language_is_found_in_what_transcribe_finds_it_in(model: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[torch.Tensor] = []

    def detect_language(_: Whisper, mel: torch.Tensor) -> tuple[None, dict[str, float]]:
        heard.append(mel)
        return None, {"de": 0.4, "en": 0.6}

    monkeypatch.setattr(type(model), "detect_language", detect_language)
    audio = load_audio(LONG)[: 2 * SAMPLE_RATE]
    assert language_of(model, audio) == model.transcribe(audio, sample_len=1, temperature=0.0)["language"] == "en"
    assert heard[0].equal(heard[1])


def test_silence_has_no_text_and_no_language(model: Whisper) -> None:
    result = transcribe_batched(model, np.zeros(SAMPLE_RATE, np.float32))
    assert result == {"text": "", "segments": [], "language": None}


def test_clips_cannot_be_chosen(model: Whisper) -> None:
    with pytest.raises(OptionError, match="clip_timestamps"):
        transcribe_batched(model, np.zeros(SAMPLE_RATE, np.float32), clip_timestamps="1,2")


@pytest.mark.parametrize("package", ["silero_vad", "onnxruntime"])
def test_a_detector_that_is_not_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=r"maxwhisper\[batched\]"):
        batched.probabilities(np.zeros(CHUNK, np.float32))


def test_the_detector_leaves_pytorch_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.partition(".")[0] == "silero_vad"]:
        monkeypatch.delitem(sys.modules, name)  # it takes them when it is imported
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        probabilities(np.zeros(CHUNK, np.float32))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
