"""How near a transcript is to another: by tokens, and by words."""

from collections.abc import Callable, Sequence

import jiwer
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer


def agreement(reference: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> float | None:
    """Returns the share, 0 to 1, of equal tokens in the best alignment of two lists of transcripts; None if both are
    empty."""
    as_words = [[" ".join(map(str, each)) for each in side] for side in (reference, tokens)]
    counts = jiwer.process_words(as_words[0], as_words[1])
    total = counts.hits + counts.substitutions + counts.deletions + counts.insertions
    return counts.hits / total if total else None


def word_error_rate(reference: Sequence[str], texts: Sequence[str], languages: Sequence[str]) -> float | None:
    """Returns the word error rate after openai-whisper's normalizers; None if the reference has no words."""
    sides = [
        [normalizer(language)(text).strip() for text, language in zip(side, languages, strict=True)]
        for side in (reference, texts)
    ]
    return jiwer.wer(sides[0], sides[1]) if any(sides[0]) else None


def normalizer(language: str) -> Callable[[str], str]:
    """Returns openai-whisper's normalizer of text in a language."""
    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer()
