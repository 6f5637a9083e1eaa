"""Whole transcripts of every clip: the same tokens, times and words as openai-whisper's."""

import json

import numpy as np
import pytest
import whisper

import maxwhisper
from maxwhisper.audio import load_audio
from reference.suite import FIXTURES

CHECKPOINT = FIXTURES / "nano.pt"
CLIPS = [clip["file"] for clip in json.loads((FIXTURES / "clips.json").read_text())["clips"]]
DECODING = {
    "greedy": {},
    "beam": {"beam_size": 5},
    "greedy, no timestamps": {"without_timestamps": True},
    "beam, no timestamps": {"beam_size": 5, "without_timestamps": True},
}


@pytest.fixture(scope="module")
def subject() -> maxwhisper.Whisper:
    return maxwhisper.load_model(CHECKPOINT)


@pytest.fixture(scope="module")
def peer() -> whisper.Whisper:
    return whisper.load_model(str(CHECKPOINT), device="cpu")


def segments(result: dict) -> list[tuple]:
    return [(s["start"], s["end"], s["text"], s["tokens"]) for s in result["segments"]]


def words(result: dict) -> list[tuple]:
    return [(w["word"], w["start"], w["end"]) for s in result["segments"] for w in s["words"]]


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("clip", CLIPS)
def test_transcript(subject: maxwhisper.Whisper, peer: whisper.Whisper, clip: str, decoding: str) -> None:
    audio = load_audio(FIXTURES / clip)
    options = {"temperature": 0.0, "fp16": False, **DECODING[decoding]}
    ours, theirs = subject.transcribe(audio, **options), peer.transcribe(audio, **options)
    assert ours["language"] == theirs["language"]
    assert segments(ours) == segments(theirs)


@pytest.mark.parametrize("clip", CLIPS)
def test_word_timestamps(subject: maxwhisper.Whisper, peer: whisper.Whisper, clip: str) -> None:
    audio = load_audio(FIXTURES / clip)
    options = {"temperature": 0.0, "fp16": False, "word_timestamps": True}
    ours, theirs = subject.transcribe(audio, **options), peer.transcribe(audio, **options)
    assert words(ours) == words(theirs)


def test_the_clips_are_heard(subject: maxwhisper.Whisper) -> None:
    """Equal transcripts would prove little if both were empty."""
    heard = subject.transcribe(load_audio(FIXTURES / CLIPS[0]), temperature=0.0)
    assert np.isfinite([s["avg_logprob"] for s in heard["segments"]]).all()
    assert heard["text"].strip()
