"""Subtitles hold any text, and are read back as the same cues; of an ordinary text they are openai-whisper's."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from whisper.utils import get_writer

from maxwhisper.cli.outputs import FORMATS, WORD_OPTIONS, write
from maxwhisper.subtitles import contents

from .command import CLIP, StubModel, status

NONE = {"highlight_words": False, "max_line_width": None, "max_line_count": None, "max_words_per_line": None}
LAYOUTS = [
    NONE,
    NONE | {"highlight_words": True},
    NONE | {"max_line_width": 12},
    NONE | {"max_line_width": 12, "max_line_count": 2, "highlight_words": True},
    NONE | {"max_words_per_line": 1},
]


def spoken(*segments: list[str], words: bool = True) -> dict[str, Any]:
    """Returns a result of these words, each of half a second."""
    found: list[dict[str, Any]] = []
    time = 0.0
    for texts in segments:
        start, timed = time, []
        for text in texts:
            timed.append({"word": text, "start": time, "end": time + 0.5, "probability": 1.0})
            time += 0.5
        segment = {"id": len(found), "start": start, "end": time, "text": "".join(texts), "tokens": [1, 2]}
        found.append(segment | ({"words": timed} if words else {}))
    return {"text": "".join(segment["text"] for segment in found), "segments": found, "language": "en"}


def cues(text: str, ending: str) -> Iterator[tuple[str, str]]:
    """Yields the line of times and the text of every cue, as readers take them: empty lines part cues, and a line with
    an arrow is one of times."""
    for block in re.split(r"\n\n+", text.removeprefix("WEBVTT\n\n").strip("\n")) if "-->" in text else ():
        lines = block.split("\n")
        if ending == "srt":
            assert lines.pop(0).isdecimal()
        assert re.fullmatch(r"[\d:.,]+ --> [\d:.,]+", lines[0]) and "-->" not in "\n".join(lines[1:]), block
        yield lines[0], "\n".join(lines[1:])


def plain(text: str, ending: str) -> str:
    """Returns what is shown of a cue; raises ValueError where a reader would take some of it for a tag or an entity."""
    if ending == "vtt":
        text = re.sub("</?u>", "", text)
        if "<" in text or re.search(r"&(?!amp;|lt;)", text):
            raise ValueError(text)
        return html.unescape(text)
    return text


# ---- the same as openai-whisper's ----------------------------------------------------------------------------------

ORDINARY = [
    spoken([" Where", " is", " the", " simple", " engine?"], [" It's", " five", " -", " or", " 5", " ->", " six."]),
    spoken(["字", "が", "、"], [" b", " c"], [" and", " 2", " >", " 1!"]),
    spoken([" Hello", " there."], words=False),
    spoken([" one", " --", " two"], [" -->", " <"], words=False) | {"segments": []},
    spoken(),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("result", ORDINARY)
@pytest.mark.parametrize("ending", FORMATS)
def test_ordinary_texts_are_as_openai_whisper_writes_them(
    tmp_path: Path, ending: str, result: dict[str, Any], layout: dict[str, Any]
) -> None:
    get_writer(ending, str(tmp_path))(result, "a.wav", layout)
    theirs = (tmp_path / f"a.{ending}").read_bytes()
    assert write(result, "a.wav", str(tmp_path / "ours"), ending, layout) == []
    assert (tmp_path / "ours" / f"a.{ending}").read_bytes() == theirs


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("ending", ["txt", "tsv", "json"])
def test_other_formats_have_every_text_as_it_is(tmp_path: Path, ending: str, words: bool) -> None:
    result = spoken([" a", " -->", " <b>&"], ["", " "], [" x\n\ny"], words=words)
    before = json.dumps(result)
    get_writer(ending, str(tmp_path))(result, "a.wav", NONE)
    assert contents(result, ending, NONE) == (tmp_path / f"a.{ending}").read_text()
    for subtitles in ("vtt", "srt"):
        contents(result, subtitles, NONE)
    assert json.dumps(result) == before


# ---- any text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [True, False])
def test_what_means_something_in_webvtt_is_escaped(words: bool) -> None:
    result = spoken([" a", " -->", " <b>&", " &lt;", " c", " --->", " d>"], words=words)
    text = "a -> {0}b>{1} {1}lt; c -> d>"
    assert contents(result, "vtt", NONE) == f"WEBVTT\n\n00:00.000 --> 00:03.500\n{text.format('&lt;', '&amp;')}\n\n"
    srt = f"1\n00:00:00,000 --> 00:00:03,500\n{text.format('<', '&')}\n\n"
    assert contents(result, "srt", NONE) == srt


def test_highlighting_is_no_text() -> None:
    """Its tags are not escaped, what looks like them is."""
    result = spoken([" <u>", " R&D"])
    shown = [text for _, text in cues(contents(result, "vtt", NONE | {"highlight_words": True}), "vtt")]
    assert shown == ["<u>&lt;u></u> R&amp;D", "&lt;u> <u>R&amp;D</u>"]


def test_lines_are_as_wide_as_what_is_shown() -> None:
    result, layout = spoken([" R&D", " <3", " &", " so", " on"]), NONE | {"max_line_width": 8, "max_line_count": 1}
    vtt, srt = ([text for _, text in cues(contents(result, ending, layout), ending)] for ending in ("vtt", "srt"))
    assert [html.unescape(text) for text in vtt] == srt == ["R&D <3 &", "so on"]


@pytest.mark.parametrize("words", [True, False])
def test_a_line_that_ends_in_a_text_is_a_space(words: bool) -> None:
    for ending in ("vtt", "srt"):
        found = cues(contents(spoken([" a \r\n\n b", "\n", "c"], words=words), ending, NONE), ending)
        assert [text for _, text in found] == ["a b c"]


def test_an_arrow_may_come_of_several_words() -> None:
    for segments in ([[" a", " --", ">", " b"]], [[" a", " -"], ["-", ">", " b"]]):
        for layout, ending in ((layout, ending) for layout in LAYOUTS for ending in ("vtt", "srt")):
            assert list(cues(contents(spoken(*segments), ending, layout), ending))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("ending", ["vtt", "srt"])
def test_no_cue_is_empty(ending: str, words: bool, layout: dict[str, Any]) -> None:
    result = spoken([], ["", " "], [" a", " ", " b", " "], [" \n"], [" c"], [""], words=words)
    found = list(cues(contents(result, ending, layout), ending))
    assert all(plain(text, ending).strip() for _, text in found)
    said = [plain(text, ending) for _, text in found]
    assert [text for text in said if "c" in text] and [text for text in said if "a" in text]


WORD = st.one_of(st.sampled_from([" -->", "--", ">", " <u>", "&", "&amp;", "", " ", "\n\n", " a\r\n\r\nb", " word"]))


@given(
    segments=st.lists(st.lists(WORD, max_size=5), max_size=4),
    layout=st.sampled_from(LAYOUTS),
    ending=st.sampled_from(["vtt", "srt"]),
    words=st.booleans(),
)
def test_any_text_is_read_back(segments: list[list[str]], layout: dict[str, Any], ending: str, words: bool) -> None:
    result = spoken(*segments, words=words)
    shown = [plain(text, ending) for _, text in cues(contents(result, ending, layout), ending)]
    assert all(text.strip() for text in shown)
    if not layout["highlight_words"] or not words:
        said, read = ("".join("".join(texts).split()) for texts in (result["text"], shown))
        assert re.sub("--+>", "->", read) == re.sub("--+>", "->", said)
    if layout == NONE:  # a cue of each segment, with the spaces between its words
        said = [re.sub("--+>", "->", " ".join("".join(texts).split())) for texts in segments]
        assert [" ".join(text.split()) for text in shown] == [text for text in said if text]


# ---- options without effect ----------------------------------------------------------------------------------------

WITHOUT_EFFECT = {
    "--max_line_count 2 --word_timestamps True": "--max_line_count has no effect without --max_line_width",
    "--max_words_per_line 2 --max_line_width 9 --word_timestamps True": (
        "--max_words_per_line has no effect with --max_line_width"
    ),
    "--hallucination_silence_threshold 0": (
        "--hallucination_silence_threshold has no effect without --word_timestamps True"
    ),
    "--carry_initial_prompt True": "--carry_initial_prompt has no effect without --initial_prompt",
    "--or_compile True": "--or_compile has no effect without --artifacts",
    "--max_line_count 2 --max_line_width 9 --word_timestamps True": "",
    "--max_words_per_line 2 --word_timestamps True --hallucination_silence_threshold 2": "",
    "": "",
}


@pytest.mark.parametrize("options", WITHOUT_EFFECT)
def test_options_without_effect_are_named(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: StubModel())
    assert status(["transcribe", CLIP, CLIP.with_name("english-2.flac"), "-o", tmp_path, *options.split()]) == 0
    expected = WITHOUT_EFFECT[options]
    assert capsys.readouterr().err == (f"maxwhisper: warning: {expected}\n" if expected else "")


def test_every_layout_gives_every_option() -> None:
    assert all(set(layout) == set(WORD_OPTIONS) for layout in LAYOUTS)
