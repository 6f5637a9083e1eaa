"""Whole transcripts: the same tokens, times and words as PyTorch Whisper's, over every clip."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from whisper.audio import HOP_LENGTH, N_SAMPLES, SAMPLE_RATE
from whisper.model import Whisper as OpenAIWhisper

from maxwhisper.audio import load_audio
from maxwhisper.batched import pieces, transcribe_batched
from maxwhisper.speech import CHUNK, probabilities
from maxwhisper.whisper import AudioEncoder, TextDecoder, Whisper

from . import waveforms
from .fixtures import FIXTURES
from .verdicts import Memory, circumstances, fingerprint

WORDS = "words"
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"beam_size": 5},
    "greedy, no timestamps": {"without_timestamps": True},
    "beam, no timestamps": {"beam_size": 5, "without_timestamps": True},
    WORDS: {"word_timestamps": True},
    "prompt": {"initial_prompt": "Thomas remembered seven old elephants.", "beam_size": 2},
    "drawn": {"temperature": 0.6, "best_of": 2},
    "fallback": {"temperature": (0.0, 0.4, 0.8), "logprob_threshold": -0.45, "best_of": 2},
}
"""Options of openai-whisper's transcribe by the name of a way to decode; "words" compares words and their times.

fallback: the clips are likely by about as much as the threshold, so that some are decoded again.
"""
SEED = 5
"""Seeds PyTorch's generator, so that both draw alike."""


@dataclass(frozen=True)
class Transcript:
    """Whether a clip's whole transcript is PyTorch Whisper's.

    decoding: a key of DECODING. equal: language, text and every segment's start, end, text, tokens, temperature,
    compression ratio, id and seek are the same, or every word's start and end; of a window, all that
    `reference.windows` judges.
    n_compared: how many tokens or words PyTorch's has. difference: the first one, if any.
    """

    clip: str
    decoding: str
    equal: bool
    n_compared: int
    difference: str = ""


MAKERS = ("torch", "openai-whisper", "numpy", "numba", "tiktoken")
"""Packages that make a transcript."""


@dataclass(frozen=True)
class Yardstick:
    """PyTorch Whisper with a memory for its transcripts: nothing that they depend on is under test.

    What they do depend on is in the key: weights, dimensions, alignment heads, samples, options, versions, processor
    features and number of threads. MAX's transcripts are never kept.
    """

    model: OpenAIWhisper
    memory: Memory | None

    @cached_property
    def weights(self) -> str:
        """Returns a hash of everything that makes up the model."""
        heads = self.model.alignment_heads.to_dense()
        return fingerprint(self.model.state_dict() | {"alignment_heads": heads}, repr(self.model.dims))

    def key(self, audio: np.ndarray, options: dict[str, Any]) -> str | None:
        """Returns what the transcript is kept under; None where it is not known all that it depends on."""
        if (under := circumstances(MAKERS)) is None:
            return None
        others = json.dumps(options, sort_keys=True), str(SEED), *under, str(self.model.device)
        return f"maxwhisper/transcripts/{fingerprint({'audio': torch.from_numpy(audio)}, self.weights, *others)}"

    def transcribe(self, audio: np.ndarray, **options: Any) -> dict[str, Any]:
        """Returns openai-whisper's, from memory where it is known."""
        if self.memory is None or (key := self.key(audio, options)) is None:
            return transcribed(self.model, audio, options)
        known = self.memory.get(key, None)
        if known is None:
            known = transcribed(self.model, audio, options)
            self.memory.set(key, known)
        return known


def transcribed(model: Whisper | OpenAIWhisper, audio: Path | np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """Returns a model's transcript, with PyTorch's generator seeded."""
    torch.manual_seed(SEED)
    return model.transcribe(audio, **options)


@cache
def heard(path: Path) -> tuple[Path | np.ndarray, str]:
    """Returns what the subject is given of a file: the file, if in it it hears the samples that the peer is given, and
    else those samples; and by what it hears another sound, if it does."""
    ours, theirs = load_audio(path), waveforms.read(path)
    return path if np.array_equal(ours, theirs) else theirs, waveforms.difference(path, ours)


def compare(subject: Whisper, peer: OpenAIWhisper | Yardstick, clip: str, decoding: str) -> Transcript:
    """Transcribes a clip of fixtures/ with both."""
    given, another_sound = heard(FIXTURES / clip)
    if another_sound:
        return Transcript(clip, decoding, False, 0, f"the loaders of audio differ: {another_sound}")
    options = options_of(decoding)
    theirs = peer.transcribe(waveforms.read(FIXTURES / clip), **options)
    return compared(transcribed(subject, given, options), theirs, clip, decoding)


def compare_many(
    subject: Whisper, peer: OpenAIWhisper | Yardstick, clips: Sequence[str], decoding: str, batch_size: int
) -> Iterator[Transcript]:
    """Transcribes clips of fixtures/, the subject several at a time."""
    options, sounds = options_of(decoding), [waveforms.read(FIXTURES / clip) for clip in clips]
    for number, ours in subject.transcribe_many(sounds, batch_size, **options):
        if isinstance(ours, Exception):
            raise ours
        yield compared(ours, peer.transcribe(sounds[number], **options), clips[number], f"{decoding}, together")


def compare_pieces(subject: Whisper, peer: OpenAIWhisper | Yardstick, clip: str, decoding: str) -> Transcript:
    """Transcribes a clip of fixtures/ in the pieces that it is cut into at silences, the subject as a batch."""
    options, sound = options_of(decoding), waveforms.read(FIXTURES / clip)
    theirs: dict[str, Any] = {"segments": [], "text": ""}
    for start, end in pieces(probabilities(sound)):
        piece = peer.transcribe(sound[start * CHUNK : end * CHUNK], **options)
        for segment in piece["segments"]:
            segment["id"] += len(theirs["segments"])
            segment["seek"] += round(start * CHUNK / HOP_LENGTH)
        for timed in (each for segment in piece["segments"] for each in (segment, *segment.get("words", ()))):
            timed |= {edge: timed[edge] + start * CHUNK / SAMPLE_RATE for edge in ("start", "end")}
        theirs["segments"] += piece["segments"]
        theirs["text"] += piece["text"]
        theirs["language"] = options["language"] = piece["language"]
    return compared(transcribe_batched(subject, sound, **options), theirs, clip, f"{decoding}, in pieces")


def options_of(decoding: str) -> dict[str, Any]:
    return {"temperature": 0.0, "fp16": False, **DECODING[decoding]}


def compared(ours: dict[str, Any], theirs: dict[str, Any], clip: str, decoding: str) -> Transcript:
    """Returns whether a transcript is PyTorch's; of words where `decoding` begins with that."""
    mine, right = parts(ours, decoding), parts(theirs, decoding)
    n_compared = sum(len(part[3]) if not decoding.startswith(WORDS) else 1 for part in right[1:])
    differing = [(i, a, b) for i, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b]
    difference = "".join(f"part {i}: MAX {a}, PyTorch {b}" for i, a, b in differing[:1])
    if not difference and len(mine) != len(right):
        difference = f"MAX has {len(mine)} parts, PyTorch {len(right)}"
    return Transcript(clip, decoding, mine == right, n_compared, difference)


def parts(result: dict[str, Any], decoding: str) -> list[tuple]:
    """Returns the language and the whole text, and every segment or word."""
    whole = result["language"], result["text"]
    if decoding.startswith(WORDS):
        words = [(w["word"], w["start"], w["end"]) for s in result["segments"] for w in s["words"]]
        return [whole, *words]
    same = ("start", "end", "text", "tokens", "temperature", "compression_ratio", "id", "seek")
    return [whole, *(tuple(segment[name] for name in same) for segment in result["segments"])]


# ---- wrong pipelines -----------------------------------------------------------------------------------------------
# All are mistakes of earlier attempts: a transcript shows them that no block does.

TRANSCRIBE, START_OF_LM = 50359, 50360


def replaced(owner: type, name: str, change: Callable[..., Any]) -> Any:
    """Returns the method with `change` called on what it is given; that returns what to give instead."""
    right = getattr(owner, name)
    return patch.object(owner, name, lambda self, *args, **kwargs: right(self, *change(*args), **kwargs))


def random_features() -> Any:
    """Returns what a failed encoding was replaced by."""
    right = AudioEncoder.forward
    return patch.object(AudioEncoder, "forward", lambda self, mel: torch.randn_like(right(self, mel)))


PIPELINE_FAULTS: dict[str, Callable[[], Any]] = {
    "task token 50360 for 50359": lambda: replaced(
        TextDecoder, "forward", lambda x, *others: (torch.where(x == TRANSCRIBE, START_OF_LM, x), *others)
    ),
    "only the first 30 s heard": lambda: replaced(Whisper, "transcribe", lambda audio: (audio[:N_SAMPLES],)),
    "random features": random_features,
}
