"""Whole transcripts of every clip: the same tokens, times and words as openai-whisper's."""

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


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip["file"])
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
