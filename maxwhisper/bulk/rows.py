"""What is written of each input: a row, with its transcript or its error."""

import math
from typing import Any

import pyarrow as pa

SEGMENT = {
    "id": pa.int32(),
    "seek": pa.int32(),
    "start": pa.float64(),
    "end": pa.float64(),
    "text": pa.string(),
    "tokens": pa.list_(pa.int32()),
    "temperature": pa.float64(),
    "avg_logprob": pa.float64(),
    "compression_ratio": pa.float64(),
    "no_speech_prob": pa.float64(),
}
WORD = {
    "segment": pa.int32(),
    "word": pa.string(),
    "start": pa.float64(),
    "end": pa.float64(),
    "probability": pa.float64(),
}
ROW = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "duration": pa.float64(),
        "language": pa.string(),
        "text": pa.string(),
        "segments": pa.list_(pa.struct(SEGMENT)),
        "words": pa.list_(pa.struct(WORD)),
        "warnings": pa.list_(pa.string()),
        "error": pa.string(),
        "transient": pa.bool_(),
        "decode_seconds": pa.float64(),
        "transcribe_seconds": pa.float64(),
    }
)
"""duration: seconds of audio. segments: those of `transcribe`, but for their words, which are the rows of `words`, with
the id of their segment; null if they were not asked for. transient: whether the error may pass. transcribe_seconds: of
the model's time, which recordings that decode together share by their durations."""


def row_of(source: dict[str, Any], duration: float | None, result: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the row of an input, source: its id, path, warnings, error and seconds; result: of `transcribe`."""
    row: dict[str, Any] = dict.fromkeys(ROW.names) | {name: source[name] for name in ROW.names if name in source}
    if result is None:
        return row | {"duration": duration}
    segments = result["segments"]
    with_words = [segment for segment in segments if "words" in segment]
    return row | {
        "duration": duration,
        "language": result["language"],
        "text": result["text"],
        "segments": [{name: segment[name] for name in SEGMENT} for segment in segments],
        "words": [{"segment": segment["id"], **word} for segment in with_words for word in segment["words"]]
        if with_words
        else None,
    }


def for_json(value: Any) -> Any:
    """Returns a value of a row as JSON can have it: null where a number is not finite."""
    if isinstance(value, dict):
        return {name: for_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [for_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
