"""What Whisper makes of the audio so far: the words behind those that are settled, and where it heard each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from whisper.audio import N_SAMPLES, SAMPLE_RATE, TOKENS_PER_SECOND
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.tokenizer import Tokenizer, get_tokenizer

from ..audio import spectrogram
from ..engine.surroundings import cpu_by_default, one_torch_thread
from ..whisper import Whisper
from .policies import Word

REPEATS, UNLIKELY, NO_SPEECH = 2.4, -1.0, 0.6
"""openai-whisper's limits: a hypothesis that gzip shortens by more repeats itself; one with a lower mean
log-probability of its tokens is made up where words in front of it are settled; where none are, one with a higher
probability of no speech."""


@dataclass(frozen=True)
class Hypothesis:
    """words: those behind the settled ones. n_frame: frames of audio that there were. language: the code of one."""

    words: list[Word]
    n_frame: int
    language: str


@cpu_by_default()
@one_torch_thread()
def hypothesis(model: Whisper, samples: Tensor, prompt: list[int], begun: list[int], **options: Any) -> Hypothesis:
    """Decodes a window, greedily and without timestamps.

    samples: float32 (sample,), at most N_SAMPLES. prompt: tokens in front of the window's text. begun: those that it
    begins with. options: of `DecodingOptions`.
    """
    features = model.encoder(spectrogram(model.network["log_mel"], samples, N_SAMPLES - len(samples)))
    asked = DecodingOptions(
        prompt=prompt,
        prefix=begun,
        suppress_blank=not begun,  # behind what is settled the text may end at once,
        length_penalty=0.0,  # which has no mean of the length that openai-whisper would divide by
        without_timestamps=True,
        fp16=False,
        **options,
    )
    result = model.decode(features, asked)
    assert isinstance(result, DecodingResult)
    n_frame = max(1, len(samples) * TOKENS_PER_SECOND // SAMPLE_RATE)
    words = [] if made_up(result, bool(begun)) else words_of(model, features, begun, result, n_frame, asked.task)
    return Hypothesis(words, n_frame, result.language)


def made_up(result: DecodingResult, is_begun: bool) -> bool:
    unlikely = result.avg_logprob < UNLIKELY if is_begun else result.no_speech_prob > NO_SPEECH
    return not result.tokens or unlikely or result.compression_ratio > REPEATS


def words_of(
    model: Whisper, features: Tensor, begun: list[int], result: DecodingResult, n_frame: int, task: str
) -> list[Word]:
    """Returns the words of a result, with the frames, of the first `n_frame`, that the alignment heads attended to."""
    tokenizer = tokenizer_of(model, result.language, task)
    start = [*tokenizer.sot_sequence, tokenizer.no_timestamps, *begun]
    found = torch.tensor([start + result.tokens])
    logits, scores = model.decoder.alignment(found, features[None])
    of_alignment: Any = model.alignment_heads
    heads = torch.stack([scores[layer][0, head] for layer, head in of_alignment.indices().T]).cpu()
    finding = slice(len(start) - 1, -1)  # the position that finds a token is the one in front of it
    attended = heads[:, finding, :n_frame].softmax(-1).mean(0).argmax(-1)
    sure = logits[0, finding].cpu().softmax(-1).gather(1, found[0, len(start) :, None])[:, 0]
    words, at = [], 0
    texts, parts = tokenizer.split_to_word_tokens(result.tokens)
    for text, tokens in zip(texts, parts, strict=True):
        if tokens[0] >= tokenizer.timestamp_begin:  # which it was not asked for: behind it another segment begins
            break
        own = slice(at, at + len(tokens))
        words.append(Word(text, tuple(tokens), int(attended[own].max()), float(sure[own].min())))
        at += len(tokens)
    return words


def tokenizer_of(model: Whisper, language: str, task: str) -> Tokenizer:
    return get_tokenizer(model.is_multilingual, num_languages=model.num_languages, language=language, task=task)


def prepare(model: Whisper) -> None:
    """Compiles what a session needs, so that speech does not wait for it."""
    hypothesis(model, torch.zeros(SAMPLE_RATE, dtype=torch.float32), [], [])
    model.network["decoder.alignment"]
