"""LocalAgreement-2 on faster-whisper, as it is published: what `maxwhisper live` is compared with.

It is that of whisper_streaming (Macháček et al., 2023), written anew with greedy decoding as in `maxwhisper.live`, so
that the same checkpoint is decoded alike. AlignAtt is not here: of attention CTranslate2 gives a path alone, on
which words that nobody said have times too. WhisperLiveKit's, on PyTorch, is in `live_kit`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from faster_whisper import WhisperModel

from maxwhisper.audio import SAMPLE_RATE
from maxwhisper.compare.convert import convert, store
from maxwhisper.compare.material import checkpoint_for
from maxwhisper.live.policies import agreement

STEPS = (0.4, 1.0)
"""Seconds of new audio for which both decode: as often as `maxwhisper.live`, and as published."""
TRIM = 15
"""Seconds of audio from which on whisper_streaming drops segments."""
PROMPT = 200
"""Characters of settled text in front of the audio that whisper_streaming has as prompt."""


def peers(name: str) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Yields what listens by a name, made from a language."""
    folder = convert("ctranslate2", store(checkpoint_for(name)))
    model = WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=2, local_files_only=True)
    for step in STEPS:
        yield f"faster-whisper, local-agreement, {step} s", partial(LocalAgreement, model, int(step * SAMPLE_RATE))


class LocalAgreement:
    """Settles what two transcripts in a row of the audio from the last cut on begin with, by words with times."""

    def __init__(self, model: WhisperModel, step: int, language: str):
        self.model, self.step, self.language = model, step, language
        self.audio = np.zeros(0, np.float32)
        self.start = 0.0
        self.new = 0
        self.settled = self.tentative = ""
        self.words: list[tuple[float, str]] = []
        self.before: list[tuple[float, str]] = []

    def feed(self, samples: np.ndarray) -> None:
        """Takes the next samples, and decodes if there are enough."""
        self.audio = np.concatenate([self.audio, samples])
        self.new += len(samples)
        if self.new >= self.step:
            self.new = 0
            self.decode()

    def cut(self, end: float) -> None:
        """Drops the audio before a second of the recording."""
        n_sample = int((end - self.start) * SAMPLE_RATE)
        self.audio, self.start = self.audio[n_sample:], self.start + n_sample / SAMPLE_RATE

    def decode(self) -> None:
        """Settles what is agreed on, and drops audio of segments that are."""
        prompt = "".join(word for end, word in self.words if end <= self.start)[-PROMPT:]
        found, _ = self.model.transcribe(
            self.audio,
            language=self.language,
            beam_size=1,
            initial_prompt=prompt or None,
            condition_on_previous_text=True,
            word_timestamps=True,
        )
        segments = list(found)
        last = self.words[-1][0] if self.words else 0.0
        timed = [
            (word.end + self.start, word.start + self.start, word.word) for each in segments for word in each.words
        ]
        words = self.without_settled([(end, word) for end, start, word in timed if start > last - 0.1])
        agreed = agreement(*([word for _, word in some] for some in (words, self.before)))
        self.words += words[:agreed]
        self.before = words[agreed:]
        self.settled = "".join(word for _, word in self.words)
        self.tentative = "".join(word for _, word in self.before)
        if len(self.audio) > TRIM * SAMPLE_RATE and self.words:
            ends = [each.end + self.start for each in segments]
            done = [end for end in ends[:-1] if end <= self.words[-1][0]]
            if done:
                self.cut(done[-1])

    def without_settled(self, words: list[tuple[float, str]]) -> list[tuple[float, str]]:
        """Drops the first words where they are the last settled ones once more, up to five."""
        if words and self.words and abs(words[0][0] - self.words[-1][0]) < 1:
            for n in range(1, 1 + min(5, len(words), len(self.words))):
                if [word for _, word in self.words[-n:]] == [word for _, word in words[:n]]:
                    return words[n:]
        return words
