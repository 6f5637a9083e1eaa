"""What the subject's loaders make of a file, beside what others read in it: weights, alignment heads and audio."""

import base64
import gzip
from pathlib import Path

import numpy as np
import pytest
import soundfile
import whisper

from maxwhisper.audio import load_audio
from maxwhisper.checkpoint import load_checkpoint
from reference import checkpoints, waveforms
from reference.fixtures import FIXTURES, NANO
from tests.unit.checkpoints import HEADS, hugging_face_names, random_tensors, write_folder, write_pt, write_safetensors

LAYOUTS = ("pt", "safetensors", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def check_weights(path: str | Path) -> None:
    ours = load_checkpoint(path)
    theirs = checkpoints.read(path, ours.dims.n_vocab)
    found = checkpoints.differences(ours.dims, ours.tensors, theirs.dims, theirs.state_dict())
    found |= checkpoints.differing_heads(ours.alignment_heads, theirs)
    if found:
        lines = "\n".join(f"  {name}: {how}" for name, how in found.items())
        pytest.fail(f"the loaders of weights differ in {path}\n{lines}", pytrace=False)


def check_audio(path: Path) -> None:
    if found := waveforms.difference(path, load_audio(path)):
        pytest.fail(f"the loaders of audio differ: {found}", pytrace=False)


def test_the_checkpoint(checkpoint_path: str, pytestconfig: pytest.Config) -> None:
    try:
        check_weights(checkpoint_path)
    except checkpoints.UnreadableError as error:
        if not pytestconfig.getoption("--checkpoint"):
            raise
        pytest.skip(str(error))


def written(layout: str, folder: Path) -> Path:
    """Writes a checkpoint of random weights, with heads where the layout has room for them."""
    tensors = random_tensors()
    if layout == "pt":
        return write_pt(folder / "model.pt", tensors)
    if layout == "safetensors":
        return write_safetensors(folder / "model.safetensors", tensors, heads=HEADS)
    (folder / "generation_config.json").write_text(f'{{"alignment_heads": {HEADS}}}')
    return write_folder(folder, hugging_face_names(tensors), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_format(layout: str, tmp_path: Path) -> None:
    check_weights(written(layout, tmp_path))


def test_published_alignment_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes one of OpenAI's names, with a mask for the fixture in the place of its own."""
    mask = np.array([[False, True], [False, False], [True, False]])
    monkeypatch.setitem(whisper._ALIGNMENT_HEADS, "tiny", base64.b85encode(gzip.compress(mask.tobytes())))
    monkeypatch.setattr(whisper, "_download", lambda *_, **__: str(NANO))
    check_weights("tiny")


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize("file", ["a.wav", "a.flac", "a.mp3"])
def test_two_channels(file: str, rate: int, tmp_path: Path) -> None:
    """Speech in one, and in the other the same backwards."""
    speech = waveforms.read(FIXTURES / "clips" / "english-2.flac")
    soundfile.write(tmp_path / file, np.stack([speech, speech[::-1] / 2], 1), rate)
    check_audio(tmp_path / file)
