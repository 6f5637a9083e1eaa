"""Whole transcripts of every clip: the same tokens, times and words as openai-whisper's."""

from typing import Any

import pytest
import whisper

import maxwhisper
from reference.activations import CLIPS
from reference.results import Run
from reference.transcripts import DECODING, PIPELINE_FAULTS, compare


@pytest.fixture(scope="module")
def subject(checkpoint_path: str, loading: dict[str, Any]) -> maxwhisper.Whisper:
    return maxwhisper.load_model(checkpoint_path, **loading)


@pytest.fixture(scope="module")
def peer(checkpoint_path: str, subject: maxwhisper.Whisper) -> whisper.model.Whisper:
    """openai-whisper with the same weights, whatever the checkpoint's format."""
    checkpoint = maxwhisper.load_checkpoint(checkpoint_path)
    model = whisper.model.Whisper(checkpoint.dims)
    model.load_state_dict({name: tensor.float() for name, tensor in checkpoint.tensors.items()})
    model.register_buffer("alignment_heads", subject.alignment_heads, persistent=False)
    return model.eval().to(subject.device)


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip["file"])
def test_transcript(
    subject: maxwhisper.Whisper, peer: whisper.model.Whisper, clip: dict, decoding: str, run: Run
) -> None:
    transcript = compare(subject, peer, clip["file"], decoding)
    run.transcripts.append(transcript)
    assert transcript.equal, transcript.difference
    assert transcript.n_compared or clip["no_speech"], "equal transcripts prove little if both are empty"


@pytest.mark.parametrize("fault", PIPELINE_FAULTS)
def test_a_wrong_pipeline_shows(subject: maxwhisper.Whisper, peer: whisper.model.Whisper, fault: str) -> None:
    """On the clip that is longer than a window."""
    longer = max(CLIPS, key=lambda clip: clip["duration"])["file"]
    with PIPELINE_FAULTS[fault]():
        assert not compare(subject, peer, longer, "greedy").equal
