"""When a word is settled, by what the decoder says of audio that goes on.

Whisper makes words of what is cut at the end of the audio, and goes on with words for which there is no audio yet. The
next hypothesis, of more audio, has others in their place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from types import MappingProxyType
from typing import Protocol

from whisper.audio import TOKENS_PER_SECOND


@dataclass(frozen=True)
class Word:
    """A word of a hypothesis, or a punctuation mark.

    tokens: those that it is made of. frame: the last of the audio features, of 20 ms, that the decoder attended to most
    for one of them, counted from the beginning of the window. logprob: log-probability of the least likely one.
    """

    text: str
    tokens: tuple[int, ...]
    frame: int
    logprob: float


class Policy(Protocol):
    """Decides which words are settled, hypothesis by hypothesis."""

    def settled(self, words: Sequence[Word], n_frame: int) -> int:
        """Returns how many words of the next hypothesis are settled, the first ones.

        words: those behind what is settled already. n_frame: how many frames of audio there are.
        """


REWIND = TOKENS_PER_SECOND
"""Frames, a second, that attention goes back at most from a word to the next one. For what it makes up, it looks among
earlier words."""


SURE, UNSURE = log(0.97), log(0.9)
"""The log-probabilities from which on the decoder is sure of a word, and below which it is not."""


def in_audio(words: Sequence[Word], n_frame: int, margin: int = 0) -> int:
    """Returns how many words the decoder has found in the audio, the first ones: of those in front of one for which it
    attended to the last `margin` of `n_frame` frames, the last one for which it did not go back."""
    latest, found = 0, 0
    for number, word in enumerate(words):
        if word.frame >= n_frame - margin:
            break
        if word.frame >= latest - REWIND:
            latest, found = max(latest, word.frame), number + 1
    return found


def audible(words: Sequence[Word], n_frame: int) -> int:
    """Returns how many words the decoder did not make of a silence, the first ones: up to one, punctuation aside, for
    which it attended to what is behind `n_frame` frames."""
    silent = (n for n, word in enumerate(words) if word.frame >= n_frame and any(map(str.isalnum, word.text)))
    return next(silent, len(words))


class LocalAgreement:
    """Settles what two hypotheses in a row begin with: LocalAgreement-2 (Liu et al., 2020)."""

    def __init__(self) -> None:
        self.before: list[str] = []

    def settled(self, words: Sequence[Word], n_frame: int) -> int:
        """Returns how many words are settled, as `Policy` has it."""
        texts = [word.text for word in words]
        agreed = agreement(texts, self.before)
        self.before = texts[agreed:]
        return agreed


def agreement(texts: Sequence[str], others: Sequence[str]) -> int:
    """Returns how many texts both begin with."""
    differing = (number for number, pair in enumerate(zip(texts, others, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(texts), len(others)))


class AlignAtt:
    """Settles a word once the decoder attends for it to audio that is not the last there is: AlignAtt (Papi et al.,
    2023)."""

    margin = TOKENS_PER_SECOND // 2
    """Frames that are the last there is."""

    def settled(self, words: Sequence[Word], n_frame: int) -> int:
        """Returns how many words are settled, as `Policy` has it."""
        return in_audio(words, n_frame, self.margin)


class HeardTwice:
    """Settles what two hypotheses in a row begin with, or the decoder is sure of, as far as it found it in the audio.

    Where only agreement counts, two hypotheses make up the same word for audio that is not there yet; where only
    attention does, it has to be far from the end. What a word may still become, its probability says.
    """

    margin, sure_margin, unsure_margin = 12, 24, 40
    """Frames at the end of the audio by which no word is settled: one that was heard twice, one that was heard once and
    is sure, and one that was heard twice and is unsure."""

    def __init__(self) -> None:
        self.before: list[str] = []

    def settled(self, words: Sequence[Word], n_frame: int) -> int:
        """Returns how many words are settled, as `Policy` has it."""
        texts = [word.text for word in words]
        twice = min(agreement(texts, self.before), in_audio(words, n_frame, self.margin))
        late = n_frame - self.unsure_margin
        unsure = (n for n in range(twice) if words[n].logprob < UNSURE and words[n].frame > late)
        found = next(unsure, twice)
        heard = in_audio(words, n_frame, self.sure_margin)
        found = next((n for n in range(found, heard) if words[n].logprob < SURE), max(found, heard))
        self.before = texts[found:]
        return found


POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {"heard-twice": HeardTwice, "local-agreement": LocalAgreement, "align-att": AlignAtt}
)
"""By name; the first one is what a session has unless told otherwise."""
