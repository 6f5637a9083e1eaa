"""python -m reference.perf.live: how late live text is, and how good, beside the same policies on faster-whisper.

Clips are played at their own pace, on a clock that is not the machine's: whatever listens is given what was said until
then, and the clock goes on by the time that it takes, processor time or, if that is less, real time, so that what else
the machine does is not charged. Behind each clip there is a second and a half of silence.

A word is late by the time from its end in the audio, where `transcribe` with word_timestamps finds it, until it is
settled. Those that are not in that transcript are not counted here, but in the word error rate.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from maxwhisper.audio import SAMPLE_RATE, load_audio
from maxwhisper.compare.material import checkpoint_for
from maxwhisper.compare.run import machine
from maxwhisper.compare.scores import word_error_rate
from maxwhisper.live import POLICIES, Session
from maxwhisper.live.hypotheses import hypothesis, prepare
from maxwhisper.whisper import Whisper

from ..activations import CLIPS
from ..fixtures import FIXTURES, NANO

BLOCK = SAMPLE_RATE // 10
"""Samples that a microphone gives at a time."""
SILENCE = np.zeros(SAMPLE_RATE * 3 // 2, np.float32)
TOKENS = 40
"""Tokens that are decoded where the time of one hypothesis is measured."""


class Listener(Protocol):
    """Something that is given audio and has text."""

    settled: str
    tentative: str

    def feed(self, samples: np.ndarray) -> None:
        """Takes the next samples."""


@runtime_checkable
class Ending(Protocol):
    """Something that leaves words unsettled in a silence, until it is told that no audio comes."""

    def end(self) -> None:
        """Settles what is left."""


@dataclass(frozen=True)
class Clip:
    """A clip to play. words: of the offline transcript, each with its end in seconds."""

    audio: np.ndarray
    text: str
    language: str
    offline: str
    words: list[tuple[str, float]]


@dataclass
class Played:
    """What was shown of a clip: of each settled word when it was settled, and when first shown as what it became."""

    settled: str = ""
    words: list[str] = field(default_factory=list)
    settled_at: list[float] = field(default_factory=list)
    shown_at: list[float] = field(default_factory=list)
    revised: int = 0
    compute: float = 0.0
    seconds: float = 0.0


def main() -> None:
    """Measures, prints the figures, and writes them to `--json`."""
    parser = argparse.ArgumentParser("python -m reference.perf.live", description="Measure live text.")
    parser.add_argument("--model", default=str(NANO), help="a checkpoint; of random:SIZE one hypothesis is timed")
    parser.add_argument("--clips", type=int, metavar="N", help="the first N clips alone")
    parser.add_argument("--ways", default="", metavar="WORD", help="those alone whose names hold it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    model = Whisper(checkpoint_for(options.model))
    prepare(model)
    figures: dict[str, Any] = {"machine": machine(), "model": Path(options.model).name}
    figures["seconds of a hypothesis"] = time_of_one(model)
    if not options.model.startswith("random:"):
        clips = list(clips_of(model))[: options.clips]
        figures["a minute of silence, s of computing"] = silence(model)
        figures["finish, s of computing per s"] = finishing(model, clips)
        figures["ways"] = {
            name: measured(name, way, clips) for name, way in ways(model, options.model) if options.ways in name
        }
    print(json.dumps({name: value for name, value in figures.items() if name != "ways"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def clips_of(model: Whisper) -> Iterator[Clip]:
    """Yields the clips with speech, and what `transcribe` makes of them."""
    for clip in CLIPS:
        if not clip["no_speech"]:
            audio = load_audio(FIXTURES / clip["file"])
            result = model.transcribe(audio, language=clip["language"], word_timestamps=True)
            words = [(normalized(word["word"]), word["end"]) for each in result["segments"] for word in each["words"]]
            text = model.transcribe(audio, language=clip["language"])["text"]
            yield Clip(audio, clip["text"], clip["language"], text, words)


def ways(model: Whisper, name: str) -> Iterator[tuple[str, Callable[..., Listener]]]:
    """Yields what is compared, by name: from a language to what listens."""
    for policy, make in POLICIES.items():
        yield f"maxwhisper, {policy}", partial(Session, model, make)
    if installed("faster_whisper"):
        from .live_peers import peers

        yield from peers(name)
        if installed("whisperlivekit"):
            from .live_kit import kit

            yield from kit(name)


def installed(package: str) -> bool:
    """Returns whether a package is, and says so if it is not."""
    found = find_spec(package) is not None
    if not found:
        print(f"{package}: not installed, left out", flush=True)
    return found


def measured(name: str, way: Callable[..., Listener], clips: Sequence[Clip]) -> dict[str, float]:
    """Plays all clips, and prints and returns the figures."""
    played = [play(way(language=clip.language), clip.audio) for clip in clips]
    late, first = [], []
    for clip, each in zip(clips, played, strict=True):
        for word, (_, end) in matching(each.words, clip.words):
            late.append(each.settled_at[word] - end)
            first.append(each.shown_at[word] - end)
    texts, languages = [clip.text for clip in clips], [clip.language for clip in clips]
    live = word_error_rate(texts, [each.settled for each in played], languages)
    offline = word_error_rate(texts, [clip.offline for clip in clips], languages)
    assert live is not None and offline is not None and late
    figures = dict(zip(("median", "p95", "p99"), np.percentile(late, [50, 95, 99]).tolist(), strict=True))
    figures |= {"first shown, median": float(np.median(first)), "first shown, p95": float(np.percentile(first, 95))}
    figures["revisions per word"] = sum(each.revised for each in played) / sum(len(each.words) for each in played)
    figures |= {"word error rate": 100 * live, "more than offline": 100 * (live - offline)}
    figures["compute per s"] = sum(each.compute for each in played) / sum(each.seconds for each in played)
    print(f"{name:40}", *(f"{key} {value:.2f}" for key, value in figures.items()), sep="  ", flush=True)
    return figures


def play(listener: Listener, audio: np.ndarray) -> Played:
    """Plays audio to what listens, and notes what it shows when."""
    audio = np.concatenate([audio, SILENCE])
    found = Played(seconds=len(audio) / SAMPLE_RATE)
    now, at, shown = 0.0, 0, list[str]()
    first_shown: list[float] = []
    while at < len(audio):
        now = max(now, min(at + BLOCK, len(audio)) / SAMPLE_RATE)
        end = min(len(audio), int(now * SAMPLE_RATE))
        taken = cost(partial(listener.feed, audio[at:end]))
        now, at, found.compute = now + taken, end, found.compute + taken
        before, shown = shown, words_in(listener.settled + listener.tentative)
        kept = [number < len(before) and before[number] == word for number, word in enumerate(shown)]
        first_shown = [first_shown[number] if same else now for number, same in enumerate(kept)]
        found.revised += len(before) - sum(kept)
        found.words = words_in(listener.settled)
        found.settled_at += [now] * (len(found.words) - len(found.settled_at))
        found.shown_at += first_shown[len(found.shown_at) : len(found.words)]
    if isinstance(listener, Ending):
        listener.end()
        found.words = words_in(listener.settled)
        found.settled_at += [now] * (len(found.words) - len(found.settled_at))
        found.shown_at += [now] * (len(found.words) - len(found.shown_at))
    found.settled = listener.settled
    return found


def cost(work: Callable[[], object]) -> float:
    """Returns the seconds that work takes: of processors, or real ones if these are fewer."""
    real, processor = time.perf_counter(), time.process_time()
    work()
    return min(time.perf_counter() - real, time.process_time() - processor)


def matching(words: Sequence[str], offline: Sequence[tuple[str, float]]) -> Iterator[tuple[int, tuple[str, float]]]:
    """Yields the numbers of words that are in the offline transcript too, with what they are there."""
    matcher = SequenceMatcher(None, words, [word for word, _ in offline], autojunk=False)
    for block in matcher.get_matching_blocks():
        for number in range(block.size):
            yield block.a + number, offline[block.b + number]


def words_in(text: str) -> list[str]:
    return [word for each in text.split() if (word := normalized(each))]


def normalized(word: str) -> str:
    return "".join(character for character in word.lower() if character.isalnum())


def silence(model: Whisper) -> float:
    """Returns the seconds of computing for a minute in which nobody speaks, at -70 dB."""
    session = Session(model)
    minute = (3e-4 * np.random.default_rng(0).standard_normal(60 * SAMPLE_RATE)).astype(np.float32)
    return sum(cost(partial(session.feed, minute[at : at + BLOCK])) for at in range(0, len(minute), BLOCK))


def finishing(model: Whisper, clips: Sequence[Clip]) -> float:
    """Returns the seconds of computing from the end of the audio to the transcript, by the seconds of the longest
    clip."""
    audio = max((clip.audio for clip in clips), key=len)
    session = Session(model)
    session.skip(audio)
    return cost(session.finish) / (len(audio) / SAMPLE_RATE)


def time_of_one(model: Whisper) -> float:
    """Returns the seconds for one hypothesis of a window: the least of five, of so many tokens whatever they are."""
    audio = torch.from_numpy(load_audio(FIXTURES / "clips" / "english-5.flac"))

    def one() -> None:
        hypothesis(model, audio, [], [], language="en", sample_len=TOKENS)

    return min(cost(one) for _ in range(5))


if __name__ == "__main__":
    main()
