"""All that is said of a window: tokens and words, and with derived budgets the log-probability of the text, and the
probabilities that there is no speech, of every language, and of every word; of a transcript's windows the first two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from whisper import timing
from whisper.audio import N_FRAMES, N_SAMPLES, log_mel_spectrogram, pad_or_trim
from whisper.decoding import DecodingOptions, DecodingResult, DecodingTask
from whisper.model import Whisper as OpenAIWhisper
from whisper.timing import WordTiming
from whisper.tokenizer import Tokenizer

from maxwhisper import alignment
from maxwhisper.audio import spectrogram
from maxwhisper.compare.tokens import tokenizer_of
from maxwhisper.whisper import Whisper

from .blocks import TWINS
from .chain import logits_of, pytorch_logits, pytorch_mel
from .judge import UNIT_ROUNDOFF, Comparison, Judgement, condition, judge, judge_by_condition
from .models import FIXTURE
from .transcripts import SEED, Transcript, options_of, transcribed
from .verdicts import Verdicts

DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "2 beams": {"beam_size": 2},
    "7 beams": {"beam_size": 7, "patience": 2.0, "length_penalty": 0.5},
    "drawn": {"temperature": 0.5},
    "best of 3": {"temperature": 1.0, "best_of": 3},
    "prompt": {"prompt": " Thomas remembered seven old elephants."},
    "no timestamps": {"without_timestamps": True},
    "between others": {},
    "between others, 3 beams": {"beam_size": 3},
}
"""Options of `decode` by the name of a way to decode."""
BETWEEN_OTHERS = "between others"
"""How ways begin in which the subject decodes the window in a batch, and PyTorch alone."""


@dataclass(frozen=True)
class Window:
    """What one side says of a window. languages: the probability of each, by alphabet. words: as they are timed."""

    result: DecodingResult
    languages: Tensor
    words: list[WordTiming]

    @property
    def text(self) -> tuple[object, ...]:
        """Returns what must be the same of it."""
        r = self.result
        words = [(word.word, word.start, word.end) for word in self.words]
        return r.language, r.tokens, r.text, r.temperature, r.compression_ratio, words

    @property
    def numbers(self) -> list[Tensor]:
        """Returns what is judged: the log-probability of the text, the probabilities of no speech, of languages, and of
        words where there are any."""
        own = [torch.tensor([number]) for number in (self.result.avg_logprob, self.result.no_speech_prob)]
        words = [torch.tensor([word.probability for word in self.words])] if self.words else []
        return [*own, self.languages, *words]


def decoded(model: OpenAIWhisper, mel: Tensor, options: dict[str, Any], others: Sequence[Tensor] = ()) -> Window:
    """Decodes a window, mel (n_mels, 3000), with PyTorch's generator seeded. others: of which the batch has the first
    before the window, and the rest behind it."""
    place = len(others[:1])
    features = model.embed_audio(torch.stack([*others[:1], mel, *others[1:]]).to(model.device))
    probabilities = model.detect_language(features)[1][place]
    torch.manual_seed(SEED)
    result = model.decode(features, DecodingOptions(fp16=False, **options))[place]
    find_alignment = alignment.find_alignment if isinstance(model, Whisper) else timing.find_alignment
    tokenizer = tokenizer_of(model.dims, result.language)
    words = find_alignment(model, tokenizer, words_of(tokenizer, result.tokens), mel.to(model.device), mel.shape[-1])
    return Window(result, torch.tensor([probabilities[code] for code in sorted(probabilities)]), words)


@dataclass(frozen=True)
class TranscriptWindow:
    """What one side's transcript says of one of its windows, which begins at the frame `seek`."""

    seek: int
    options: DecodingOptions
    tokens: list[int]
    avg_logprob: float
    no_speech_prob: float

    @property
    def text(self) -> tuple[object, ...]:
        """Returns what must be the same of it."""
        return self.seek, self.options.language, self.options.prompt, self.tokens


def windows_of(model: OpenAIWhisper, audio: np.ndarray, decoding: str) -> list[TranscriptWindow]:
    """Transcribes audio, (samples,), in every window of which something must be said, at temperature 0."""
    decode, calls = type(model).decode, []

    def recorded(model: OpenAIWhisper, mel: Tensor, options: DecodingOptions) -> DecodingResult:
        calls.append((options, decode(model, mel, options)))
        return calls[-1][1]

    with patch.object(type(model), "decode", recorded):
        segments = transcribed(model, audio, options_of(decoding))["segments"]
    said = dict.fromkeys((each["seek"], each["avg_logprob"], each["no_speech_prob"]) for each in segments)
    return [
        TranscriptWindow(seek, options, result.tokens, avg_logprob, no_speech_prob)
        for (options, result), (seek, avg_logprob, no_speech_prob) in zip(calls, said, strict=True)
    ]


@dataclass(frozen=True)
class Judge:
    """PyTorch Whisper in float64 and in float32 with the same weights; verdicts: those of earlier runs, if kept."""

    oracle: OpenAIWhisper
    peer: OpenAIWhisper
    verdicts: Verdicts | None

    def compare(
        self, subject: Whisper, clip: str, audio: np.ndarray, decoding: str, others: Sequence[np.ndarray] = ()
    ) -> Transcript:
        """Judges what the subject says of the first window of audio, (samples,). others: audio whose first windows are
        in one batch with it where the way to decode says so."""
        windows = [torch.from_numpy(pad_or_trim(each, N_SAMPLES)) for each in (audio, *others)]
        if not decoding.startswith(BETWEEN_OTHERS):
            windows = windows[:1]
        window, *_ = windows
        mel, *beside = (spectrogram(subject.network["log_mel"], each) for each in windows)
        ours = decoded(subject, mel, DECODING[decoding], beside)
        comparison = Comparison(FIXTURE, torch.float32, f"decode, {decoding}", 0, clip, str(subject.device))
        numbers = dict(zip(("logprob", "speech", "languages", "words"), ours.numbers, strict=False))
        tensors = {"audio": window, repr(ours.text): torch.tensor(ours.result.tokens), **numbers}
        found = self.recalled(comparison, tensors, partial(self.judged, comparison, window, ours))
        return Transcript(clip, decoding, found.passed, len(ours.result.tokens), "" if found.passed else str(found))

    def compare_transcript(self, subject: Whisper, clip: str, audio: np.ndarray, decoding: str) -> Transcript:
        """Judges what the subject's transcript of audio, (samples,), says of each of its windows."""
        ours, sound = windows_of(subject, audio, decoding), torch.from_numpy(audio)
        comparison = Comparison(FIXTURE, torch.float32, f"transcribe, {decoding}", 0, clip, str(subject.device))
        logprob, speech = numbers_of_windows(ours)
        texts = repr([window.text for window in ours])
        tensors = {"audio": sound, texts: torch.tensor(len(ours)), "logprob": logprob, "speech": speech}
        found = self.recalled(comparison, tensors, partial(self.judged_windows, comparison, sound, decoding, ours))
        n_token = sum(len(window.tokens) for window in ours)
        return Transcript(clip, comparison.block, found.passed, n_token, "" if found.passed else str(found))

    def recalled(
        self, comparison: Comparison, tensors: dict[str, Tensor], judged: Callable[[], Judgement]
    ) -> Judgement:
        """Returns the verdict of an earlier run on the same tensors, where there is one."""
        if self.verdicts and comparison.device == "cpu":
            (found,) = self.verdicts.recalled(str(comparison), tensors, lambda: [judged()])
            return found
        return judged()

    def judged(self, comparison: Comparison, window: Tensor, ours: Window) -> Judgement:
        """Returns the verdict; of another text than PyTorch's, no number is compared."""
        options = DECODING[comparison.block.partition(", ")[2]]
        theirs = decoded(self.peer, log_mel_spectrogram(window, self.peer.dims.n_mels), options)
        if ours.text != theirs.text:
            return Judgement(comparison, (), (f"MAX {ours.text}, PyTorch {theirs.text}",))
        task = DecodingTask(self.peer, DecodingOptions(fp16=False, **options, language=theirs.result.language))
        tokens = theirs.result.tokens
        formula, logits = partial(numbers_of, task, tokens), self.logits(task, window, tokens)
        return self.verdict(comparison, formula, logits, theirs.numbers, ours.numbers)

    def judged_windows(
        self, comparison: Comparison, audio: Tensor, decoding: str, ours: list[TranscriptWindow]
    ) -> Judgement:
        """Returns the verdict on a transcript's windows; of other texts than PyTorch's, no number is compared."""
        theirs = windows_of(self.peer, audio.numpy(), decoding)
        if [window.text for window in ours] != [window.text for window in theirs]:
            return Judgement(comparison, (), (f"windows: MAX {ours}, PyTorch {theirs}",))
        mel = pytorch_mel(self.oracle, torch.nn.functional.pad(audio, (0, N_SAMPLES)), torch.float64)
        content, tasks, logits = mel[:, :-N_FRAMES], {}, {}
        for window in theirs:
            frames = pad_or_trim(content[:, window.seek : window.seek + N_FRAMES], N_FRAMES)
            tasks[str(window.seek)] = task = DecodingTask(self.peer, window.options)
            text = torch.tensor([[*task.initial_tokens, *window.tokens, task.tokenizer.eot]])
            logits[str(window.seek)] = logits_of(self.oracle, frames, text, torch.float64)[0]

        def formula(logits: dict[str, Tensor]) -> list[Tensor]:
            said = [said_of(tasks[str(w.seek)], w.tokens, logits[str(w.seek)]) for w in theirs]
            return [torch.cat(numbers) for numbers in zip(*said, strict=True)]

        return self.verdict(comparison, formula, logits, numbers_of_windows(theirs), numbers_of_windows(ours))

    def verdict(
        self,
        comparison: Comparison,
        formula: Callable[[dict[str, Tensor]], list[Tensor]],
        logits: dict[str, Tensor],
        theirs: list[Tensor],
        ours: list[Tensor],
    ) -> Judgement:
        """Judges numbers that a formula makes of the oracle's logits."""
        verdict = partial(
            judge,
            *(comparison, formula(logits), theirs, ours),
            longest_reduction=self.peer.dims.n_vocab,
            roundings=TWINS["decoder.prefill"].roundings(self.peer.dims),
            chained=True,
        )
        return judge_by_condition(verdict, lambda: condition(formula, logits, UNIT_ROUNDOFF[torch.float32]))

    def logits(self, task: DecodingTask, window: Tensor, tokens: list[int]) -> dict[str, Tensor]:
        """Returns the oracle's logits at every position of prompt and text, those that languages are detected by, and
        those of the text alone, by which words are found."""
        known = task.tokenizer
        texts = {
            "text": [*task.initial_tokens, *tokens, known.eot],
            "start": [known.sot, known.eot],
            "words": [*known.sot_sequence_including_notimestamps, *words_of(known, tokens), known.eot],
        }
        return {
            name: pytorch_logits(self.oracle, window, torch.tensor([text]), torch.float64)[0]
            for name, text in texts.items()
        }


def numbers_of(task: DecodingTask, tokens: list[int], logits: dict[str, Tensor]) -> list[Tensor]:
    """Returns `Window.numbers` by openai-whisper's formulas and filters, in the dtype of the logits."""
    known = task.tokenizer
    tokens_of = dict(zip(known.all_language_codes, known.all_language_tokens, strict=True))
    languages = logits["start"][0, [tokens_of[code] for code in sorted(tokens_of)]].softmax(-1)
    words = [word_probabilities(known, tokens, logits["words"])] if words_of(known, tokens) else []
    return [*said_of(task, tokens, logits["text"]), languages, *words]


def numbers_of_windows(windows: Sequence[TranscriptWindow]) -> list[Tensor]:
    """Returns the log-probability of every window's text, and the probability of every one that there is no speech."""
    return [torch.tensor([getattr(each, name) for each in windows]) for name in ("avg_logprob", "no_speech_prob")]


def said_of(task: DecodingTask, tokens: list[int], logits: Tensor) -> list[Tensor]:
    """Returns log-probability and probability of no speech, each (1,), of logits (token, vocab) of prompt and text."""
    speech = logits[task.sot_index].softmax(-1)[[task.tokenizer.no_speech]]
    return [avg_logprob(task, tokens, logits), speech]


def avg_logprob(task: DecodingTask, tokens: list[int], logits: Tensor) -> Tensor:
    """Returns the mean log-probability (1,) of a text and its end, of logits (token, vocab) of prompt and text."""
    text = torch.tensor([[*task.initial_tokens, *tokens, task.tokenizer.eot]])
    left = logits[task.sample_begin - 1 :].clone()
    for position in range(len(left)):
        for each in task.logit_filters:
            each.apply(left[position : position + 1], text[:, : task.sample_begin + position])
    return left.log_softmax(-1).gather(1, text[0, task.sample_begin :, None]).sum(0) / (len(tokens) + 1)


def words_of(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Returns a text without its timestamps."""
    return [token for token in tokens if token < tokenizer.eot]


def word_probabilities(tokenizer: Tokenizer, tokens: list[int], logits: Tensor) -> Tensor:
    """Returns every word's probability, the mean of its tokens', by openai-whisper's formula: of logits (token, vocab)
    after the start, the text and its end, among the tokens of text."""
    text = words_of(tokenizer, tokens)
    of_text = logits[len(tokenizer.sot_sequence) :, : tokenizer.eot].softmax(-1)
    probabilities = of_text[torch.arange(len(text)), torch.tensor(text, dtype=torch.int64)]
    lengths = [len(word) for word in tokenizer.split_to_word_tokens([*text, tokenizer.eot])[1]][:-1]
    return torch.stack([some.mean() for some in probabilities.split(lengths)])
