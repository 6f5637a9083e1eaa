"""Which words are settled, where a recording is quiet, what a terminal shows and what is kept: without a model."""

from collections.abc import Sequence
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxwhisper.cli.live_command import POLICIES as NAMES
from maxwhisper.errors import AudioError
from maxwhisper.live import POLICIES, AlignAtt, HeardTwice, LocalAgreement, Word
from maxwhisper.live.hypotheses import following
from maxwhisper.live.loudness import FRAME, Loudness, quietest
from maxwhisper.live.policies import audible, in_audio
from maxwhisper.live.recording import Recording
from maxwhisper.live.screen import ANEW, DIM, PLAIN, Lines, Terminal, cells, end_of_line
from maxwhisper.live.session import Window

SECOND = 16000


def words(text: str, frames: Sequence[int] | None = None, probabilities: Sequence[float] | None = None) -> list[Word]:
    """Returns words heard in these frames, or 20 frames apart, with these probabilities, or not quite surely."""
    texts = text.split()
    found = frames or range(10, 10 + 20 * len(texts), 20)
    likely = probabilities or [0.93] * len(texts)
    return [Word(f" {each}", (0,), frame, log(p)) for each, frame, p in zip(texts, found, likely, strict=True)]


def test_names() -> None:
    assert tuple(POLICIES) == NAMES
    assert next(iter(POLICIES.values())) is HeardTwice


def test_local_agreement_is_of_two_in_a_row() -> None:
    policy = LocalAgreement()
    assert policy.settled(words("where is the"), 100) == 0
    assert policy.settled(words("where is that engine"), 100) == 2
    assert policy.settled(words("this engine"), 100) == 0, "of what stands behind the settled ones"
    assert policy.settled(words("this engine"), 100) == 2
    assert policy.settled([], 100) == 0
    assert [policy.settled(words(text), 100) for text in ("a b c", "a b d", "d e")] == [0, 2, 1]


def test_align_att_waits_for_audio_behind_a_word() -> None:
    assert AlignAtt().settled(words("where is the engine", [10, 30, 50, 70]), 85) == 3  # half a second is 25 frames
    assert AlignAtt().settled(words("where is", [10, 70]), 71) == 1
    assert AlignAtt().settled(words("where is", [46, 30]), 71) == 0


def test_words_that_attention_goes_back_for_are_made_up() -> None:
    assert in_audio(words("the ship works near the letter", [90, 100, 30, 35, 40, 45]), 150) == 2
    assert in_audio(words("the ship waits here", [90, 100, 30, 130]), 150) == 4, "one that is found out of order is not"
    assert in_audio(words("where is the", [100, 60, 20]), 150) == 2, "it is the latest one that counts"
    assert [in_audio(words("where is", [60, at]), 150) for at in (10, 9)] == [2, 1], "a second is not too far"


def test_heard_twice_waits_for_agreement_and_attention() -> None:
    both = words("where is", [10, 30])
    assert HeardTwice().settled(both, 100) == 0
    for second, n_frame, expected in (
        (both, 100, 2),
        (words("where was", [10, 30]), 100, 1),
        (words("where is", [10, 95]), 100, 1),  # at the very end of the audio
    ):
        policy = HeardTwice()
        policy.settled(both, 80)
        assert policy.settled(second, n_frame) == expected


def test_heard_twice_compares_what_stands_behind_the_settled_ones() -> None:
    policy = HeardTwice()
    assert policy.settled(words("where is the"), 100) == 0
    assert policy.settled(words("where is that"), 100) == 2
    assert policy.settled(words("that engine"), 100) == 1


def test_heard_twice_settles_what_is_sure_at_once() -> None:
    def settled(probabilities: Sequence[float], n_frame: int = 100) -> int:
        return HeardTwice().settled(words("where is the", [10, 30, 50], probabilities), n_frame)

    assert settled([0.98, 0.98, 0.98]) == 3
    assert settled([0.98, 0.93, 0.98]) == 1, "what stands behind an unsure one waits too"
    assert settled([0.98, 0.98, 0.98], 73) == 2, "the last one is 0.46 s from the end of the audio"


def test_what_was_sure_at_once_is_not_waited_for_again() -> None:
    policy = HeardTwice()
    assert policy.settled(words("a b c d", [10, 20, 30, 40], [0.99, 0.99, 0.93, 0.93]), 200) == 2
    assert policy.settled(words("c d", [30, 40]), 200) == 2


def test_heard_twice_waits_for_audio_behind_what_is_unsure() -> None:
    unsure = words("where is the engine", [10, 30, 50, 70], [0.6, 0.93, 0.6, 0.93])
    for n_frame, expected in ((70, 2), (89, 2), (90, 4), (60, 2), (30, 0)):
        policy = HeardTwice()
        policy.settled(unsure, 40)
        assert policy.settled(unsure, n_frame) == expected, n_frame


@pytest.mark.parametrize(
    ("settled", "words", "expected"),
    [
        ([], ["a"], 0),
        (["a", "b"], [], 0),
        (["a", "b"], ["a", "b", "c"], 2),
        (["a", "b"], ["a", "c"], 2),  # another word in the place of one that stays
        (["a", "b", "c"], ["a", "x", "b", "c", "d"], 4),
        (["a", "b", "c"], ["b", "c", "d"], 2),
        ([" The", "."], [" the", ".", " end"], 2),
    ],
)
def test_what_follows_settled_words(settled: list[str], words: list[str], expected: int) -> None:
    assert following(settled, words) == expected


def test_words_of_a_silence() -> None:
    assert audible(words("where is it", [10, 30, 50]), 40) == 2
    assert audible(words("it ? now", [10, 50, 60]), 40) == 2, "marks are found behind their word"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 99)), max_size=6), st.integers(1, 99))
def test_any_hypothesis(found: list[tuple[str, int]], n_frame: int) -> None:
    hypothesis = [Word(text, (0,), frame, -0.01 * frame) for text, frame in found]
    for make in POLICIES.values():
        policy = make()
        for _ in range(3):
            assert 0 <= policy.settled(hypothesis, n_frame) <= len(hypothesis)


# ---- loudness ------------------------------------------------------------------------------------------------------


def noise(seconds: float, loudness: float) -> np.ndarray:
    return (loudness * np.random.default_rng(1).standard_normal(int(seconds * SECOND))).astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, FRAME, 4801])
def test_the_end_of_what_is_loud(size: int) -> None:
    sound = np.concatenate([noise(0.2, 3e-4), noise(0.1, 0.1), noise(0.3, 3e-4)])
    loudness = Loudness()
    for at in range(0, len(sound), size):
        loudness.listen(sound[at : at + size])
    assert loudness.loud_until == 15 * FRAME


@pytest.mark.parametrize(("loudness", "end"), [(0.002, 15), (0.0005, 0)])
def test_speech_may_be_as_quiet_as_60_db_below_the_loudest(loudness: float, end: int) -> None:
    heard = Loudness()
    heard.listen(np.concatenate([noise(0.2, 1e-5), noise(0.1, loudness), noise(0.3, 1e-5)]))
    assert heard.loud_until == end * FRAME


def test_a_noisy_room_is_quiet() -> None:
    loudness = Loudness()
    loudness.listen(noise(20, 0.02))
    assert loudness.loud_until == 0
    loudness.listen(noise(0.5, 0.2))
    assert loudness.loud_until == 20.5 * SECOND


@pytest.mark.parametrize("start", [SECOND, SECOND + 99])
def test_the_quietest_moment(start: int) -> None:
    sound = np.concatenate([noise(0.5, 0.1), noise(0.5, 3e-4), noise(1.0, 0.1), noise(0.3, 1e-3), noise(0.7, 0.1)])
    assert quietest(sound, start, len(sound)) - 2.15 * SECOND in range(-SECOND // 10, SECOND // 10)
    assert 0.5 * SECOND < quietest(sound, -SECOND, 10 * SECOND) < SECOND
    assert quietest(sound, start, start + FRAME) == start, "no time to be quiet in"
    sound[start : start + 6 * FRAME] = 0
    assert quietest(sound, start - 9 * FRAME, len(sound)) == start + 3 * FRAME, "the middle of it"


# ---- windows -------------------------------------------------------------------------------------------------------


def test_sentences_leave_the_window() -> None:
    samples = noise(10, 0.1)
    samples[int(2.6 * SECOND) : 3 * SECOND] = 0
    window = Window(samples, start=100)
    window.words = [(word, 100 + SECOND * at) for at, word in enumerate(words("One. Two. three four"), 1)]
    window.shorten()
    assert [word.text for word, _ in window.words] == [" three", " four"]
    start = window.start - 100
    assert 2.6 * SECOND < start < 3 * SECOND and np.array_equal(window.samples, samples[start:])
    window.shorten()
    assert len(window.words) == 2, "no sentence has ended"


# ---- what is shown -------------------------------------------------------------------------------------------------


def test_lines_of_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    screen, settled, shown = Lines(), "", []
    for settled in (
        "",
        " Where is",
        " Where is it",
        " Where is it?",
        " Where is it? 3.5",
        f" Where is it? 3.5 m{' ab' * 60}",
    ):
        screen.show(settled, " and more")
        shown.append(capsys.readouterr().out)
    assert shown[:5] == ["", "", "", "Where is it?\n", ""]
    assert shown[5].startswith("3.5 m ab ab") and len(shown[5]) <= 125
    screen.close()
    assert "".join([*shown, capsys.readouterr().out]).split() == settled.split()


@pytest.mark.parametrize(
    ("text", "end"),
    [("Where? No", 6), ("Where?", 6), ("3.5 m", 0), ("何？！次", 3), ("何？！", 3), ("次。何", 2), ("何か", 0)],
)
def test_the_end_of_a_line(text: str, end: int) -> None:
    assert end_of_line(text) == end


@pytest.mark.parametrize(("text", "columns"), [("ab", 2), ("日本", 4), ("ｅ！", 4), ("e\u0301", 1)])
def test_columns_of_a_text(text: str, columns: int) -> None:
    assert cells(text) == columns


@given(st.lists(st.text("ab 日.", max_size=12), max_size=8), st.text("xy ", max_size=30), st.integers(12, 40))
def test_a_terminal_shows_all_that_is_settled(parts: list[str], tentative: str, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr("sys.stdout.write", written.append)
        screen, settled = Terminal(width), ""
        for part in parts:
            settled += part
            screen.show(settled, tentative)
    lines = "".join(written).split("\n")
    last = [line.split(ANEW)[-1] for line in lines]
    plain = [line.split(DIM)[0] for line in last]
    assert "".join("".join(plain).split()) == "".join(settled.split())
    assert all(cells(line.replace(DIM, "").replace(PLAIN, "")) < width for line in last)


def test_a_terminal_tells_apart(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Terminal(80)
    screen.show(" Where is", " the engine")
    assert capsys.readouterr().out == f"{ANEW}Where is{DIM} the engine{PLAIN}"
    screen.close()
    assert capsys.readouterr().out == "\n"
    Terminal(80).show("", " the engine")
    assert capsys.readouterr().out == f"{ANEW}{DIM}the engine{PLAIN}"


# ---- what is kept --------------------------------------------------------------------------------------------------


def test_a_recording_is_what_was_taken_where_the_disk_was_full_meanwhile() -> None:
    kept = Recording()
    pieces = [noise(0.1, 0.1), noise(0.2, 0.2), noise(0.3, 0.3)]
    kept.add(pieces[0])
    file = kept.file

    def full(_: bytes) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    kept.file = SimpleNamespace(seek=file.seek, write=full)  # type: ignore[assignment]
    with pytest.raises(AudioError, match="cannot be kept in a temporary file: No space left on device"):
        kept.add(pieces[1])
    assert len(kept) == len(pieces[0])
    kept.file = file
    kept.add(pieces[2])
    assert np.array_equal(kept.all().numpy(), np.concatenate([pieces[0], pieces[2]]))
