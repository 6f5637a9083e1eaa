"""Whole transcripts of every clip: the same tokens, times and words as openai-whisper's."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from whisper.audio import CHUNK_LENGTH, mel_filters

import maxwhisper
from maxwhisper.options import DETECTOR
from reference import checkpoints, waveforms, windows
from reference.activations import CLIPS, FIXTURES
from reference.blocks import pytorch_whisper
from reference.fixtures import NANO
from reference.models import CHECKPOINT, trained
from reference.results import Run
from reference.transcripts import DECODING, PIPELINE_FAULTS, Yardstick, compare, compare_many, compare_pieces
from reference.verdicts import Verdicts


@pytest.fixture(scope="module")
def subject(checkpoint_path: str, loading: dict[str, Any]) -> maxwhisper.Whisper:
    return maxwhisper.load_model(checkpoint_path, **loading)


@pytest.fixture(scope="module")
def peer(checkpoint_path: str, subject: maxwhisper.Whisper, pytestconfig: pytest.Config) -> Yardstick:
    """Returns openai-whisper with the same checkpoint; its transcripts of an earlier run, unless pytest was told to
    forget them (--cache-clear) or to have no cache (-p no:cacheprovider)."""
    try:
        model = checkpoints.read(checkpoint_path, subject.dims.n_vocab)
    except checkpoints.UnreadableError:  # tests/parity/test_loading.py says so
        model = pytorch_whisper(*trained(checkpoint_path, CHECKPOINT).weights, torch.float32)
        model.register_buffer("alignment_heads", subject.alignment_heads, persistent=False)
    return Yardstick(model.eval().to(subject.device), getattr(pytestconfig, "cache", None))


def test_alignment_heads(subject: maxwhisper.Whisper, peer: Yardstick) -> None:
    ours = subject.alignment_heads.coalesce().indices().T.tolist()
    found = checkpoints.differing_heads(ours, peer.model)
    assert not found, f"the loaders of weights differ in {found}"


AT_NIGHT = {
    "clips/english-longer.ogg": ("beam", "words"),
}
"""By clip of several windows, the ways to decode that every merge sees on the other one, or on clips of one window."""


SOMETIMES = ("prompt", "drawn", "fallback", "greedy, no timestamps", "beam, no timestamps")
"""Ways to decode that every merge sees on the two clips of two languages that fall back to a temperature."""
FALL_BACK = ("clips/english-3.mp3", "clips/german-1.wav")


def cases() -> Iterator[Any]:
    for clip in CLIPS:
        for decoding in DECODING:
            rare = decoding in SOMETIMES and clip["file"] not in FALL_BACK
            marks = [pytest.mark.nightly] if rare or decoding in AT_NIGHT.get(clip["file"], ()) else []
            yield pytest.param(clip, decoding, id=f"{clip['file']}-{decoding}", marks=marks)


@pytest.mark.parametrize(("clip", "decoding"), list(cases()))
def test_transcript(subject: maxwhisper.Whisper, peer: Yardstick, clip: dict, decoding: str, run: Run) -> None:
    transcript = compare(subject, peer, clip["file"], decoding)
    run.transcripts.append(transcript)
    assert transcript.equal, transcript.difference
    assert transcript.n_compared or clip["no_speech"], "equal transcripts prove little if both are empty"


@pytest.mark.parametrize(
    ("decoding", "batch_size"),
    [("greedy", 4), ("words", 3), pytest.param("beam", 2, marks=pytest.mark.nightly)],
)
def test_transcripts_together(
    subject: maxwhisper.Whisper, peer: Yardstick, decoding: str, batch_size: int, run: Run
) -> None:
    clips = [clip["file"] for clip in CLIPS if decoding not in AT_NIGHT.get(clip["file"], ())]
    transcripts = list(compare_many(subject, peer, clips, decoding, batch_size))
    run.transcripts += transcripts
    assert sorted(transcript.clip for transcript in transcripts) == sorted(clips)
    assert not [transcript for transcript in transcripts if not transcript.equal]


@pytest.mark.parametrize("decoding", ["greedy", "words"])
def test_transcript_in_pieces(subject: maxwhisper.Whisper, peer: Yardstick, decoding: str, run: Run) -> None:
    for package in DETECTOR:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'maxwhisper[batched]'")
    transcript = compare_pieces(subject, peer, "clips/english-long.mp3", decoding)
    run.transcripts.append(transcript)
    assert transcript.equal and transcript.n_compared, transcript.difference


@pytest.fixture(scope="module")
def windows_judge(peer: Yardstick) -> windows.Judge:
    oracle = pytorch_whisper(peer.model.dims, peer.model.state_dict(), torch.float64)
    return windows.Judge(oracle, peer.model, peer.memory and Verdicts(peer.memory, peer.weights))


AT_MERGE = ("clips/english-1.wav", "clips/german-1.wav")
"""Clips of which every way to decode a window is judged at every merge."""


OTHERS = ("clips/english-2.flac", "clips/german-3.ogg")


def windows_of_clips() -> Iterator[Any]:
    for clip, decoding in itertools.product(CLIPS, windows.DECODING):
        marks = [] if clip["file"] in AT_MERGE else [pytest.mark.nightly]
        yield pytest.param(clip["file"], decoding, id=f"{clip['file']}-{decoding}", marks=marks)


@pytest.mark.parametrize(("clip", "decoding"), list(windows_of_clips()))
def test_all_that_is_said_of_a_window(
    subject: maxwhisper.Whisper, windows_judge: windows.Judge, clip: str, decoding: str, run: Run
) -> None:
    sound, *others = (waveforms.read(FIXTURES / file) for file in (clip, *OTHERS))
    transcript = windows_judge.compare(subject, clip, sound, decoding, others)
    run.transcripts.append(transcript)
    assert transcript.equal, transcript.difference


LONG = [clip["file"] for clip in CLIPS if clip["duration"] > CHUNK_LENGTH]


@pytest.mark.parametrize("clip", LONG)
def test_numbers_of_a_transcripts_windows(
    subject: maxwhisper.Whisper, windows_judge: windows.Judge, clip: str, run: Run
) -> None:
    """Of recordings of several, each with the text before it as its prompt."""
    transcript = windows_judge.compare_transcript(subject, clip, waveforms.read(FIXTURES / clip), "greedy")
    run.transcripts.append(transcript)
    assert transcript.equal, transcript.difference


def with_128_bands(source: Path, destination: Path) -> Path:
    """Writes OpenAI's checkpoint of 80 mel bands as one of 128, which for each of the 80 takes a mean of those that
    overlap it: the same text is heard, nearly as well."""
    checkpoint = torch.load(source, weights_only=True)
    overlap = mel_filters("cpu", 80) @ mel_filters("cpu", 128).T
    weight = checkpoint["model_state_dict"]["encoder.conv1.weight"]
    mean = (overlap / overlap.sum(1, keepdim=True)).to(weight.dtype)
    checkpoint["model_state_dict"]["encoder.conv1.weight"] = torch.einsum("omt,mn->ont", weight, mean)
    checkpoint["dims"]["n_mels"] = 128
    torch.save(checkpoint, destination)
    return destination


@pytest.mark.nightly
def test_a_model_of_128_bands(tmp_path: Path, loading: dict[str, Any], run: Run) -> None:
    """Which large-v3 and turbo have: the trained fixture, with the sum of 128 bands for each of its 80."""
    path = with_128_bands(NANO, tmp_path / "128.pt")
    model, openai = maxwhisper.load_model(path, loading["device"]), checkpoints.read(path, 51865).eval()
    peer = Yardstick(openai.to(model.device), None)
    judge = windows.Judge(pytorch_whisper(openai.dims, openai.state_dict(), torch.float64), openai, None)
    found = [compare(model, peer, clip, decoding) for clip in AT_MERGE for decoding in ("greedy", "beam", "words")]
    found += [judge.compare(model, clip, waveforms.read(FIXTURES / clip), "greedy") for clip in AT_MERGE]
    run.transcripts += found
    assert not [transcript for transcript in found if not transcript.equal]
    assert all(transcript.n_compared for transcript in found)


@pytest.mark.parametrize("fault", PIPELINE_FAULTS)
def test_a_wrong_pipeline_shows(subject: maxwhisper.Whisper, peer: Yardstick, fault: str) -> None:
    """On the clip that is longer than a window."""
    longer = max(CLIPS, key=lambda clip: clip["duration"])["file"]
    with PIPELINE_FAULTS[fault]():
        assert not compare(subject, peer, longer, "greedy").equal
