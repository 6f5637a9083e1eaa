"""The comparison of whole transcripts on trial: whatever differs is seen, be it the last value of the last segment."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch

from maxwhisper.speech import CHUNK
from reference import transcripts
from reference.transcripts import Transcript, compare, compare_many, compare_pieces, transcribed

CLIP = "clips/english-1.wav"


class Says:
    """Stands for a model that has heard this."""

    def __init__(self, result: dict[str, Any]):
        self.result = result

    def transcribe(self, *_: Any, **__: Any) -> dict[str, Any]:
        return self.result

    def transcribe_many(self, sounds: list[Any], *_: Any, **__: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields what is said of each, the last one first, which alone is said of all others too."""
        yield from ((number, self.result if number else said()) for number in reversed(range(len(sounds))))


def segment(start: float) -> dict[str, Any]:
    words = [{"word": f" {n}", "start": start + n, "end": start + n + 1} for n in range(2)]
    of_text = {"text": " 0 1", "tokens": [50364, 5, 6, 50464], "temperature": 0.0, "compression_ratio": 1.5}
    return {"id": int(start) // 2, "seek": 0, "start": start, "end": start + 2, "words": words, **of_text}


def said() -> dict[str, Any]:
    return {"language": "en", "text": " 0 1 0 1", "segments": [segment(0.0), segment(2.0)]}


def compared(ours: dict[str, Any], theirs: dict[str, Any], decoding: str) -> Transcript:
    return compare(cast(Any, Says(ours)), cast(Any, Says(theirs)), CLIP, decoding)


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Returns what changes a field of the last segment."""
    return lambda result: result["segments"][-1].update({name: value})


def of_word(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda result: result["segments"][-1]["words"][-1].update({name: value})


LOST: Callable[[dict[str, Any]], object] = lambda result: result["segments"].pop()  # noqa: E731
TEXT: Callable[[dict[str, Any]], object] = lambda result: result.update(text=" 0 1 0 1 ")  # noqa: E731
LANGUAGE: Callable[[dict[str, Any]], object] = lambda result: result.update(language="de")  # noqa: E731
OF_SEGMENTS = {
    "start": changed("start", 2.02),
    "end": changed("end", 3.98),
    "text": changed("text", " 0 2"),
    "tokens": changed("tokens", [50364, 5, 7, 50464]),
    "temperature": changed("temperature", 0.2),
    "compression_ratio": changed("compression_ratio", 1.6),
    "id": changed("id", 2),
    "seek": changed("seek", 3000),
    "a segment": LOST,
    "the whole text": TEXT,
    "language": LANGUAGE,
}
OF_WORDS = {
    "word": of_word("word", " 2"),
    "start": of_word("start", 3.02),
    "end": of_word("end", 3.98),
    "a segment": LOST,
    "the whole text": TEXT,
    "language": LANGUAGE,
}
CASES = [(decoding, each) for decoding, of in (("greedy", OF_SEGMENTS), ("words", OF_WORDS)) for each in of]


@pytest.mark.parametrize(("decoding", "difference"), CASES)
def test_a_difference_is_seen_on_either_side(decoding: str, difference: str) -> None:
    other = copy.deepcopy(said())
    (OF_SEGMENTS if decoding == "greedy" else OF_WORDS)[difference](other)
    for ours, theirs in ((other, said()), (said(), other)):
        found = compared(ours, theirs, decoding)
        assert not found.equal and found.difference


@pytest.mark.parametrize(("decoding", "n_compared"), [("greedy", 8), ("words", 4)])
def test_the_same_is_equal_and_counted(decoding: str, n_compared: int) -> None:
    found = compared(said(), said(), decoding)
    assert (found.equal, found.n_compared, found.difference) == (True, n_compared, "")


@pytest.mark.parametrize(("decoding", "difference"), CASES)
def test_a_difference_is_seen_where_it_is_among_recordings_together(decoding: str, difference: str) -> None:
    other = copy.deepcopy(said())
    (OF_SEGMENTS if decoding == "greedy" else OF_WORDS)[difference](other)
    subject, peer = cast(Any, Says(other)), cast(Any, Says(said()))
    found = list(compare_many(subject, peer, [CLIP, "clips/german-1.wav"], decoding, 2))
    assert [(each.clip, each.equal) for each in found] == [("clips/german-1.wav", False), (CLIP, True)]


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("decoding", ["greedy", "words"])
def test_pieces_are_those_of_the_batch_at_their_places(
    decoding: str, changed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is heard by itself; the second one begins 4 s into the sound."""
    heard: list[int] = []

    class Hears:
        def transcribe(self, sound: Any, **_: Any) -> dict[str, Any]:
            heard.append(len(sound))
            return said()

    def batched(subject: Any, sound: Any, **_: Any) -> dict[str, Any]:
        first, second = said(), said()
        for timed in (each for segment in second["segments"] for each in (segment, *segment["words"])):
            timed |= {edge: timed[edge] + 4.0 for edge in ("start", "end")}
        for segment in second["segments"]:
            segment |= {"id": segment["id"] + 2, "seek": segment["seek"] + 400}
        ours = {**first, "text": " 0 1 0 1" * 2, "segments": [*first["segments"], *second["segments"]]}
        (OF_SEGMENTS if decoding == "greedy" else OF_WORDS)["end"](ours if changed else said())
        return ours

    monkeypatch.setattr(transcripts.waveforms, "read", lambda path: np.zeros(190 * CHUNK, np.float32))
    monkeypatch.setattr(transcripts, "probabilities", lambda sound: None)
    monkeypatch.setattr(transcripts, "pieces", lambda found: [(0, 30), (125, 190)])
    monkeypatch.setattr(transcripts, "transcribe_batched", batched)
    found = compare_pieces(cast(Any, None), cast(Any, Hears()), CLIP, decoding)
    assert (found.equal, found.n_compared) == (not changed, 16 if decoding == "greedy" else 8)
    assert heard == [30 * CHUNK, 65 * CHUNK]


def test_both_draw_alike() -> None:
    class Draws:
        def transcribe(self, *_: Any, **__: Any) -> float:
            return float(torch.rand(1))

    model: Any = Draws()
    assert transcribed(model, cast(Any, None), {}) == transcribed(model, cast(Any, None), {})
