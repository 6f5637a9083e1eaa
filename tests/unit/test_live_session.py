"""What a live session does with the words that a decoder finds: without a model."""

from math import log
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from whisper.decoding import DecodingResult
from whisper.tokenizer import get_tokenizer

from maxwhisper.live import HeardTwice, Session, Word, hypotheses
from maxwhisper.live.hypotheses import UNLIKELY, Hypothesis, made_up, words_of
from maxwhisper.live.session import ECHO, FRAME, FULL, LEAD, MOST, PAUSE, SHOWN, STEP
from maxwhisper.options import prompt_tokens

from .command import StubModel

SECOND = 16000
SILENCE = np.zeros(30 * SECOND, np.float32)


def speech(n_sample: int) -> np.ndarray:
    """Returns what is loud to its end, with breaths in it, of a multiple of 0.2 s."""
    return np.tile(np.repeat(np.float32([0, 0.1]), [2 * FRAME, 8 * FRAME]), n_sample // (10 * FRAME))


def word(text: str, frame: int, n_token: int = 1) -> Word:
    return Word(text, (7,) * n_token, frame, log(0.99))


class Decoder:
    """Finds the same words in any audio, and notes what it was asked."""

    def __init__(self, *words: Word, language: str = "de"):
        self.words, self.language = list(words), language
        self.asked: list[SimpleNamespace] = []

    def __call__(self, model: Any, audio: Any, prompt: list[int], settled: list[str], **options: Any) -> Hypothesis:
        self.asked.append(SimpleNamespace(n_sample=len(audio), prompt=prompt, settled=settled, options=options))
        return Hypothesis(self.words[len(settled) :], max(1, len(audio) // FRAME), self.language)


class All:
    """Settles all words at once."""

    def settled(self, words: Any, n_frame: int) -> int:
        return len(words)


def session(
    monkeypatch: pytest.MonkeyPatch, decoder: Decoder, policy: Any = All, multilingual: bool = True, **options: Any
) -> Session:
    monkeypatch.setattr("maxwhisper.live.session.hypothesis", decoder)
    model: Any = StubModel()
    model.is_multilingual = multilingual
    return Session(model, policy, **options)


def test_silence_is_not_decoded_and_leaves_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    quiet = session(monkeypatch, decoder)
    for n in range(1, 4):
        quiet.feed(SILENCE[:STEP])
        assert quiet.window.start == max(0, n * STEP - LEAD) and quiet.window.end == n * STEP
    assert not decoder.asked


@pytest.mark.parametrize(("multilingual", "languages"), [(True, [None, "de"]), (False, ["en", "en"])])
def test_what_is_settled_is_kept_with_its_place_and_language(
    multilingual: bool, languages: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(word(" one", 3), word(" two", 12))
    given: dict[str, Any] = {"initial_prompt": "so", "task": "translate", "suppress_tokens": [7]}
    live = session(monkeypatch, decoder, multilingual=multilingual, **given)
    live.feed(SILENCE[: 2 * STEP])
    start = live.window.start
    assert start == 2 * STEP - LEAD
    for _ in range(2):
        live.feed(speech(STEP))
    assert live.settled == " one two"
    assert [at for _, at in live.window.words] == [start + 3 * FRAME, start + 12 * FRAME]
    assert [asked.options["language"] for asked in decoder.asked] == languages
    assert [asked.settled for asked in decoder.asked] == [[], [" one", " two"]]
    for name in ("task", "suppress_tokens"):
        assert all(asked.options[name] == given[name] for asked in decoder.asked)
    prompt = prompt_tokens("so", live.model)
    assert all(asked.prompt == prompt for asked in decoder.asked)


def test_a_given_language_is_decoded_in(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(word(" one", 3))
    session(monkeypatch, decoder, language="en").feed(speech(STEP))
    assert decoder.asked[0].options["language"] == "en"


def test_a_pause_of_a_second_ends_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(word(" one", 3), word(" two", 12))
    live = session(monkeypatch, decoder, HeardTwice)
    live.feed(speech(STEP))
    assert live.settled == "" and live.tentative == " one two"
    live.feed(SILENCE[:PAUSE])
    assert live.settled == " one two" and live.tentative == "" and not live.window.words
    assert live.window.start == STEP + PAUSE - LEAD, "some silence stands before what is said next"
    assert len(decoder.asked) == 2
    live.feed(SILENCE[:STEP])
    assert len(decoder.asked) == 2


def test_what_is_tentative_is_settled_by_a_pause_whatever_was_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(word(" one", 3), word(" two", 12))
    live = session(monkeypatch, decoder, lambda: SimpleNamespace(settled=lambda words, n_frame: 0))
    live.feed(np.concatenate([speech(STEP), SILENCE[: 2 * STEP]]))
    assert live.settled == "" and live.heard_until > STEP + LEAD
    live.feed(SILENCE[:STEP])
    assert live.settled == " one two" and not live.unsettled


def test_a_window_that_is_full_ends_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    live = session(monkeypatch, decoder)
    for _ in range(74):
        live.feed(speech(STEP))
    assert live.window.start == live.window.end == 74 * STEP
    assert max(asked.n_sample for asked in decoder.asked) == 74 * STEP


def test_words_of_an_echo_are_heard_and_of_silence_not(monkeypatch: pytest.MonkeyPatch) -> None:
    end = (STEP + ECHO) // FRAME
    decoder = Decoder(word(" one", 3), word(" two", end - 1), word(" three", end))
    live = session(monkeypatch, decoder)
    live.feed(np.concatenate([speech(STEP), SILENCE[:STEP]]))
    assert live.settled == " one two"


def test_the_last_frames_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    n_frame = STEP // FRAME
    decoder = Decoder(word(" one", n_frame - SHOWN - 1), word(" two", n_frame - SHOWN))
    live = session(monkeypatch, decoder, HeardTwice)
    live.feed(speech(STEP))
    assert live.tentative == " one" and [each.text for each in live.unsettled] == [" one", " two"]


def test_what_is_skipped_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(word(" one", 3))
    live = session(monkeypatch, decoder, HeardTwice)
    live.feed(speech(STEP))
    live.skip(speech(10 * STEP))
    assert live.settled == " one" and live.window.start == live.window.end == live.heard_until == 11 * STEP
    assert [asked.n_sample for asked in decoder.asked] == [STEP, STEP]
    live.feed(speech(STEP))  # of which it knows that it is loud
    assert (decoder.asked[-1].n_sample, decoder.asked[-1].settled) == (STEP, [])
    assert (live.settled, live.tentative) == (" one", " one"), "as what a recording begins with, heard once"


def test_much_without_the_end_of_a_sentence_leaves_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Decoder(word(" one", 3, MOST), word(" two", 12))
    live = session(monkeypatch, many)
    live.feed(speech(STEP))
    assert live.window.start == 13 * FRAME and not live.window.words, "behind the last word"
    long = Decoder(word(" one", 3), word(" two", 12))
    live = session(monkeypatch, long)
    live.feed(speech(FULL))
    assert len(live.window.words) == 2
    live.feed(speech(STEP))
    assert live.window.start == 13 * FRAME and live.settled == " one two"


@pytest.mark.parametrize(
    ("said", "begun", "expected"),
    [
        ({}, False, False),
        ({"text": ""}, False, True),
        ({"avg_logprob": UNLIKELY - 0.01}, False, False),
        ({"avg_logprob": UNLIKELY - 0.01}, True, True),
        ({"avg_logprob": UNLIKELY}, True, False),
        ({"no_speech_prob": 0.61}, False, True),
        ({"no_speech_prob": 0.6}, False, False),
        ({"no_speech_prob": 0.61}, True, False),
        ({"compression_ratio": 2.41}, True, True),
        ({"compression_ratio": 2.4}, True, False),
    ],
)
def test_what_is_made_up(said: dict[str, Any], begun: bool, expected: bool) -> None:
    likely = {"text": " one", "avg_logprob": -0.5, "no_speech_prob": 0.1, "compression_ratio": 1.0}
    result: Any = SimpleNamespace(**likely | said)
    assert made_up(result, begun) == expected


@pytest.mark.parametrize(("n_sample", "n_frame"), [(1, 1), (2 * FRAME - 1, 1), (2 * FRAME, 2), (30 * SECOND, 1500)])
def test_a_frame_of_which_a_part_is_there_is_none(n_sample: int, n_frame: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    said = DecodingResult(
        torch.zeros(1), "de", text=" a b", avg_logprob=-0.5, no_speech_prob=0.0, compression_ratio=1.0
    )
    monkeypatch.setattr(hypotheses, "spectrogram", lambda graph, samples, padding: asked.append(padding))
    monkeypatch.setattr(
        hypotheses, "words_of", lambda *given: asked.append(given[3:]) or [word(" A", 3), word(" b", 9)]
    )
    model: Any = SimpleNamespace(
        encoder=lambda mel: None, network={"log_mel": None}, decode=lambda _, options: asked.append(options) or said
    )
    found = hypotheses.hypothesis(model, torch.zeros(n_sample), [5], [" a"], language="de", task="translate")
    assert (found.n_frame, found.language, [each.text for each in found.words]) == (n_frame, "de", [" b"])
    padding, options, given = asked
    assert padding == 30 * SECOND - n_sample and given == (n_frame, "translate")
    assert (options.prompt, options.language, options.task, options.fp16) == ([5], "de", "translate", False)


def test_words_have_their_last_frame_and_their_least_likely_token() -> None:
    """Of two heads, where their mean attends most; the end of text and timestamps are no words."""
    tokenizer = get_tokenizer(True)
    text = tokenizer.encode(" Hippopotamuses misremembered")
    words = tokenizer.split_to_word_tokens(text)[1]
    n_frame, n_start = 20, 4
    frames = [3, 9, 5, 8, 7, 11, 6, 10, 4][: len(text)]
    assert len(frames) == len(text) > 4 and len(words) == 2
    tokens = [tokenizer.timestamp_begin, *text, tokenizer.eot]
    scores, logits = torch.zeros(1, 2, n_start + len(text), 30), torch.zeros(1, n_start + len(text), 51865)
    for at, (token, frame) in enumerate(zip(text, frames, strict=True), n_start - 1):
        scores[0, 0, at, frame] = 9.0
        scores[0, 1, at, frame - 1] = 3.0
        scores[0, :, at, 25] = 20.0  # behind the audio that there is
        logits[0, at, token] = 20.0 - at
    model: Any = SimpleNamespace(
        is_multilingual=True,
        num_languages=99,
        alignment_heads=torch.tensor([[True, True]]).to_sparse(),
        decoder=SimpleNamespace(alignment=lambda *_: (logits, [scores])),
    )
    result: Any = SimpleNamespace(tokens=tokens, language="en")
    found = words_of(model, torch.zeros(1, 1), result, n_frame, "transcribe")
    assert [each.text for each in found] == [" Hippopotamuses", " misremembered"]
    expected = logits[0, range(n_start - 1, n_start - 1 + len(text)), text] - logits[0, n_start - 1 : -1].logsumexp(-1)
    at = 0
    for each, of_word in zip(found, words, strict=True):
        own = slice(at, at + len(of_word))
        assert (each.tokens, each.frame) == (tuple(of_word), max(frames[own]))
        assert each.logprob == float(expected[own].min())
        at += len(of_word)


def test_all_that_was_heard_is_transcribed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    live = session(monkeypatch, Decoder(), language="en", beam_size=5)
    for samples in (SILENCE[: 3 * STEP], speech(STEP)):
        live.feed(samples)
    live.model.transcribe = lambda audio, **options: {"n_sample": len(audio), **options}  # type: ignore[method-assign]
    assert live.finish() == live.finish() == {"n_sample": 4 * STEP, "language": "en", "beam_size": 5}


def test_a_window_holds_no_more_than_the_model_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    live = session(monkeypatch, decoder)
    live.feed(SILENCE[:1000])
    live.feed(speech(80 * STEP))
    assert max(asked.n_sample for asked in decoder.asked) == 30 * SECOND
