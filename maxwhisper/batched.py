"""Long audio cut at silences into pieces that decode as a batch, where openai-whisper takes window after window.

There a window begins where the last timestamp of the one before ended, and is given its text. Here a voice-activity
detector (Silero's) says where speech is, and every piece is transcribed as a recording of
its own, without the text before it, and so with another transcript.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from whisper.audio import CHUNK_LENGTH, FRAMES_PER_SECOND, N_FRAMES, N_SAMPLES, SAMPLE_RATE, pad_or_trim

from .audio import as_waveform, log_mel_spectrogram
from .engine.surroundings import cpu_by_default
from .errors import OptionError

if TYPE_CHECKING:
    from .whisper import Whisper

BATCH_SIZE = 8
"""Pieces that decode together unless the caller says how many."""

CHUNK = 512
"""Samples that the detector hears at a time."""
SPEECH, SILENCE = 0.5, 0.35
"""Speech begins at the one probability and ends below the other, as Silero's own detector has it."""
SHORTEST_SILENCE = 5
"""Chunks, 0.16 s: what is shorter is within a word."""
MARGIN = 6
"""Chunks, 0.19 s, of silence that a piece keeps before and behind its speech, where there are as many."""
LONGEST = CHUNK_LENGTH * SAMPLE_RATE // CHUNK - 2 * MARGIN
"""Chunks of speech that fit a window of 30 s, with the margins."""

Span = tuple[int, int]
"""First chunk and end."""


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


def speech(found: np.ndarray) -> list[Span]:
    """Finds where speech is, by the probabilities of all chunks, with at least SHORTEST_SILENCE in between."""
    spans: list[Span] = []
    start, last = None, 0
    for i, probability in enumerate(found):
        if start is None and probability >= SPEECH:
            start = last = i
        elif start is not None and probability >= SILENCE:
            last = i
        if start is not None and (i - last >= SHORTEST_SILENCE or i == len(found) - 1):
            spans.append((start, last + 1))
            start = None
    return spans


def pieces(found: np.ndarray) -> list[Span]:
    """Returns spans that hold all speech, in order, none longer than a window: as much speech in each as fits. Speech
    without a silence for a whole window is cut in its second half, where it is least likely speech."""
    cut: list[Span] = []
    for start, end in speech(found):
        while end - start > LONGEST:
            middle = start + LONGEST // 2
            at = middle + int(found[middle : start + LONGEST].argmin())
            cut.append((start, at))
            start = at
        cut.append((start, end))
    joined: list[Span] = []
    for start, end in cut:
        if joined and end - joined[-1][0] <= LONGEST:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return with_margins(joined, len(found))


def with_margins(spans: list[Span], n_chunk: int) -> list[Span]:
    """Returns the spans with silence around each, of which neighbours share what is between them."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), n_chunk]
    gaps = [start - end for end, start in zip(ends, starts, strict=True)]
    outer = {0, len(spans)}
    margins = [min(MARGIN, gap if i in outer else gap // 2) for i, gap in enumerate(gaps)]
    return [(start - margins[i], end + margins[i + 1]) for i, (start, end) in enumerate(spans)]


@cpu_by_default()
def transcribe_batched(
    model: "Whisper",
    audio: np.ndarray | torch.Tensor,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[float], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Transcribes as `Whisper.transcribe` does, with its options and result, but each piece by itself.

    The language, if not given, is that of the first piece; None where there is no speech.
    Raises OptionError for clip_timestamps, and if the voice-activity detector is not installed.
    """
    if options.pop("clip_timestamps", "0") not in ("0", [0], [0.0]):
        raise OptionError("clip_timestamps cannot be combined with cutting at silences")
    waveform = as_waveform(audio).numpy()
    spans = [(start * CHUNK, min(end * CHUNK, len(waveform))) for start, end in pieces(probabilities(waveform))]
    if progress:
        progress((len(waveform) - sum(end - start for start, end in spans)) / SAMPLE_RATE)
        options["progress"] = progress
    cut = [waveform[start:end] for start, end in spans]
    if options.get("language") is None and cut:
        options["language"] = language_of(model, cut[0])
    segments: list[dict[str, Any]] = []
    results: dict[int, dict[str, Any]] = {}
    for number, result in model.transcribe_many(cut, batch_size, **options):
        if isinstance(result, Exception):
            raise result
        results[number] = result
    for number, (start, _) in enumerate(spans):
        segments += (moved(segment, start / SAMPLE_RATE) for segment in results[number]["segments"])
    for i, segment in enumerate(segments):
        segment["id"] = i
    text = "".join(results[number]["text"] for number in range(len(spans)))
    return {"text": text, "segments": segments, "language": options.get("language")}


def language_of(model: "Whisper", audio: np.ndarray) -> str:
    if not model.is_multilingual:
        return "en"
    mel = pad_or_trim(log_mel_spectrogram(audio, model.dims.n_mels, padding=N_SAMPLES), N_FRAMES)
    _, found = model.detect_language(mel.to(model.device))
    return max(found, key=found.get)


def moved(segment: dict[str, Any], seconds: float) -> dict[str, Any]:

    def later(timed: dict[str, Any]) -> dict[str, Any]:
        return {**timed, "start": timed["start"] + seconds, "end": timed["end"] + seconds}

    changed = {**later(segment), "seek": segment["seek"] + round(seconds * FRAMES_PER_SECOND)}
    return changed | ({"words": [later(word) for word in segment["words"]]} if "words" in segment else {})
