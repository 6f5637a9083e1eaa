"""Where somebody speaks, and transcription of that alone: `vad_filter`."""

import json
import re
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from hypothesis import given
from hypothesis import strategies as st
from whisper.audio import FRAMES_PER_SECOND, SAMPLE_RATE, pad_or_trim
from whisper.tokenizer import get_tokenizer

from maxwhisper import speech
from maxwhisper.audio import load_audio
from maxwhisper.batched import transcribe_batched
from maxwhisper.cli import main
from maxwhisper.errors import OptionError
from maxwhisper.options import DETECTOR, options_of_windows, transcribing
from maxwhisper.speech import AROUND, CHUNK, LEFT_OUT, Kept, transcribe_speech
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES, NANO

from .command import StubModel

LONG = FIXTURES / "clips" / "english-long.mp3"
CLIP = FIXTURES / "clips" / "english-1.wav"
GREEDY = {"language": "en", "temperature": 0.0}


@given(st.lists(st.sampled_from([0.1, 0.35, 0.4, 0.5, 0.6]), max_size=60), st.integers(1, 9))
def test_speech_is_what_sileros_own_rule_says(found: list[float], shortest: int) -> None:
    """Written from the rule: a silence begins below the one probability, whatever comes before the other is reached."""
    expected, start, quiet = [], None, None
    for i, probability in enumerate(found):
        if probability >= 0.5:
            quiet = None
            if start is None:
                start = i
        elif probability < 0.35 and start is not None:
            if quiet is None:
                quiet = i
            if i - quiet >= shortest:
                expected.append((start, quiet))
                start = quiet = None
    if start is not None:
        expected.append((start, len(found)))
    assert speech.speech(found, shortest) == expected


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Chunks from and to which the detector hears speech, to be filled."""
    spans: list[tuple[int, int]] = []

    def probabilities(audio: np.ndarray) -> np.ndarray:
        found = np.zeros(-(-len(audio) // CHUNK))
        for start, end in spans:
            found[start:end] = 1
        return found

    monkeypatch.setattr(speech, "probabilities", probabilities)
    return spans


def test_silence_from_2_s_on_is_left_out_but_for_margins(heard: list[tuple[int, int]]) -> None:
    heard += [(100, 200), (200 + LEFT_OUT - 1, 300), (300 + LEFT_OUT + 1, 400)]
    audio = np.arange(600 * CHUNK, dtype=np.float32)
    kept = Kept(audio)
    second = (300 + LEFT_OUT + 1) * CHUNK
    assert kept.spans == [(100 * CHUNK - AROUND, 300 * CHUNK + AROUND), (second - AROUND, 400 * CHUNK + AROUND)]
    assert (kept.audio == np.concatenate([audio[start:end] for start, end in kept.spans])).all()
    heard.append((500, 601))  # to the end, which is within a chunk
    audio = np.arange(600 * CHUNK + 7, dtype=np.float32)
    kept = Kept(audio)
    assert kept.spans[-1] == (500 * CHUNK - AROUND, len(audio)) and kept.ends[-1] == len(kept.audio)


def test_every_time_comes_back_to_where_it_was_in_the_recording(heard: list[tuple[int, int]]) -> None:
    heard += [(100, 200), (400, 500)]
    kept = Kept(np.zeros(600 * CHUNK, np.float32))
    (first, first_end), (second, _) = ((start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in kept.spans)
    border = first_end - first
    word = {"word": " a", "probability": 1.0}
    # A word goes where its middle is, both ends; a segment's end at the border is the first part's.
    words = [word | {"start": border - 0.5, "end": border + 0.1}, word | {"start": border - 0.1, "end": border + 0.5}]
    segment = {"id": 0, "seek": 0, "start": 0.1, "end": border, "text": " a"}
    assert kept.restored(segment) == segment | {
        "start": round(first + 0.1, 2),
        "end": round(first_end, 2),
        "seek": round(100 * round(first, 2)),
    }
    instant = kept.restored(segment | {"start": border})
    assert instant["start"] == instant["end"] == round(second, 2)
    last = kept.ends[-1] / SAMPLE_RATE
    at_the_end = kept.restored(segment | {"start": last, "end": last + 0.02, "seek": round(last * 100) + 1})
    assert at_the_end["start"] == round(last + kept.moved[-1] / SAMPLE_RATE, 2)
    restored = kept.restored(segment | {"words": words, "end": border + 0.5})
    times = [(each["start"], each["end"]) for each in restored["words"]]
    assert times[0] == (round(first_end - 0.5, 2), round(first_end + 0.1, 2))
    assert times[1] == (round(second - 0.1, 2), round(second + 0.5, 2))
    assert (restored["start"], restored["end"]) == (times[0][0], times[1][1])


@pytest.fixture(scope="module")
def paused() -> np.ndarray:
    """Returns the first clip, a pause of 40 s, and the clip again."""
    clip = load_audio(CLIP)
    return np.concatenate([clip, np.zeros(40 * SAMPLE_RATE, np.float32), clip])


@pytest.mark.parametrize("words", [False, True])
def test_a_pause_is_left_out_and_the_rest_is_what_pytorch_hears_in_it(
    model: Whisper, paused: np.ndarray, words: bool
) -> None:
    kept = Kept(paused)
    assert len(kept.audio) < len(paused) - 35 * SAMPLE_RATE
    options: dict[str, Any] = {**GREEDY, "word_timestamps": words}
    theirs = whisper.load_model(str(NANO), "cpu").transcribe(kept.audio, fp16=False, **options)["segments"]
    told: list[dict[str, Any]] = []
    done: list[float] = []
    given = {"vad_filter": True, "on_segments": told.extend, "progress": done.append}
    ours = model.transcribe(paused, **given, **options)["segments"]
    assert 0 <= round(len(paused) / SAMPLE_RATE - sum(done), 6) < 1 / FRAMES_PER_SECOND
    assert [segment["tokens"] for segment in ours] == [segment["tokens"] for segment in theirs]
    later = (kept.spans[-1][1] - len(kept.audio)) / SAMPLE_RATE
    assert later > 35 and ours[-1]["end"] == round(theirs[-1]["end"] + later, 2) and ours[0]["end"] < 10
    assert [segment | {"id": 0} for segment in told] == [segment | {"id": 0} for segment in ours]
    if words:
        assert ours[-1]["words"][-1]["end"] == ours[-1]["end"]


def test_silence_has_no_text(model: Whisper) -> None:
    result = model.transcribe(np.zeros(5 * SAMPLE_RATE, np.float32), vad_filter=True, **GREEDY)
    assert result["text"] == "" and result["segments"] == []


def test_what_cannot_be_combined_and_what_is_no_choice(model: Whisper) -> None:
    audio = np.zeros(SAMPLE_RATE, np.float32)
    with pytest.raises(OptionError, match="clip_timestamps cannot be combined with vad_filter"):
        model.transcribe(audio, vad_filter=True, clip_timestamps="1,2")
    with pytest.raises(OptionError, match="clip_timestamps cannot be combined with vad_filter"):
        model.transcribe(audio, vad_filter=True, clip_timestamps=np.array([1.0, 2.0]))
    for every in ("", "0.0", (0,), []):  # what openai-whisper takes for all of it
        assert model.transcribe(audio, vad_filter=True, clip_timestamps=every, **GREEDY)["segments"] == []
    with pytest.raises(OptionError, match="vad_filter is 'yes', expected True or False"):
        model.transcribe(audio, vad_filter="yes")
    with pytest.raises(OptionError, match="hotwords is 5, expected a text"):
        model.transcribe(audio, hotwords=5)
    with pytest.raises(OptionError, match=r"hotwords holds <\|endoftext\|>, a special token"):
        model.transcribe(audio, hotwords="<|endoftext|>")


@pytest.mark.parametrize("package", DETECTOR)
def test_a_detector_that_is_not_installed_shows_before_any_work(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OptionError, match=r"vad_filter needs silero-vad and onnxruntime: .*maxwhisper\[batched\]"):
        transcribing({"vad_filter": True}, StubModel())  # type: ignore[arg-type]
    assert transcribing({"vad_filter": False}, StubModel())  # type: ignore[arg-type]


def test_the_command_prints_the_times_of_the_recording(
    heard: list[tuple[int, int]], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    heard.append((0, 10_000))
    arguments = ["transcribe", str(CLIP), "--model", str(NANO), "-o", str(tmp_path), "-f", "json"]
    assert main(arguments) == 0
    plain, bar = re.findall(r"Detected .*|\[.*", (said := capsys.readouterr()).out), "frames/s"
    assert plain[0] == "Detected language: English" and bar not in said.err
    assert main([*arguments, "--vad_filter", "True"]) == 0
    assert re.findall(r"Detected .*|\[.*", (said := capsys.readouterr()).out) == plain and bar not in said.err
    assert main([*arguments, "--vad_filter", "True", "--batched"]) == 0
    assert "--vad_filter has no effect with --batched" in capsys.readouterr().err
    assert json.loads((tmp_path / "english-1.json").read_text())["segments"]


def test_a_window_of_which_nothing_is_left_prints_nothing(
    heard: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    class Model:
        def transcribe(self, audio: np.ndarray, **options: Any) -> dict[str, Any]:
            options["on_segments"]([])  # as where hallucination_silence_threshold takes all of them
            return {"segments": []}

    transcribe_speech(Model(), np.zeros(SAMPLE_RATE, np.float32), verbose=True)
    assert capsys.readouterr().out == ""


def test_what_is_left_out_is_done_at_once(heard: list[tuple[int, int]]) -> None:
    heard += [(100, 200)]
    done: list[float] = []
    model: Any = StubModel()
    model.transcribe = lambda audio, **options: options["progress"](len(audio) / SAMPLE_RATE) or {"segments": []}
    transcribe_speech(model, np.zeros(600 * CHUNK, np.float32), progress=done.append)
    kept = (100 * CHUNK + 2 * AROUND) / SAMPLE_RATE
    assert done == [600 * CHUNK / SAMPLE_RATE - kept, kept]


# ---- hotwords ------------------------------------------------------------------------------------------------------


def test_hotwords_alone_are_openais_carried_prompt(model: Whisper) -> None:
    audio = load_audio(LONG)[: 9 * SAMPLE_RATE]
    audio = np.concatenate([pad_or_trim(audio[: 6 * SAMPLE_RATE]), audio[6 * SAMPLE_RATE :]])  # in two windows
    options: dict[str, Any] = {**GREEDY, "condition_on_previous_text": False}
    peer = whisper.load_model(str(NANO), "cpu")
    text = "Hector, David and the elephants"
    theirs = peer.transcribe(audio, initial_prompt=text, carry_initial_prompt=True, fp16=False, **options)
    ours = model.transcribe(audio, hotwords=text, **options)
    without = model.transcribe(audio, **options)
    tokens = [[segment["tokens"] for segment in result["segments"]] for result in (theirs, ours, without)]
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize("n_hot", [3, 222, 223, 300])
@pytest.mark.parametrize("prefix", [None, " the"])
def test_hotwords_come_first_and_leave_what_is_before_the_window_the_rest(
    model: Whisper, monkeypatch: pytest.MonkeyPatch, n_hot: int, prefix: str | None
) -> None:
    seen: list[list[int]] = []

    def decode(self: Whisper, mel: torch.Tensor, options: Any) -> Any:
        seen.append(options.prompt)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "decode", decode)
    tokenizer = get_tokenizer(True, num_languages=model.num_languages)
    options: dict[str, Any] = {**GREEDY, "prefix": prefix, "initial_prompt": " apple" * 150}
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning) if n_hot > 223 else nullcontext():
        model.transcribe(np.zeros(SAMPLE_RATE, np.float32), hotwords=" the" * n_hot, **options)
    before = tokenizer.encode(" apple" * 150)
    hot = tokenizer.encode(" the" * n_hot)[:223]
    room = 223 - len(hot)
    assert seen == [before if prefix else hot + before[len(before) - min(room, 150) :]]


@pytest.mark.parametrize(("n_hot", "n_carried"), [(3, 40), (100, 130), (223, 40), (3, 300)])
def test_hotwords_leave_a_carried_prompt_its_place(n_hot: int, n_carried: int) -> None:
    hot, carried = " the" * n_hot, " apple" * n_carried
    options = {"initial_prompt": carried, "carry_initial_prompt": True}
    make = options_of_windows(options, hot, StubModel())  # type: ignore[arg-type]
    [the], [apple] = (get_tokenizer(True, num_languages=99).encode(word) for word in (" the", " apple"))
    prompt = make(prompt=[apple] * n_carried + list(range(1000, 1000 + max(0, 223 - n_carried)))).prompt
    assert prompt == [the] * n_hot + [apple] * min(n_carried, 223 - n_hot) + list(range(1000, 1223 - n_carried))[n_hot:]


def test_batches_take_hotwords_and_thresholds_of_silence(model: Whisper) -> None:
    audio = load_audio(LONG)[: 6 * SAMPLE_RATE]
    options: dict[str, Any] = {**GREEDY, "word_timestamps": True, "hallucination_silence_threshold": 1.0}
    options["hotwords"] = "Hector"
    alone = model.transcribe(audio, **options)
    found = dict(model.transcribe_many([audio, audio], 2, **options))
    assert found == {0: alone, 1: alone}
    batched = transcribe_batched(model, audio, 2, vad_filter=True, **options)
    assert batched["text"] and all("words" in segment for segment in batched["segments"])
