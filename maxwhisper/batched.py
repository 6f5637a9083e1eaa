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
from .options import within
from .speech import CHUNK, Span, probabilities, speech, with_margins

if TYPE_CHECKING:
    from .whisper import Whisper

BATCH_SIZE = 8
"""Pieces that decode together unless the caller says how many."""

SHORTEST_SILENCE = 5
"""Chunks, 0.16 s: what is shorter is within a word."""
MARGIN = 6
"""Chunks, 0.19 s, of silence that a piece keeps before and behind its speech, where there are as many."""
LONGEST = CHUNK_LENGTH * SAMPLE_RATE // CHUNK - 2 * MARGIN
"""Chunks of speech that fit a window of 30 s, with the margins."""


def pieces(found: np.ndarray) -> list[Span]:
    """Returns spans that hold all speech, in order, none longer than a window: as much speech in each as fits. Speech
    without a silence for a whole window is cut in its second half, where it is least likely speech."""
    cut: list[Span] = []
    for start, end in speech(found, SHORTEST_SILENCE):
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
    return with_margins(joined, len(found), MARGIN)


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
    waveform = as_waveform(audio).numpy()
    if within(options.pop("clip_timestamps", "0"), len(waveform)) not in ([], [0.0]):
        raise OptionError("clip_timestamps cannot be combined with cutting at silences")
    options.pop("vad_filter", None)  # silence is left out anyway
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
