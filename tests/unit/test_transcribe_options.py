"""Options of `transcribe` and `decode`: what is refused, and by which name, and what prompts and loud audio come to."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from whisper import DecodingOptions
from whisper.audio import pad_or_trim
from whisper.tokenizer import get_tokenizer

from maxwhisper.audio import log_mel_spectrogram
from maxwhisper.batched import transcribe_batched
from maxwhisper.errors import OptionError
from maxwhisper.whisper import Whisper

from .command import CLIP, StubModel, assert_one_line, status

pytestmark = pytest.mark.usefixtures("encodes_once")

SHORT: dict[str, Any] = {"language": "en", "temperature": 0.0, "sample_len": 5}


@pytest.fixture(scope="module")
def mel(audio: np.ndarray) -> torch.Tensor:
    return log_mel_spectrogram(pad_or_trim(audio))


# ---- what is refused ------------------------------------------------------------------------------------------------

OF_BOTH: list[tuple[str, Any, str]] = [
    ("suppress_tokens", [99999999], "has 99999999, expected numbers of tokens from -1 to 51864"),
    ("suppress_tokens", "51865", "has 51865, expected"),
    ("suppress_tokens", [-1, -7], "has -7, expected"),
    ("suppress_tokens", "1,2,", "is '1,2,', expected numbers"),
    ("suppress_tokens", 5, "is 5, expected numbers"),
    ("suppress_tokens", [1.5], "expected numbers"),
    ("suppress_tokens", ["1"], "expected numbers"),
    ("suppress_tokens", b"12", "expected numbers"),
    ("temperature", "0", "is '0', expected a finite number from 0 on"),
    ("temperature", None, "is None, expected"),
    ("temperature", -1.0, "is -1.0, expected"),
    ("temperature", float("nan"), "is nan, expected"),
    ("temperature", float("inf"), "is inf, expected a finite number from 0 on"),
    ("temperature", np.float32(-1), "expected a finite number"),
    ("temperature", torch.tensor(float("nan")), "expected a finite number"),
    ("temperature", 1j, "expected a finite number"),
    ("temperature", 10**400, "expected a finite number"),
    ("temperature", 1e-38, "is 1e-38, expected 0 or a number from 1e-30 to 1e+30"),
    ("temperature", 1e39, "is 1e+39, expected 0 or a number from 1e-30 to 1e+30"),
    ("task", "translte", "is 'translte', expected transcribe or translate"),
    ("task", None, "is None, expected transcribe"),
    ("language", 5, "is 5, expected a code or a name"),
    ("language", "yue", "is 'yue', expected one of the first 99 of openai-whisper's languages"),
    ("language", "Cantonese", "is 'Cantonese', expected one of the first 99"),
    ("beam_size", 0, "is 0, expected a whole number from 1 to 1000"),
    ("beam_size", 1001, "is 1001, expected a whole number from 1 to 1000"),
    ("best_of", 10**30, "expected a whole number from 0 to 1000"),
    ("beam_size", "5", "is '5', expected a whole number"),
    ("beam_size", 2.5, "is 2.5, expected"),
    ("best_of", -1, "is -1, expected"),
    ("sample_len", -1, "is -1, expected"),
    ("sample_len", 5.0, "is 5.0, expected a whole number"),
    ("length_penalty", "1", "is '1', expected a number"),
    ("patience", "1", "is '1', expected a finite number"),
    ("patience", float("inf"), "is inf, expected a finite number"),
    ("max_initial_timestamp", -1, "is -1, expected a finite number"),
    ("without_timestamps", "False", "is 'False', expected True or False"),
    ("suppress_blank", "no", "is 'no', expected True or False"),
    ("fp16", "False", "is 'False', expected True or False"),
    ("prefix", "a<|endoftext|>", "holds <|endoftext|>, a special token"),
    ("prefix", [51865], "has 51865, expected numbers of tokens from 0 to 51864"),
]


@pytest.mark.parametrize(("name", "value", "said"), OF_BOTH, ids=lambda each: repr(each)[:24])
def test_what_no_window_is_decoded_with(
    model: Whisper, audio: np.ndarray, mel: torch.Tensor, name: str, value: Any, said: str
) -> None:
    options = {"fp16": False, **SHORT, name: value}
    with pytest.raises(OptionError, match=rf"^{name} .*{re.escape(said)}"):
        model.transcribe(audio, **options)
    with pytest.raises(OptionError, match=rf"^{name} .*{re.escape(said)}"):
        model.decode(mel, DecodingOptions(**options))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", (), "is (), expected a finite number from 0 on, or several"),
        ("temperature", [0.0, "1"], "is '1', expected a finite number"),
        ("temperature", {0.0: 1}, "expected a finite number"),
        ("task", "lang_id", "expected transcribe or translate"),
        ("verbose", "False", "is 'False', expected True or False"),
        ("condition_on_previous_text", "False", "expected True or False"),
        ("carry_initial_prompt", "False", "expected True or False"),
        ("word_timestamps", "False", "expected True or False"),
        ("initial_prompt", "<|notimestamps|> a", "holds <|notimestamps|>, a special token"),
        ("initial_prompt", ["a"], "expected a text"),
        ("logprob_threshold", "-1", "is '-1', expected a number"),
        ("no_speech_threshold", float("nan"), "is nan, expected a number"),
        ("hallucination_silence_threshold", -1, "is -1, expected a finite number from 0 on"),
        ("append_punctuations", 5, "is 5, expected symbols"),
        ("clip_timestamps", None, "must be seconds"),
        ("clip_timestamps", 5.0, "must be seconds"),
        ("clip_timestamps", [(0, 3)], "must be seconds"),
        ("clip_timestamps", [{"start": 0}], "must be seconds"),
        ("clip_timestamps", {0.0: 3.0}, "must be seconds"),
        ("clip_timestamps", b"03", "must be seconds"),
        ("clip_timestamps", np.array(3.0), "must be seconds"),
        ("clip_timestamps", "0,1,3,2", "has an end at 2.0 s, before its start at 3.0 s"),
    ],
    ids=lambda each: repr(each)[:24],
)
def test_what_nothing_is_transcribed_with(model: Whisper, audio: np.ndarray, name: str, value: Any, said: str) -> None:
    with pytest.raises(OptionError, match=rf"^{name} .*{re.escape(said)}"):
        model.transcribe(audio, **{**SHORT, name: value})


@pytest.mark.parametrize(("name", "temperature"), [("beam_size", 0.0), ("best_of", 0.5)])
def test_what_many_texts_cost_is_announced_once(
    model: Whisper, mel: torch.Tensor, name: str, temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    for n_text in (32, 33, 33):
        options = SHORT | {name: n_text, "temperature": temperature, "sample_len": 1}
        model.decode(mel, DecodingOptions(fp16=False, **options))
    [said] = [each for each in caplog.messages if "warning" in each]
    assert said == f"warning: {name} is 33: a window takes the time of 33 texts or more, and 0.045 GB for them"


def test_keywords_of_decode_change_the_options_for_once(model: Whisper, mel: torch.Tensor) -> None:
    options = DecodingOptions(fp16=False, language="en", sample_len=3)
    assert [len(model.decode(mel, options, **more).tokens) for more in ({"sample_len": 1}, {})] == [1, 3]


def test_a_prompt_of_decode_and_its_options(model: Whisper, mel: torch.Tensor) -> None:
    with pytest.raises(OptionError, match=r"prompt holds <\|en\|>, a special token"):
        model.decode(mel, fp16=False, prompt="a <|en|>")
    with pytest.raises(OptionError, match="prompt has -1, expected"):
        model.decode(mel, fp16=False, prompt=[-1])
    with pytest.raises(OptionError, match="options is {}, expected whisper.DecodingOptions"):
        model.decode(mel, {})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="patience is 0.3, expected"):
        model.decode(mel, fp16=False, beam_size=1, patience=0.3)
    with pytest.raises(OptionError, match="prefix is too long: .* begins with 503 of 448 tokens"):
        model.decode(mel, fp16=False, prefix=[440] * 500)


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 1.0},
        {"length_penalty": 2.0, "beam_size": 2},
        {"beam_size": 2, "best_of": 2, "temperature": 0.0},
        {"best_of": 2, "temperature": 0.0},
        {"language": "xx"},
    ],
)
def test_what_openai_refuses_it_refuses_still(model: Whisper, mel: torch.Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        model.decode(mel, DecodingOptions(fp16=False, **options))


def test_an_unknown_option_is_openais_error(model: Whisper, audio: np.ndarray) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        model.transcribe(audio, temprature=0)


@pytest.mark.parametrize(
    ("option", "value", "expected", "said"),
    [
        ("--initial_prompt", "a <|endoftext|>", 2, "holds <|endoftext|>, a special token"),
        ("--suppress_tokens", "-1,-7", 2, "must be from -1 on"),
        ("--clip_timestamps", "-1", 2, "must be from 0 on"),
        ("--suppress_tokens", "51865", 1, "suppress_tokens has 51865, expected numbers of tokens from -1 to 51864"),
    ],
)
def test_the_command_says_so_in_one_line_before_any_file_is_read(
    option: str,
    value: str,
    expected: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub = StubModel()
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: stub)
    assert status(["transcribe", CLIP, tmp_path / "missing.wav", "-o", tmp_path, f"{option}={value}"]) == expected
    assert_one_line(capsys, said)
    assert not stub.calls


# ---- what is taken --------------------------------------------------------------------------------------------------

TAKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": np.float32(0)}, {}),
    ({"temperature": torch.tensor(0.0)}, {}),
    ({"temperature": np.array(0)}, {}),
    ({"temperature": np.zeros(2), "logprob_threshold": np.float64(0)}, {"temperature": (0.0, 0.0)}),
    ({"temperature": (0.0 for _ in range(1))}, {}),
    ({"suppress_tokens": (2305, 307)}, {"suppress_tokens": [2305, 307]}),
    ({"suppress_tokens": np.array([2305, 307])}, {"suppress_tokens": [2305, 307]}),
    ({"suppress_tokens": torch.tensor([2305, 307])}, {"suppress_tokens": [2305, 307]}),
    ({"suppress_tokens": "2305, 307"}, {"suppress_tokens": [2305, 307]}),
    ({"suppress_tokens": iter([-1, 2305])}, {"suppress_tokens": [-1, 2305]}),
    ({"suppress_tokens": None}, {"suppress_tokens": ""}),
    ({"beam_size": np.int64(2)}, {"beam_size": 2}),
    ({"prefix": (2305, 307)}, {"prefix": [2305, 307]}),
    ({"clip_timestamps": np.array([0, 3])}, {"clip_timestamps": "0,3"}),
    ({"logprob_threshold": float("-inf")}, {"logprob_threshold": None}),
]


@pytest.fixture(scope="module")
def usual(model: Whisper, audio: np.ndarray) -> dict[str, dict[str, Any]]:
    """Returns the transcript by what options are in the form that most have."""
    forms = {str(same): same for _, same in TAKEN}
    return {name: model.transcribe(audio, **{**SHORT, **same}) for name, same in forms.items()}


@pytest.mark.parametrize(("given", "same"), TAKEN, ids=lambda each: " ".join(str(each).split())[:40])
def test_any_form_of_an_option_is_taken(
    model: Whisper,
    audio: np.ndarray,
    usual: dict[str, dict[str, Any]],
    given: dict[str, Any],
    same: dict[str, Any],
) -> None:
    assert model.transcribe(audio, **{**SHORT, **given}) == usual[str(same)]


def test_the_list_of_a_caller_stays_as_it_is(model: Whisper, mel: torch.Tensor) -> None:
    suppressed = [2305]
    model.decode(mel, fp16=False, language="en", sample_len=1, suppress_tokens=suppressed)
    assert suppressed == [2305]


def test_numbers_of_a_result_are_pythons(model: Whisper, audio: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(value: Any) -> set[type]:
        if isinstance(value, dict | list):
            return set().union(*map(kinds, value.values() if isinstance(value, dict) else value))
        return {type(value)}

    options = {**SHORT, "sample_len": None, "word_timestamps": True, "temperature": np.float32(0)}
    audio = audio[: 3 * 16000]
    told: list[dict[str, Any]] = []
    result = model.transcribe(audio, on_segments=told.extend, **options)
    assert result["segments"][0]["words"] and kinds(result) == kinds(told) == {str, int, float}
    assert dict(model.transcribe_many([audio, audio], 2, **options)) == {0: result, 1: result}
    pytest.importorskip("silero_vad")
    assert kinds(transcribe_batched(model, audio, **options)) == {str, int, float}
    monkeypatch.setattr("maxwhisper.whisper.as_python", lambda result: result)
    assert result == model.transcribe(audio, **options)


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(model: Whisper, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Returns what is decoded behind, window by window."""
    seen, decode = [], type(model).decode

    def decoded(self: Whisper, mel: torch.Tensor, options: DecodingOptions | None = None, **kwargs: Any) -> Any:
        assert options is not None
        seen.append(options.prompt)
        return decode(self, mel, options, **kwargs)

    monkeypatch.setattr(type(model), "decode", decoded)
    return seen


@pytest.mark.parametrize("n_token", [100, 222, 223, 224, 300])
def test_a_prompt_is_carried_to_every_window(
    model: Whisper, audio: np.ndarray, prompts: list[list[int]], n_token: int
) -> None:
    text = " apple" * 3 + " the" * (n_token - 3)
    tokens = get_tokenizer(True, num_languages=model.num_languages).encode(text)
    assert len(tokens) == n_token
    long = np.concatenate([audio, np.zeros(16000 * 30 - len(audio), np.float32), audio])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1 + (n_token > 223)):
            model.transcribe(long, initial_prompt=text, carry_initial_prompt=True, **SHORT)
    used = tokens[-223:]
    assert len(prompts) > 1
    assert all(prompt[-223:][: len(used)] == used for prompt in prompts)
    assert any(len(prompt) > len(used) for prompt in prompts) == (n_token < 223)
    said = "initial_prompt has 300 tokens, of which the last 223 are used: shorten it".replace("300", str(n_token))
    assert [str(each.message) for each in caught] == ([said] if n_token > 223 else [])


def test_a_prompt_that_is_not_used_whole_is_announced(model: Whisper, audio: np.ndarray, mel: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="^initial_prompt has 400 tokens, of which the last 223 are used"):
        model.transcribe(audio, initial_prompt="the " * 400, **SHORT)
    with pytest.warns(UserWarning, match="^prompt has 400 tokens, of which the last 223 are used"):
        model.decode(mel, DecodingOptions(fp16=False, prompt="the " * 400, **SHORT))


def test_a_prompt_that_is_of_decode_alone_is_announced(model: Whisper, audio: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="^prompt has no effect on transcribe, .*: use initial_prompt$"):
        assert model.transcribe(audio, prompt="the", **SHORT) == model.transcribe(audio, **SHORT)


# ---- audio of another range -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.float32, np.float64, torch.Tensor])
@pytest.mark.parametrize("sign", [1, -1])
def test_floats_in_the_range_of_int16_are_announced_once(audio: np.ndarray, form: Any, sign: int) -> None:
    loud = np.zeros(1600)
    loud[7] = 20000 * sign
    given = torch.from_numpy(loud) if form is torch.Tensor else loud.astype(form)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            log_mel_spectrogram(given)
    assert [(each.category, str(each.message)) for each in caught] == [
        (UserWarning, "audio has samples beyond 2, expected floats in [-1, 1]: divide 16-bit samples by 32768")
    ]


def test_audio_that_overshoots_is_nothing_to_talk_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_mel_spectrogram(np.full(1600, 1.9, np.float32))


# ---- what is told meanwhile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_comes_to_the_seconds_there_are(model: Whisper, audio: np.ndarray, quiet: bool) -> None:
    """Of windows without speech too, of which openai-whisper's loop tells nothing."""
    told: list[float] = []
    heard = np.concatenate([np.zeros(30 * 16000, np.float32), audio[: 5 * 16000]])
    options = {"no_speech_threshold": 0.0, "logprob_threshold": None} if quiet else {"no_speech_threshold": None}
    model.transcribe(heard, progress=told.append, **SHORT, **options)
    assert round(100 * sum(told)) == 3500 and min(told) >= 0  # frames
