"""LocalAgreement-2 and AlignAtt on faster-whisper, as they are published: what `maxwhisper live` is compared with.

LocalAgreement-2 is that of whisper_streaming (Macháček et al., 2023), AlignAtt that of SimulStreaming (2025). Both are
written anew here, with greedy decoding as in `maxwhisper.live`, so that the same checkpoint is decoded alike.
WhisperLiveKit's own are in `live_kit`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.tokenizer import Tokenizer

from maxwhisper.audio import N_FRAMES, N_SAMPLES, SAMPLE_RATE
from maxwhisper.compare.convert import convert, store
from maxwhisper.compare.material import checkpoint_for

STEPS = (0.4, 1.0)
"""Seconds of new audio for which both decode: as often as `maxwhisper.live`, and as published."""
TRIM = 15
"""Seconds of audio from which on whisper_streaming drops segments."""
PROMPT = 200
"""Characters of settled text in front of the audio that whisper_streaming has as prompt."""
MOST = 200
"""Tokens in front of new ones for which there is room."""
FRAMES = 25
"""Frames at the end of the audio that AlignAtt stops at, as in SimulStreaming."""


def peers(name: str) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Yields what listens by a name, made from a language."""
    folder = convert("ctranslate2", store(checkpoint_for(name)))
    model = WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=2, local_files_only=True)
    for step in STEPS:
        yield f"faster-whisper, local-agreement, {step} s", partial(LocalAgreement, model, int(step * SAMPLE_RATE))
        yield f"faster-whisper, align-att, {step} s", partial(AlignAtt, model, int(step * SAMPLE_RATE))


class Listening:
    """Audio from the last cut on, and the text of it."""

    def __init__(self, model: WhisperModel, step: int, language: str):
        self.model, self.step, self.language = model, step, language
        self.audio = np.zeros(0, np.float32)
        self.start = 0.0
        self.new = 0
        self.settled = self.tentative = ""

    def feed(self, samples: np.ndarray) -> None:
        """Takes the next samples, and decodes if there are enough."""
        self.audio = np.concatenate([self.audio, samples])
        self.new += len(samples)
        if self.new >= self.step:
            self.new = 0
            self.decode()

    def decode(self) -> None:
        raise NotImplementedError

    def cut(self, end: float) -> None:
        """Drops the audio before a second of the recording."""
        n_sample = int((end - self.start) * SAMPLE_RATE)
        self.audio, self.start = self.audio[n_sample:], self.start + n_sample / SAMPLE_RATE


class LocalAgreement(Listening):
    """Settles what two transcripts in a row of the audio begin with, by words with times."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.words: list[tuple[float, str]] = []
        self.before: list[tuple[float, str]] = []

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
        agreed = next(
            (n for n, (now, then) in enumerate(zip(words, self.before, strict=False)) if now[1] != then[1]),
            min(len(words), len(self.before)),
        )
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


class AlignAtt(Listening):
    """Settles tokens up to one for which the decoder attends to the end of the audio."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        model = self.model
        self.tokenizer = Tokenizer(
            model.hf_tokenizer, model.model.is_multilingual, task="transcribe", language=self.language
        )
        self.tokens: list[int] = []
        self.frames: list[float] = []
        self.n_cut = 0

    def decode(self) -> None:
        """Settles what attention allows, and drops the first sentence where the audio is longer than a window."""
        begun = self.tokens[self.n_cut :]
        tokenizer = self.tokenizer
        features = self.model.feature_extractor(self.audio, padding=N_SAMPLES)
        encoded = self.model.encode(features[:, :N_FRAMES])
        n_frame = max(1, len(self.audio) * 50 // SAMPLE_RATE)
        start = [*tokenizer.sot_sequence, tokenizer.no_timestamps]
        prompt = [*start, *begun]
        [result] = self.model.model.generate(
            encoded, [prompt], beam_size=1, max_length=min(448, len(prompt) + 100), suppress_blank=not begun
        )
        new = [token for token in result.sequences_ids[0] if token < tokenizer.eot]
        if new:
            [aligned] = self.model.model.align(
                encoded, tokenizer.sot_sequence, [begun + new], [2 * n_frame], median_filter_width=7
            )
            frames = dict(aligned.alignments)  # of each token the last one
            attended = [frames.get(len(begun) + number, n_frame) for number in range(len(new))]
            n = next((number for number, frame in enumerate(attended) if frame >= n_frame - FRAMES), len(new))
            n = self.whole_words(new, n)
            self.tokens += new[:n]
            self.frames += [self.start + frame / 50 for frame in attended[:n]]
            self.tentative = tokenizer.decode(new[n:])
        else:
            self.tentative = ""
        self.settled = tokenizer.decode(self.tokens)
        if len(self.audio) > N_SAMPLES - 5 * SAMPLE_RATE or len(self.tokens) - self.n_cut > MOST:
            self.drop()

    def whole_words(self, tokens: list[int], n: int) -> int:
        """Returns n, or less where a word would be cut."""
        _, words = self.tokenizer.split_to_word_tokens([*tokens, self.tokenizer.eot])
        ends = np.cumsum([len(word) for word in words])
        return int(max((end for end in ends if end <= n), default=0))

    def drop(self) -> None:
        """Drops the audio of the first sentences, and of all settled text where there is no end of one."""
        own = range(self.n_cut + 1, len(self.tokens))
        half = self.start + len(self.audio) / SAMPLE_RATE / 2
        ends = [n for n in own if self.tokenizer.decode([self.tokens[n - 1]]).strip()[-1:] in (".", "?", "!")]
        at = max((n for n in ends if self.frames[n - 1] <= half), default=len(self.tokens))
        if at:
            self.n_cut = at
            self.cut(max(self.frames[at - 1] + 0.1, self.start))
