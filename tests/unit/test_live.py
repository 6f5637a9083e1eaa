"""A live session on the trained fixture: what is settled stays, and the last text is that of `transcribe`."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from maxwhisper.audio import SAMPLE_RATE, load_audio
from maxwhisper.errors import AudioError, OptionError
from maxwhisper.live import POLICIES, Session, Word
from maxwhisper.live.hypotheses import Hypothesis, hypothesis
from maxwhisper.live.policies import SURE, UNSURE
from maxwhisper.live.session import MOST, STEP
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES

pytestmark = pytest.mark.usefixtures("encodes_once")

SECOND = SAMPLE_RATE
SPEECH = load_audio(FIXTURES / "clips" / "english-2.flac")
LONG = load_audio(FIXTURES / "clips" / "english-long.mp3")[: 33 * SAMPLE_RATE]
SHORT = load_audio(FIXTURES / "clips" / "english-1.wav")


def noise(seconds: float, loudness: float) -> np.ndarray:
    return (loudness * np.random.default_rng(0).standard_normal(int(seconds * SECOND))).astype(np.float32)


class Decodings:
    """How often a session's model encodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Whisper):
        self.number = 0
        forward = model.encoder.forward

        def counted(mel: Any) -> Any:
            self.number += 1
            return forward(mel)

        monkeypatch.setattr(model.encoder, "forward", counted)


def fed(session: Session, samples: np.ndarray, size: int = STEP) -> list[tuple[str, str]]:
    """Feeds in pieces, and returns what was shown after each."""
    shown = []
    for at in range(0, len(samples), size):
        session.feed(samples[at : at + size])
        shown.append((session.settled, session.tentative))
    return shown


def without_gaps(shown: list[tuple[str, str]]) -> None:
    for (before, _), (after, _) in zip(shown, shown[1:], strict=False):
        assert after.startswith(before)


def test_settled_text_stays_and_the_last_text_is_that_of_transcribe(model: Whisper) -> None:
    session = Session(model, language="en", word_timestamps=True)
    shown = fed(session, SPEECH)
    without_gaps(shown)
    assert 3 < len(shown[len(shown) // 2][0].split()) < 12, "text comes while it is said"
    assert any(tentative for _, tentative in shown)
    settled = session.settled
    assert session.finish() == model.transcribe(SPEECH, language="en", word_timestamps=True)
    assert session.settled.startswith(settled) and not session.tentative
    assert (
        session.settled
        == " Thomas remembered seven yellow elephants on Monday. Where is the purple bridge that Maria wanted?"
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(model: Whisper, policy: str) -> None:
    session = Session(model, POLICIES[policy], language="en")
    shown = fed(session, np.concatenate([SHORT, np.zeros(2 * SECOND, np.float32)]))
    without_gaps(shown)
    assert session.settled.startswith(" Where is the young doctor that Hector ") and session.settled.endswith("?")
    assert shown[2][0] != session.settled and shown[-3][0] == session.settled


def test_nothing_is_made_up_behind_what_is_settled(model: Whisper) -> None:
    said = [word.text for word in hypothesis(model, torch.from_numpy(SHORT), [], [], language="en").words]
    assert len(said) == 9
    for settled, left in ((said, []), (said[:5], said[5:]), ([" Who", *said[1:4]], said[4:])):
        found = hypothesis(model, torch.from_numpy(SHORT), [], settled, language="en").words
        assert [word.text for word in found] == left


def test_frames_are_where_words_are_said(model: Whisper) -> None:
    """By the times that openai-whisper's search finds."""
    [segment] = model.transcribe(SHORT, language="en", word_timestamps=True)["segments"]
    words = hypothesis(model, torch.from_numpy(SHORT), [], [], language="en").words
    pairs = list(zip(segment["words"], words, strict=False))  # the last one of which is a question mark
    inside = [timed["start"] - 0.1 <= word.frame / 50 <= timed["end"] + 0.1 for timed, word in pairs]
    assert len(pairs) == 8 and sum(inside) >= 6


def test_what_is_cut_is_unlikely(model: Whisper) -> None:
    """The last word of 1.9 s is another one than that of the whole clip, and the decoder is less sure of it."""
    cut, whole = (
        hypothesis(model, torch.from_numpy(samples), [], [], language="en").words for samples in (SHORT[:30000], SHORT)
    )
    assert [word.text for word in cut[:7]] == [word.text for word in whole[:7]] and cut[7].text != whole[7].text
    logprobs = sorted(word.logprob for word in whole)
    assert cut[7].logprob < UNSURE < logprobs[0] and SURE < logprobs[len(logprobs) // 2] < 0


def test_a_long_recording_leaves_the_window(model: Whisper) -> None:
    """Its 33 s are more than a window has room for; steps are as long as those of a slow machine."""
    session = Session(model, language="en")
    without_gaps(fed(session, LONG, 4 * SECOND))
    assert len(session.window.samples) < 20 * SECOND and session.window.start > 15 * SECOND
    assert session.settled.count(".") > 6


def test_all_at_once(model: Whisper) -> None:
    session = Session(model)
    session.feed(LONG)
    assert session.language == "en" and session.settled.count(".") > 5


def test_a_minute_of_silence(model: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    decodings = Decodings(monkeypatch, model)
    for silence in (np.zeros(60 * SECOND, np.float32), noise(60, 0.0003), noise(60, 0.01)):
        session = Session(model)
        start = time.process_time()
        fed(session, silence, SECOND // 10)
        assert time.process_time() - start < 3
        assert not session.settled and not session.tentative
        assert len(session.window.samples) <= SECOND
    assert decodings.number <= 6


def test_a_pause_of_40_seconds(model: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(model, language="en")
    fed(session, SHORT, SECOND)
    decodings = Decodings(monkeypatch, model)
    fed(session, np.zeros(40 * SECOND, np.float32))
    before = session.settled
    assert decodings.number <= 4 and before.endswith((".", "?")) and not session.tentative
    fed(session, SHORT, SECOND)
    assert session.settled.startswith(before) and " Where is the young" in session.settled[len(before) :]


def test_noise_and_music(model: Whisper) -> None:
    times = np.arange(5 * SECOND) / SECOND
    chords = sum(np.sin(2 * np.pi * tone * times) for tone in (220, 277, 330)) * (0.1 + 0.05 * np.sin(4 * times))
    swelling = noise(5, 0.1) * (1 + np.sin(3 * times)).astype(np.float32)
    for sound, most in ((swelling, 0), (chords.astype(np.float32), 4)):  # for chords `transcribe` makes up some too
        session = Session(model)
        fed(session, sound, SECOND)
        session.skip(np.zeros(0, np.float32))  # settles what is tentative
        assert len(session.settled.split()) <= most


def test_two_sessions_at_once(model: Whisper) -> None:
    german = load_audio(FIXTURES / "clips" / "german-1.wav")

    def text(speech: np.ndarray) -> str:
        session = Session(model)
        fed(session, speech, 3 * SECOND // 2)
        session.feed(np.zeros(2 * SECOND, np.float32))
        return session.settled

    alone = [text(speech) for speech in (SHORT, german)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(text, (SHORT, german))) == alone
    assert len(set(alone)) == 2 and all(alone)


def test_a_session_that_is_silent_beside_one_that_speaks(model: Whisper) -> None:
    speaking, silent = Session(model), Session(model)
    for at in range(0, 2 * SECOND, SECOND):
        speaking.feed(SPEECH[at : at + SECOND])
        silent.feed(np.zeros(SECOND, np.float32))
    assert speaking.loudness.loud_until > silent.loudness.loud_until == 0
    assert speaking.tentative and (silent.settled, silent.tentative) == ("", "")


def test_pieces_of_any_size(model: Whisper) -> None:
    whole, odd = Session(model, language="en"), Session(model, language="en")
    speech = SPEECH[: 2 * SECOND]
    fed(whole, speech)
    at = 0
    for size in (0, *[1] * 300, 7, 0, 6092, 1, *[3200] * 6, 1, 6399):
        odd.feed(speech[at : at + size])
        at += size
    assert at == 32000 and (odd.settled, odd.tentative) == (whole.settled, whole.tentative) != ("", "")


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (np.zeros(9, np.int16), OptionError, "divide it by 32768"),
        (np.zeros((2, 9), np.float32), OptionError, "mean of its channels"),
        ("talk.wav", OptionError, "audio is 'talk.wav', expected floats (samples,)"),
        (np.array([0, np.nan], np.float32), AudioError, "sample 5 (0.000 s) is not finite"),
        (np.array([np.inf], np.float32), AudioError, "sample 4 (0.000 s) is not finite"),
    ],
)
def test_what_is_no_audio(model: Whisper, samples: Any, error: type[Exception], message: str) -> None:
    session = Session(model)
    session.feed(np.zeros(4))
    with pytest.raises(error) as raised:
        session.feed(samples)
    assert message in str(raised.value)
    assert session.seconds == 4 / SECOND, "nothing of it is taken"


def test_after_the_end(model: Whisper) -> None:
    session = Session(model)
    result = session.finish()
    assert result["text"] == "" and session.finish() is result
    for take in (session.feed, session.skip):
        with pytest.raises(OptionError, match="the session is finished"):
            take(np.zeros(1))


def test_options_are_those_of_transcribe(model: Whisper) -> None:
    with pytest.raises(OptionError, match="clip_timestamps cannot be used live"):
        Session(model, clip_timestamps="0,3")
    with pytest.raises(OptionError, match="language"):
        Session(model, language=3)
    with pytest.raises(TypeError):
        Session(model, no_such_option=1)


def test_what_is_skipped_is_in_the_transcript(model: Whisper) -> None:
    session = Session(model, language="en", temperature=0.0)
    half = len(SPEECH) // 2
    fed(session, SPEECH[:half], SECOND)
    session.skip(SPEECH[half:])
    settled = session.settled
    assert "Where" not in settled and settled and not session.tentative
    fed(session, np.zeros(2 * SECOND))
    assert session.settled == settled
    speech = np.concatenate([SPEECH, np.zeros(2 * SECOND, np.float32)])
    assert session.finish() == model.transcribe(speech, language="en", temperature=0.0)


@pytest.mark.parametrize("repeated", [True, False])
def test_ten_minutes_without_a_pause(model: Whisper, monkeypatch: pytest.MonkeyPatch, repeated: bool) -> None:
    """A word a second without the end of a sentence; or another one each time, on which no two hypotheses agree."""
    said, longest = 0, [0, 0]

    def words(_: Any, samples: torch.Tensor, prompt: list[int], settled: list[str], **options: Any) -> Hypothesis:
        nonlocal said
        said += 1
        longest[0], longest[1] = max(longest[0], len(samples)), max(longest[1], 3 * len(settled))
        n_frame = len(samples) // 320
        text = f" w{said}" if not repeated else f" w{(session.window.end - SECOND) // SECOND}"
        return Hypothesis([Word(text, (1, 2, 3), n_frame - 30, -0.05)] if n_frame > 60 else [], n_frame, "en")

    monkeypatch.setattr("maxwhisper.live.session.hypothesis", words)
    session = Session(model)
    loud = noise(0.5, 0.1) * np.repeat([0.1, 1.0], SECOND // 4).astype(np.float32)
    shown = fed(session, np.tile(loud, 1200), SECOND // 2)
    without_gaps(shown)
    assert said == 1200 and longest[0] <= 30 * SECOND and longest[1] <= MOST + 3
    assert len(session.window.words) <= MOST and len(session.loudness.frames) <= 500
    assert len(session.settled.split()) > (500 if repeated else 15), "what does not agree is settled when it must"
