"""Recordings that are transcribed together: the same as one at a time, whatever happens to one of them."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache as cache_of
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from whisper.audio import N_SAMPLES, SAMPLE_RATE, pad_or_trim

import maxwhisper.scheduling
from maxwhisper.audio import load_audio
from maxwhisper.decoding.batching import BatchingStepper, Request
from maxwhisper.decoding.cache import CacheSlots, KeyValueCache, rows_of
from maxwhisper.decoding.rules import Rules, TokenRules
from maxwhisper.decoding.stepper import Advanced, Candidates, Texts
from maxwhisper.errors import AudioError, DecodingError, OptionError
from maxwhisper.scheduling import loaded, transcribe_many
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES

pytestmark = pytest.mark.usefixtures("encodes_once")

CLIPS = [FIXTURES / clip["file"] for clip in json.loads((FIXTURES / "clips.json").read_text())["clips"]]
SOME = [clip for clip in CLIPS if clip.stem in ("english-1", "english-long", "german-1", "silence", "english-3")]
"""Of one window and of several, in two languages, and without speech."""


def recorded(clip: Path) -> np.ndarray:
    """Returns the recording or, of one of several windows, two sentences in one window and one in the next."""
    audio = load_audio(clip)
    if len(audio) <= N_SAMPLES:
        return audio
    return np.concatenate([pad_or_trim(audio[: 6 * SAMPLE_RATE]), audio[6 * SAMPLE_RATE : 9 * SAMPLE_RATE]])


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    return [*map(recorded, SOME)]


Alone = Callable[[int | None, int], dict[int, dict[str, Any]]]
"""From a number of beams, and of recordings, to each recording's transcript."""


@pytest.fixture(scope="module")
def alone(model: Whisper, recordings: list[np.ndarray]) -> Alone:
    transcribed = cache_of(lambda i, beam_size: model.transcribe(recordings[i], beam_size=beam_size))
    return lambda beam_size, n: {i: transcribed(i, beam_size) for i in range(n)}


@pytest.mark.parametrize(
    ("batch_size", "beam_size", "n"),
    [(2, None, 5), (2, 3, 3), (9, None, 5), pytest.param(9, 3, 5, marks=pytest.mark.nightly)],
)
def test_together_as_alone(
    model: Whisper, alone: Alone, recordings: list[np.ndarray], batch_size: int, beam_size: int | None, n: int
) -> None:
    """Some wait for others, or have room at once; of one of several windows, beside others."""
    expected = alone(beam_size, n)
    assert any(segment["seek"] for each in expected.values() for segment in each["segments"])
    assert dict(model.transcribe_many(recordings[:n], batch_size, beam_size=beam_size)) == expected


def test_threads_that_share_the_model_meanwhile(model: Whisper, alone: Alone, recordings: list[np.ndarray]) -> None:
    """Each transcribes for itself, beside recordings together on the same model, which others wait for."""
    both = recordings[:2]
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(model.transcribe, both[i % 2], beam_size=None) for i in range(4)]
        together = dict(model.transcribe_many(both, 2, beam_size=None))
        assert [each.result() for each in found] == [alone(None, 2)[i % 2] for i in range(4)]
    assert together == alone(None, 2)


def test_word_timestamps_together(model: Whisper, recordings: list[np.ndarray]) -> None:
    both = recordings[1:3]
    assert dict(model.transcribe_many(both, 2, word_timestamps=True)) == {
        number: model.transcribe(audio, word_timestamps=True) for number, audio in enumerate(both)
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_recording_that_fails_does_not_stop_the_others(
    model: Whisper, alone: Alone, batch_size: int, tmp_path: Path
) -> None:
    audio = [SOME[0], tmp_path / "missing.wav", np.zeros((2, 2), np.float32), SOME[1]]
    found = dict(model.transcribe_many(audio, batch_size))
    assert isinstance(found[1], AudioError) and "missing.wav" in str(found[1])
    assert isinstance(found[2], OptionError)
    assert [found[0], found[3]] == [*alone(None, 2).values()]


def test_a_step_that_fails_is_the_failure_of_all_that_took_it(model: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise DecodingError("no step today")

    monkeypatch.setattr(model.stepper, "advance", fail)
    found = dict(model.transcribe_many([SOME[0], SOME[0]], 2))
    assert [str(found[i]) for i in range(2)] == ["no step today"] * 2


def test_a_recording_that_fails_in_its_steps_fails_alone(
    model: Whisper, alone: Alone, recordings: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That with the shorter text of two, in their second step; the other goes on, and in its place comes a third."""
    n_step, advance = count(1), model.stepper.advance

    def shortest_not_finite(texts: Texts, *rest: Any) -> Advanced:
        found = advance(texts, *rest)
        if next(n_step) == 2:
            found.candidates.logprobs[found.texts.lengths.argmin()] = torch.nan
        return found

    monkeypatch.setattr(model.stepper, "advance", shortest_not_finite)
    found = dict(model.transcribe_many(recordings[:3], 2))
    (failed,) = (number for number, each in found.items() if isinstance(each, Exception))
    assert isinstance(found.pop(failed), DecodingError)
    assert found == {number: each for number, each in alone(None, 3).items() if number != failed}


def test_whoever_stops_listening_leaves_no_thread_behind(model: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has it begin with others."""
    text = model.transcribe(SOME[0])["text"]  # with whatever thread tqdm starts with the first of a process
    begun: list[Any] = []
    attempt = maxwhisper.scheduling.attempt
    monkeypatch.setattr(maxwhisper.scheduling, "attempt", lambda *given: begun.append(given) or attempt(*given))
    before = threading.active_count()
    results = model.transcribe_many(SOME * 2, 3)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before and len(begun) < 2 * len(SOME)
    assert model.transcribe(SOME[0])["text"] == text


@pytest.mark.parametrize("size", [0, "4", 2.5, None])
def test_batch_size_of_nothing(model: Whisper, size: Any) -> None:
    with pytest.raises(OptionError, match=f"batch_size is {size!r}, expected a whole number from 1 on"):
        next(model.transcribe_many(SOME, size))


ONE = ["talk.mp3", Path("talk.mp3"), np.zeros(400, np.float32), torch.zeros(400)]


@pytest.mark.parametrize("one", [*ONE, None, iter(SOME), {"talk.mp3": SOME[0]}], ids=type)
def test_what_is_not_several_recordings(model: Whisper, one: Any) -> None:
    with pytest.raises(OptionError, match="^audio is .*, expected several recordings, in a list$"):
        next(model.transcribe_many(one))


def test_no_recordings(model: Whisper) -> None:
    assert list(model.transcribe_many([], 2)) == []


def test_recordings_are_read_one_ahead() -> None:
    read: list[int] = []

    def files() -> Any:
        for i in range(4):
            read.append(i)
            yield np.full(1, i)

    found = loaded(files())
    assert next(found)[0] == 0 and read == [0, 1]
    assert [number for number, _ in found] == [1, 2, 3]


@pytest.mark.parametrize("n_wanted", [1, 3])
def test_nobody_waits_for_a_pipe_whose_audio_is_not_wanted_any_more(n_wanted: int) -> None:
    stopped = threading.Event()
    found = loaded([np.zeros(1)] * 3, stopped)
    for _ in range(n_wanted):
        next(found)
    assert not stopped.is_set()
    found.close()
    assert stopped.is_set()


def test_whoever_stops_listening_waits_for_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a thread waits for, whose end is waited for."""
    waited: list[bool] = []

    def read_audio(path: str, rate: int, stopped: threading.Event) -> np.ndarray:
        waited.append(stopped.wait(5))
        return np.zeros(1)

    monkeypatch.setattr(maxwhisper.scheduling, "read_audio", read_audio)
    model: Any = SimpleNamespace(stepper=OneToken(), transcribe=lambda audio: {}, stepping_by=lambda stepper: model)
    results: Any = transcribe_many(model, [np.zeros(1), "pipe", "pipe"], 2)
    assert next(results) == (0, {})
    results.close()
    assert all(waited)


# ---- slots ---------------------------------------------------------------------------------------------------------


def cache(value: float, n_text: int = 2) -> KeyValueCache:
    made = KeyValueCache(cross=[torch.full((1, 1, 5, 4), value)])
    made.append([torch.full((n_text, 1, int(value), 4), value)], n_position=8)
    return made


def quantize(cross: Sequence[torch.Tensor], into: torch.Tensor, row: int) -> None:
    into[:, row] = int(cross[0].max())


def test_caches_keep_what_they_hold_from_slot_to_slot() -> None:
    slots, held = CacheSlots(3), [cache(float(i)) for i in (1, 2, 3, 4)]
    for present in ([2, 1, 0], [0, 1, 2], [0, 1], [1], [1, 3]):  # the others are gone, or come later
        placed = slots.place([held[i] for i in present])
        assert {id(each) for each in placed} == {id(held[i]) for i in present}
        joined = slots.joined(len(present))
        own, cross = joined.own[0], joined.cross[0]
        assert joined.rows.equal(rows_of(len(own), 8))
        assert len(own) == 2 * len(present) and len(cross) == len(present)
        memory, quantized = joined.memory, joined.quantized(quantize)
        assert memory is not None
        assert memory[0].data_ptr() == own.data_ptr()
        for slot, each in enumerate(placed):
            value = held.index(each) + 1
            assert (own[2 * slot : 2 * slot + 2, :, :value] == value).all() and (cross[slot] == value).all()
            assert (quantized[:, slot] == value).all()
            assert each.own[0].data_ptr() == own[2 * slot].data_ptr()


class OneToken:
    """Gives every text a token more."""

    max_candidates, tokens_first, searches = None, False, False

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: torch.Tensor) -> Advanced:
        tokens = torch.nn.functional.pad(texts.tokens, (0, 1), value=rules.eot)
        first = torch.zeros(len(tokens), 1)
        return Advanced(Texts(tokens, texts.lengths + 1, texts.totals), Candidates(first.long(), first))


def test_a_cache_is_as_long_as_its_own_texts_whatever_others_are() -> None:
    """Else it would exchange rows of beams that are not filled yet."""
    stepper = BatchingStepper(OneToken(), 2)
    held = {n: cache(float(n)) for n in (1, 3)}
    for _ in held:
        stepper.join()

    def advance(n: int) -> Advanced:
        tokens = torch.full((2, n + 1), n)
        with stepper.turn:
            try:
                given = Texts.of(tokens, torch.zeros(2)), held[n], TokenRules(10, 0, 9).inputs(tokens, 1)
                return stepper.advance(*given, torch.ones(2, dtype=torch.int64))
            finally:
                stepper.leave()

    with ThreadPoolExecutor(2) as threads:
        found = dict(zip(held, threads.map(advance, held), strict=True))
    assert {n: each.n_token for n, each in held.items()} == {1: 2, 3: 4}
    assert all(each.texts.tokens.tolist() == [[n] * (n + 1) + [9]] * 2 for n, each in found.items())


def test_what_has_ended_is_told_of_its_own_window() -> None:
    class Searching(OneToken):
        def advance(self, *given: Any) -> Advanced:
            return super().advance(*given)._replace(ended=[{(n,): float(n)} for n in range(3)])

    held = [cache(1.0), cache(2.0), cache(3.0)]
    requests = []
    for each in held:
        tokens = torch.ones(2, each.n_token + 1, dtype=torch.int64)
        texts, rules = Texts.of(tokens, torch.zeros(2)), TokenRules(10, 0, 9).inputs(tokens, 1)
        requests.append(Request(texts, each, rules, torch.ones(2, dtype=torch.int64), Future()))
    stepper = BatchingStepper(Searching(), 3)
    found = stepper._compute(requests)
    placed = [id(each) for each in stepper.slots.taken]
    assert [found[each].ended for each in placed] == [[{(n,): float(n)}] for n in range(3)]


def test_rules_of_different_filters_do_not_join() -> None:
    rules, later, other = (TokenRules(10, begin, 9) for begin in (0, 3, 0))
    other.suppressed[3] = True
    given = [
        each.inputs(torch.ones(2, 5), 1)._replace(wanted=torch.tensor([n])) for n, each in enumerate((rules, later))
    ]
    joined = Rules.joined(given)
    assert joined.begins.tolist() == [0, 0, 3, 3] and joined.wanted is not None and joined.wanted.tolist() == [0, 1]
    for different in (other.inputs(torch.ones(2, 5), 1), rules.inputs(torch.ones(2, 5), 2)):
        with pytest.raises(AssertionError):
            Rules.joined([*given, different])


def test_a_thread_that_fails_outside_of_a_recording_ends_the_call(
    model: Whisper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the thread is lost")

    monkeypatch.setattr(maxwhisper.scheduling, "attempt", fail)
    with pytest.raises(RuntimeError, match="the thread is lost"):
        list(transcribe_many(model, [np.zeros(16000, np.float32)] * 2, 2))
