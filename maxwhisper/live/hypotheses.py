"""What Whisper makes of the audio so far: the words behind those that are settled, and where it heard each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from whisper.audio import N_SAMPLES, SAMPLE_RATE, TOKENS_PER_SECOND
from whisper.decoding import DecodingOptions, DecodingResult

from ..audio import spectrogram
from ..engine.surroundings import cpu_by_default, one_torch_thread
from ..options import tokenizer_of
from ..whisper import Whisper
from .policies import Word

REPEATS, UNLIKELY, NO_SPEECH = 2.4, -1.0, 0.6
"""openai-whisper's limits: a hypothesis that gzip shortens by more repeats itself; one with a lower mean
log-probability of its tokens is made up where words in front of it are settled; where none are, one with a higher
probability of no speech."""


@dataclass(frozen=True)
class Hypothesis:
    """What is decoded of the audio so far.

    words: those behind the settled ones. n_frame: frames of audio that there were. language: the code of one.
    """

    words: list[Word]
    n_frame: int
    language: str


@cpu_by_default()
@one_torch_thread()
def hypothesis(
    model: Whisper, samples: Tensor, prompt: list[int], settled: Sequence[str], **options: Any
) -> Hypothesis:
    """Decodes a window greedily, from its beginning: were it made to begin with what is settled, it would make the best
    of every mistake in that.

    samples: float32 (sample,), at most N_SAMPLES. prompt: tokens in front of the window's text. settled: words of the
    window that are. options: of `DecodingOptions`.
    """
    features = model.encoder(spectrogram(model.network["log_mel"], samples, N_SAMPLES - len(samples)))
    asked = DecodingOptions(prompt=prompt, fp16=False, **options)
    result = model.decode(features, asked)
    assert isinstance(result, DecodingResult)
    n_frame = max(1, len(samples) * TOKENS_PER_SECOND // SAMPLE_RATE)
    words = [] if made_up(result, bool(settled)) else words_of(model, features, result, n_frame, asked.task)
    return Hypothesis(words[following(settled, [word.text for word in words]) :], n_frame, result.language)


def made_up(result: DecodingResult, is_begun: bool) -> bool:
    unlikely = result.avg_logprob < UNLIKELY if is_begun else result.no_speech_prob > NO_SPEECH
    return not result.text or unlikely or result.compression_ratio > REPEATS


def following(settled: Sequence[str], words: Sequence[str]) -> int:
    """Returns how many words, the first ones, are what is settled in another wording: the number of them that differ
    least from it by words put in, left out or replaced."""
    costs = list(range(len(words) + 1))
    for number, word in enumerate(settled, 1):
        before, costs = costs, [number]
        for at, other in enumerate(words):
            costs.append(min(before[at] + (normalized(word) != normalized(other)), before[at + 1] + 1, costs[at] + 1))
    return min(range(len(costs)), key=lambda number: (costs[number], -number))


def normalized(word: str) -> str:
    return word.strip().lower()


def words_of(model: Whisper, features: Tensor, result: DecodingResult, n_frame: int, task: str) -> list[Word]:
    """Returns the words of a result, with the frames, of the first `n_frame`, that the alignment heads attended to, and
    their log-probabilities."""
    tokenizer = tokenizer_of(model, language=result.language, task=task)
    start = [*tokenizer.sot_sequence, tokenizer.no_timestamps]
    text = [token for token in result.tokens if token < tokenizer.eot]
    logits, scores = model.decoder.alignment(torch.tensor([start + text]), features[None])
    of_alignment: Any = model.alignment_heads
    heads = torch.stack([scores[layer][0, head] for layer, head in of_alignment.indices().T]).cpu()
    finding = slice(len(start) - 1, -1)  # the position that finds a token is the one in front of it
    attended = heads[:, finding, :n_frame].softmax(-1).mean(0).argmax(-1)
    found = logits[0, finding].float().cpu()
    logprobs = found[range(len(text)), text] - found.logsumexp(-1)
    words, at = [], 0
    for word, tokens in zip(*tokenizer.split_to_word_tokens(text), strict=True):
        own = slice(at, at + len(tokens))
        words.append(Word(word, tuple(tokens), int(attended[own].max()), float(logprobs[own].min())))
        at += len(tokens)
    return words


def prepare(model: Whisper) -> None:
    """Compiles what a session needs, so that speech does not wait for it."""
    hypothesis(model, torch.zeros(SAMPLE_RATE, dtype=torch.float32), [], [])
    model.network["decoder.alignment"]
