"""Where in a recording somebody speaks, by a voice-activity detector (Silero's), and transcription of that alone."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from whisper.audio import FRAMES_PER_SECOND, SAMPLE_RATE
from whisper.utils import make_safe

from .audio import as_waveform
from .errors import OptionError
from .options import within
from .rebind import Segments
from .subtitles import as_line

CHUNK = 512
"""Samples that the detector hears at a time."""
SPEECH, SILENCE = 0.5, 0.35
"""Speech begins at the one probability and ends below the other, as Silero's own detector has it."""
LEFT_OUT = 2 * SAMPLE_RATE // CHUNK + 1
"""Chunks, from 2 s on, of silence that `vad_filter` leaves out, as in faster-whisper."""
AROUND = 2 * SAMPLE_RATE // 5
"""Samples, 0.4 s, of silence that it keeps before and behind speech, as faster-whisper does."""

Span = tuple[int, int]
"""First and end, of chunks or of samples."""


def probabilities(audio: np.ndarray) -> np.ndarray:
    """Returns how likely each CHUNK of the audio, float32 (samples,) at 16 kHz, is speech; the last one is padded.

    Raises OptionError if the detector is not installed.
    """
    n_thread = torch.get_num_threads()
    try:
        from silero_vad import load_silero_vad

        detector = load_silero_vad(sequence=True)
    except ImportError as error:
        missing = "cutting at silences needs silero-vad and onnxruntime: pip install 'maxwhisper[batched]'"
        raise OptionError(missing) from error
    finally:
        torch.set_num_threads(n_thread)  # which importing silero_vad sets to one
    return detector.audio_forward(audio)


def speech(found: Sequence[float] | np.ndarray, shortest_silence: int) -> list[Span]:
    """Finds where speech is, by the probabilities of all chunks, with at least `shortest_silence` chunks in between."""
    spans: list[Span] = []
    start = end = None
    for i, probability in enumerate(found):
        if probability >= SPEECH:
            start, end = i if start is None else start, None
        elif probability < SILENCE and start is not None:
            end = i if end is None else end
            if i - end >= shortest_silence:
                spans.append((start, end))
                start = end = None
    return spans if start is None else [*spans, (start, len(found))]


def with_margins(spans: Sequence[Span], length: int, margin: int) -> list[Span]:
    """Returns the spans with so much silence around each, of which neighbours share what is between them."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), length]
    gaps = [start - end for end, start in zip(ends, starts, strict=True)]
    outer = {0, len(spans)}
    margins = [min(margin, gap if i in outer else gap // 2) for i, gap in enumerate(gaps)]
    return [(start - margins[i], end + margins[i + 1]) for i, (start, end) in enumerate(spans)]


class Kept:
    """The parts of a recording in which somebody speaks, put together."""

    def __init__(self, audio: np.ndarray):
        """Finds them in float32 (samples,) at 16 kHz; raises OptionError if the detector is not installed."""
        chunks = speech(probabilities(audio), LEFT_OUT)
        spans = [(start * CHUNK, min(end * CHUNK, len(audio))) for start, end in chunks]
        self.spans = with_margins(spans, len(audio), AROUND)
        self.audio = np.concatenate([audio[:0], *(audio[start:end] for start, end in self.spans)])
        lengths = [end - start for start, end in self.spans]
        self.ends = [int(end) for end in np.cumsum(lengths)]
        self.moved = [end - kept for (_, end), kept in zip(self.spans, self.ends, strict=True)]

    def part_at(self, seconds: float, is_end: bool = False) -> int:
        """Returns the number of the part in which a time lies; between two that of the next, but for an end."""
        sample = int(seconds * SAMPLE_RATE)
        if is_end and sample in self.ends:
            return self.ends.index(sample)
        return min(bisect_right(self.ends, sample), len(self.ends) - 1)

    def in_recording(self, seconds: float, part: int) -> float:
        """Returns where a time of a part is in the recording."""
        return round(seconds + self.moved[part] / SAMPLE_RATE, 2)

    def restored(self, segment: dict[str, Any]) -> dict[str, Any]:
        """Returns a segment with the times of the recording; a word lies in the part where its middle is."""
        start, end, seek = segment["start"], segment["end"], segment["seek"] / FRAMES_PER_SECOND
        times = {
            "start": self.in_recording(start, self.part_at(start)),
            "end": self.in_recording(end, self.part_at(end, is_end=start < end)),
            "seek": round(self.in_recording(seek, self.part_at(seek)) * FRAMES_PER_SECOND),
        }
        if words := [self.restored_word(word) for word in segment.get("words", ())]:
            times |= {"words": words, "start": words[0]["start"], "end": words[-1]["end"]}
        return segment | times

    def restored_word(self, word: dict[str, Any]) -> dict[str, Any]:
        part = self.part_at((word["start"] + word["end"]) / 2)
        return word | {name: self.in_recording(word[name], part) for name in ("start", "end")}


class Transcribing(Protocol):
    def transcribe(self, audio: np.ndarray, **options: Any) -> dict[str, Any]: ...


def transcribe_speech(
    model: Transcribing,
    audio: np.ndarray | torch.Tensor,
    progress: Callable[[float], None] | None = None,
    on_segments: Callable[[Segments], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Transcribes as `Whisper.transcribe` does, with its options and result, but only where somebody speaks.

    Raises OptionError for clip_timestamps, and if the voice-activity detector is not installed.
    """
    whole = as_waveform(audio).numpy()
    if within(options.pop("clip_timestamps", "0"), len(whole)) not in ([], [0.0]):
        raise OptionError("clip_timestamps cannot be combined with vad_filter")
    kept = Kept(whole)
    prints = options.get("verbose")
    if prints:
        # The language is printed, and no segments, which have the times of what is kept; nor a bar.
        options["verbose"], progress = False, progress or (lambda _: None)

    def tell(segments: Segments) -> None:
        restored = [kept.restored(segment) for segment in segments]
        for segment in restored if prints else ():
            print(make_safe(as_line(segment)), flush=True)
        if on_segments:
            on_segments(restored)

    if progress:
        progress((len(whole) - len(kept.audio)) / SAMPLE_RATE)
    result = model.transcribe(kept.audio, progress=progress, on_segments=tell, **options)
    return result | {"segments": [kept.restored(segment) for segment in result["segments"]]}
