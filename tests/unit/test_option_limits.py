"""Options at their limits, and what windows are given of prompts: without a model."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
from whisper.decoding import DecodingOptions
from whisper.tokenizer import get_tokenizer

from maxwhisper.errors import OptionError
from maxwhisper.options import COLDEST, check_prompt, decoding, last, options_of_windows, transcribing, within

from .command import StubModel

MODEL: Any = StubModel()
TOKENIZER = get_tokenizer(True, num_languages=99)
[APPLE], [THE] = (TOKENIZER.encode(word) for word in (" apple", " the"))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", COLDEST, COLDEST),
        ("temperature", COLDEST / 2, None),
        ("temperature", 0, 0),
        ("temperature", math.inf, None),
        ("beam_size", 1, 1),
        ("best_of", 0, 0),
        ("sample_len", 0, 0),
        ("patience", 0.5, 0.5),
        ("max_initial_timestamp", math.inf, None),
        ("length_penalty", -math.inf, -math.inf),
        ("prefix", [0, 51864], [0, 51864]),
        ("prefix", [51865], None),
        ("prefix", [-1], None),
        ("suppress_tokens", [-1, 51864], [-1, 51864]),
        ("suppress_tokens", [-2], None),
        ("prompt", list(range(300)), list(range(77, 300))),
        ("prompt", [99999] * 77 + list(range(223)), list(range(223))),
    ],
)
def test_a_limit_is_within_and_what_is_beyond_it_is_not(name: str, value: Any, expected: Any) -> None:
    given = DecodingOptions(**{name: value})
    if expected is None:
        with pytest.raises(OptionError, match=f"^{name} "):
            decoding(given, MODEL)
    else:
        assert getattr(decoding(given, MODEL), name) == expected


@pytest.mark.parametrize(
    ("beams", "patience", "usable"), [(2, 0.3, True), (1, 0.5, False), (2, 0.25, False), (3, 0.2, True)]
)
def test_patience_is_for_half_a_text_at_least(beams: int, patience: float, usable: bool) -> None:
    given = DecodingOptions(beam_size=beams, patience=patience)
    if usable:
        assert decoding(given, MODEL).patience == patience
        return
    with pytest.raises(OptionError, match=f"patience .*half a text of beam_size {beams}"):
        decoding(given, MODEL)


def test_every_form_of_a_number_reaches_the_loop_as_pythons() -> None:
    found = transcribing({"beam_size": np.int64(5), "temperature": np.float64(0.5), "suppress_tokens": "1,2"}, MODEL)
    assert [type(found[name]) for name in ("beam_size", "temperature")] == [int, float]
    assert found["suppress_tokens"] == [1, 2]


@pytest.mark.parametrize(("n_token", "announced"), [(223, False), (224, True)])
def test_a_prompt_that_is_used_whole_is_not_talked_of(n_token: int, announced: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_prompt("prompt", " the" * n_token, MODEL)
    assert len(caught) == announced


@pytest.mark.parametrize(("n_carried", "kept"), [(222, False), (223, True), (300, True)])
def test_a_carried_prompt_that_fills_the_room_is_all_there_is(n_carried: int, kept: bool) -> None:
    text = " apple" + " the" * (n_carried - 1)
    make = options_of_windows({"initial_prompt": text, "carry_initial_prompt": True}, None, MODEL)
    carried = [APPLE] + [THE] * (n_carried - 1)
    assert make(prompt=[1, 2]).prompt == (carried[-223:] if kept else [1, 2])
    not_carried = options_of_windows({"initial_prompt": text, "carry_initial_prompt": False}, None, MODEL)
    assert not_carried(prompt=[1, 2]).prompt == [1, 2]


def test_hotwords_are_the_first_ones_and_leave_the_end_of_what_is_before() -> None:
    before = list(range(1000, 1200))
    make = options_of_windows({}, "  apple" + " the" * 99, MODEL)
    assert make(prompt=before).prompt == [APPLE] + [THE] * 99 + before[-123:]
    assert make(prompt=None).prompt == [APPLE] + [THE] * 99
    assert make(prompt=before, prefix=" so").prompt == before
    carrying = {"initial_prompt": " the" * 300, "carry_initial_prompt": True}
    filled = options_of_windows(carrying, " apple", MODEL)
    assert filled(prompt=[THE] * 300 + before).prompt == [APPLE] + [THE] * 222
    carrying = {"initial_prompt": " the" * 100, "carry_initial_prompt": True}
    shared = options_of_windows(carrying, " apple" * 90, MODEL)
    assert shared(prompt=[THE] * 100 + before).prompt == [APPLE] * 90 + [THE] * 100 + before[-33:]
    many = options_of_windows({}, " apple" + " the" * 299, MODEL)
    assert many(prompt=before).prompt == [APPLE] + [THE] * 222


@pytest.mark.parametrize(("number", "kept"), [(0, []), (2, [2, 3]), (3, [1, 2, 3]), (5, [1, 2, 3])])
def test_the_last_tokens(number: int, kept: list[int]) -> None:
    assert last([1, 2, 3], number) == kept


@pytest.mark.parametrize(
    ("given", "n_sample", "expected"),
    [
        ("0", 16000, [0.0]),
        ("", 16000, []),
        ("0.5,7", 16000, [0.5, 1.0]),
        ([0.5, 7], 16159, [0.5, 1.0]),  # a frame of which a part is there is none
        ([1.01], 16160, [1.01]),
        (np.array([0.25]), 16000, [0.25]),
        ("-0.1", 16000, None),
        ("nan", 16000, None),
    ],
)
def test_clips_end_with_the_last_whole_frame(given: Any, n_sample: int, expected: list[float] | None) -> None:
    if expected is not None:
        assert within(given, n_sample) == expected
        return
    with pytest.raises(OptionError, match="clip_timestamps"):
        within(given, n_sample)
