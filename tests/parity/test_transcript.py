"""Whole transcripts of every clip: the same tokens, times and words as openai-whisper's."""

from collections.abc import Iterator
from typing import Any

import pytest
import whisper

import maxwhisper
from reference.activations import CLIPS
from reference.results import Run
from reference.transcripts import DECODING, PIPELINE_FAULTS, Yardstick, compare


@pytest.fixture(scope="module")
def subject(checkpoint_path: str, loading: dict[str, Any]) -> maxwhisper.Whisper:
    return maxwhisper.load_model(checkpoint_path, **loading)


@pytest.fixture(scope="module")
def peer(checkpoint_path: str, subject: maxwhisper.Whisper, pytestconfig: pytest.Config) -> Yardstick:
    """openai-whisper with the same weights, whatever the checkpoint's format; its transcripts of an earlier run, unless
    pytest was told to forget them (--cache-clear) or to have no cache (-p no:cacheprovider)."""
    checkpoint = maxwhisper.load_checkpoint(checkpoint_path)
    model = whisper.model.Whisper(checkpoint.dims)
    model.load_state_dict({name: tensor.float() for name, tensor in checkpoint.tensors.items()})
    model.register_buffer("alignment_heads", subject.alignment_heads, persistent=False)
    return Yardstick(model.eval().to(subject.device), getattr(pytestconfig, "cache", None))


AT_NIGHT = {
    "clips/english-longer.ogg": ("beam", "beam, no timestamps", "words"),
    "clips/english-long.mp3": ("beam, no timestamps",),
}
"""By clip of several windows, the ways to decode that every merge sees on the other one, or on clips of one window."""


def cases() -> Iterator[Any]:
    for clip in CLIPS:
        for decoding in DECODING:
            marks = [pytest.mark.nightly] if decoding in AT_NIGHT.get(clip["file"], ()) else []
            yield pytest.param(clip, decoding, id=f"{clip['file']}-{decoding}", marks=marks)


@pytest.mark.parametrize(("clip", "decoding"), cases())
def test_transcript(subject: maxwhisper.Whisper, peer: Yardstick, clip: dict, decoding: str, run: Run) -> None:
    transcript = compare(subject, peer, clip["file"], decoding)
    run.transcripts.append(transcript)
    assert transcript.equal, transcript.difference
    assert transcript.n_compared or clip["no_speech"], "equal transcripts prove little if both are empty"


@pytest.mark.parametrize("fault", PIPELINE_FAULTS)
def test_a_wrong_pipeline_shows(subject: maxwhisper.Whisper, peer: Yardstick, fault: str) -> None:
    """On the clip that is longer than a window."""
    longer = max(CLIPS, key=lambda clip: clip["duration"])["file"]
    with PIPELINE_FAULTS[fault]():
        assert not compare(subject, peer, longer, "greedy").equal
