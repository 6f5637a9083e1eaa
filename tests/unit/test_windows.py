"""The comparison of all that is said of a window on trial: what PyTorch says passes, anything else does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from whisper.audio import log_mel_spectrogram, pad_or_trim

from reference import checkpoints, waveforms, windows
from reference.blocks import pytorch_whisper
from reference.fixtures import FIXTURES, NANO
from reference.judge import Comparison, Judgement, Measure, Output
from reference.models import FIXTURE
from reference.verdicts import Verdicts
from reference.windows import TranscriptWindow, Window

CLIP, LONG = "clips/english-1.wav", "clips/english-long.mp3"


@pytest.fixture(scope="module")
def judge() -> windows.Judge:
    """Returns the judge of what is said of a window."""
    peer = checkpoints.read(NANO, 51865).eval()
    return windows.Judge(pytorch_whisper(peer.dims, peer.state_dict(), torch.float64), peer, None)


def saying(judge: windows.Judge, way: str) -> tuple[Window, Callable[[Window], Judgement]]:
    """Returns what PyTorch says of a window in float32, and what judges what is said of it."""
    audio = torch.from_numpy(pad_or_trim(waveforms.read(FIXTURES / CLIP)))
    comparison = Comparison(FIXTURE, torch.float32, f"decode, {way}", 0, CLIP)
    right = windows.decoded(judge.peer, log_mel_spectrogram(audio), windows.DECODING[way])
    return right, lambda window: judge.judged(comparison, audio, window)


@pytest.fixture(scope="module")
def said(judge: windows.Judge) -> tuple[Window, Callable[[Window], Judgement]]:
    """Returns what `saying` does; PyTorch computes what it says only once."""
    right, judged = saying(judge, "greedy")
    of_oracle, found = windows.Judge.logits, list[dict[str, Tensor]]()

    def logits(*given: Any) -> dict[str, Tensor]:
        found.extend([] if found else [of_oracle(*given)])
        return found[0]

    def judged_again(window: Window) -> Judgement:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(windows, "decoded", lambda *_: right)
            patch.setattr(windows.Judge, "logits", logits)
            return judged(window)

    return right, judged_again


def test_what_pytorch_says_passes(said: Any) -> None:
    right, judged = said
    assert judged(right).passed


def test_what_has_no_words_passes(judge: windows.Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may say nothing to silence."""
    no_text = {"suppress_tokens": [*range(50257)], "without_timestamps": True, "sample_len": 3}
    monkeypatch.setitem(windows.DECODING, "nothing", no_text)
    right, judged = saying(judge, "nothing")
    assert right.result.tokens and not right.words
    assert judged(right).passed
    assert not judged(off("avg_logprob", 1.001)(right)).passed


def off(name: str, factor: float) -> Callable[[Window], Window]:
    """Returns what multiplies one of the numbers by a factor."""
    return lambda w: replace(w, result=replace(w.result, **{name: getattr(w.result, name) * factor}))


def with_last_word(window: Window, **changed: float) -> Window:
    return replace(window, words=[*window.words[:-1], replace(window.words[-1], **changed)])


FAULTS: dict[str, Callable[[Window], Window]] = {
    "log-probability": off("avg_logprob", 1.001),
    "its sum over one token fewer": lambda w: off("avg_logprob", 1 + 1 / len(w.result.tokens))(w),
    "not a number": off("avg_logprob", np.nan),
    "speech": off("no_speech_prob", 1.001),
    "languages": lambda w: replace(w, languages=w.languages.roll(1)),
    "languages not normalised": lambda w: replace(w, languages=w.languages * 1.001),
    "compression": off("compression_ratio", 1.001),
    "temperature": lambda w: replace(w, result=replace(w.result, temperature=0.2)),
    "a token": lambda w: replace(w, result=replace(w.result, tokens=[*w.result.tokens[:-1], 50364])),
    "language": lambda w: replace(w, result=replace(w.result, language="de")),
    "the probability of a word": lambda w: with_last_word(w, probability=w.words[-1].probability * 1.001),
    "the time of a word": lambda w: with_last_word(w, end=w.words[-1].end + 0.02),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_anything_else_does_not(fault: str, said: Any) -> None:
    right, judged = said
    assert not judged(FAULTS[fault](right)).passed


def test_a_verdict_is_kept_of_all_that_is_said(
    judge: windows.Judge, said: Any, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked, outputs = said[0], [], (Output(0, (1,), (Measure("relative L2", 0.0, 0.0, 1.0),)),)
    verdict = Judgement(Comparison(FIXTURE, torch.float32, "decode, greedy", 0, CLIP), outputs, ())
    subject: Any = SimpleNamespace(network={"log_mel": None}, device=torch.device("cpu"))
    monkeypatch.setattr(windows, "spectrogram", lambda *_: None)
    monkeypatch.setattr(windows, "decoded", lambda *_: now)
    monkeypatch.setattr(windows.Judge, "judged", lambda *_: asked.append(1) or verdict)
    remembering = replace(judge, verdicts=Verdicts(pytest.Cache(tmp_path, pytestconfig, _ispytest=True), "m"))
    for fault, change in FAULTS.items():  # each beside the right one, whose verdict is kept
        found = []
        for each in (said[0], said[0], change(said[0])):
            now = each
            asked.clear()
            remembering.compare(subject, CLIP, waveforms.read(FIXTURES / CLIP), "greedy")
            found.append(len(asked))
        assert found == [1, 0, 1], fault


@pytest.fixture(scope="module")
def of_transcript(judge: windows.Judge) -> tuple[list[TranscriptWindow], Callable[[list[TranscriptWindow]], Judgement]]:
    """Returns what PyTorch says of a recording's three windows, and what judges what is said of them."""
    audio = waveforms.read(FIXTURES / LONG)
    right = windows.windows_of(judge.peer, audio, "greedy")
    comparison = Comparison(FIXTURE, torch.float32, "transcribe, greedy", 0, LONG)
    of_oracle, known = windows.logits_of, dict[int, Tensor]()

    def logits_of(model: Any, mel: Tensor, text: Tensor, dtype: torch.dtype) -> Tensor:
        if text.numel() not in known:
            known[text.numel()] = of_oracle(model, mel, text, dtype)
        return known[text.numel()]

    def judged(said: list[TranscriptWindow]) -> Judgement:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(windows, "windows_of", lambda model, *_: right if model is judge.peer else [])
            patch.setattr(windows, "logits_of", logits_of)
            return judge.judged_windows(comparison, torch.from_numpy(audio), "greedy", said)

    return right, judged


def with_last(**changes: Callable[[Any], Any]) -> Callable[[list[TranscriptWindow]], list[TranscriptWindow]]:
    """Returns what changes some of what is said of the last window."""
    return lambda w: [*w[:-1], replace(w[-1], **{name: f(getattr(w[-1], name)) for name, f in changes.items()})]


TRANSCRIPT_FAULTS: dict[str, Callable[[list[TranscriptWindow]], list[TranscriptWindow]]] = {
    "log-probability": with_last(avg_logprob=lambda x: x * 1.001),
    "speech": with_last(no_speech_prob=lambda x: x * 1.001),
    "speech of the window before": lambda w: [*w[:-1], replace(w[-1], no_speech_prob=w[-2].no_speech_prob)],
    "not a number": with_last(no_speech_prob=lambda _: np.nan),
    "a token": with_last(tokens=lambda x: x[:-1]),
    "a prompt": with_last(options=lambda x: replace(x, prompt=[])),
    "language": with_last(options=lambda x: replace(x, language="de")),
    "where it begins": with_last(seek=lambda x: x + 2),
    "a window fewer": lambda w: w[:-1],
}


def test_what_pytorchs_transcript_says_passes_and_nothing_else(of_transcript: Any) -> None:
    right, judged = of_transcript
    assert len(right) == 3 and judged(right).passed
    assert [fault for fault, change in TRANSCRIPT_FAULTS.items() if judged(change(right)).passed] == []


def test_a_verdict_is_kept_of_all_that_is_said_of_a_transcripts_windows(
    judge: windows.Judge,
    of_transcript: Any,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, outputs = [], (Output(0, (1,), (Measure("relative L2", 0.0, 0.0, 1.0),)),)
    verdict = Judgement(Comparison(FIXTURE, torch.float32, "transcribe, greedy", 0, LONG), outputs, ())
    monkeypatch.setattr(windows.Judge, "judged_windows", lambda *_: asked.append(1) or verdict)
    remembering = replace(judge, verdicts=Verdicts(pytest.Cache(tmp_path, pytestconfig, _ispytest=True), "m"))
    for fault, change in TRANSCRIPT_FAULTS.items():
        found = []
        for each in (of_transcript[0], of_transcript[0], change(of_transcript[0])):
            monkeypatch.setattr(windows, "windows_of", lambda *_, each=each: each)
            asked.clear()
            subject: Any = SimpleNamespace(device=torch.device("cpu"))
            transcript = remembering.compare_transcript(subject, LONG, np.zeros(9, np.float32), "greedy")
            assert transcript.equal
            found.append(len(asked))
        assert found == [1, 0, 1], fault
    monkeypatch.setattr(windows, "windows_of", lambda *_: of_transcript[0])
    found = []
    for device, samples in (("cpu", 9), ("cpu", 9), ("cpu", 8), ("cuda", 9), ("cuda", 9)):
        asked.clear()
        subject = SimpleNamespace(device=torch.device(device))
        remembering.compare_transcript(subject, LONG, np.zeros(samples, np.float32), "greedy")
        found.append(len(asked))
    assert found == [1, 0, 1, 1, 1], "another recording is another verdict; on a GPU none is kept"


def test_a_number_over_its_budget_is_a_difference(judge: windows.Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = Comparison(FIXTURE, torch.float32, "decode, greedy", 0, CLIP)
    subject: Any = SimpleNamespace(network={"log_mel": None}, device=torch.device("cpu"))
    said: Any = SimpleNamespace(numbers=[], text=(), result=SimpleNamespace(tokens=[1, 2]))
    monkeypatch.setattr(windows, "spectrogram", lambda *_: None)
    monkeypatch.setattr(windows, "decoded", lambda *_: said)
    for error, equal in ((0.5, True), (1.5, False), (np.nan, False)):
        outputs = (Output(0, (1,), (Measure("relative L2", error, 0.0, 1.0),)),)
        monkeypatch.setattr(windows.Judge, "judged", lambda *_, outputs=outputs: Judgement(comparison, outputs, ()))
        found = judge.compare(subject, CLIP, np.zeros(16000, np.float32), "greedy")
        assert (found.equal, bool(found.difference), found.n_compared) == (equal, not equal, 2)


@pytest.mark.parametrize("way", ["greedy", "between others", "between others, 3 beams"])
def test_a_window_is_decoded_between_others_where_the_way_says_so(
    judge: windows.Judge, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is judged is said of that window, not of those beside it."""
    sounds = [np.full(9, number, np.float32) for number in range(3)]
    asked: list[list[float]] = []

    def of_each(x: Tensor) -> list[Any]:
        asked.append(x[:, 0, 0].tolist())
        return [SimpleNamespace(tokens=[number], language="en") for number in asked[-1]]

    subject: Any = SimpleNamespace(network={"log_mel": None}, device=torch.device("cpu"), dims=judge.peer.dims)
    subject.embed_audio = lambda x: x
    subject.detect_language = lambda x: (None, [{"en": number} for number in x[:, 0, 0].tolist()])
    subject.decode = lambda x, options: of_each(x)
    monkeypatch.setattr(windows, "spectrogram", lambda _, audio: audio[:240].view(80, 3))
    monkeypatch.setattr(windows.timing, "find_alignment", lambda _, __, tokens, mel, ___: [*tokens, float(mel[0, 0])])
    said: list[Window] = []
    verdict = Judgement(Comparison(FIXTURE, torch.float32, way, 0, CLIP), (), ())
    monkeypatch.setattr(Window, "numbers", [])
    monkeypatch.setattr(Window, "text", ())
    monkeypatch.setattr(windows.Judge, "judged", lambda *given: said.append(given[-1]) or verdict)
    judge.compare(subject, CLIP, sounds[0], way, sounds[1:])
    assert asked == ([[0.0]] if way == "greedy" else [[1.0, 0.0, 2.0]])
    assert said == [Window(said[0].result, torch.tensor([0.0]), [0, 0.0])] and said[0].result.tokens == [0]


def test_words_end_before_the_end_of_text() -> None:
    tokenizer: Any = SimpleNamespace(eot=5)
    assert windows.words_of(tokenizer, [7, 4, 5, 6, 3]) == [4, 3]
