"""Vocabularies that transformers changed: what is accepted transcribes as it does there, what is refused after the
lines in the message."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from maxwhisper import load_model
from maxwhisper.audio import load_audio
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compare.engines import SPECS, missing
from maxwhisper.compare.tokens import task_for
from maxwhisper.errors import CheckpointError
from reference import checkpoints
from reference.fixtures import FIXTURES, NANO

CLIPS = [("english-2.flac", "en"), ("german-1.wav", "de")]
TIMESTAMP = 50364


@pytest.fixture(scope="module", autouse=True)
def transformers() -> Any:
    if packages := missing(next(spec for spec in SPECS if spec.name == "transformers")):
        pytest.skip(f"transformers is not installed: pip install {' '.join(packages)}")
    return importlib.import_module("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from maxwhisper.compare import hugging_face

    folder = tmp_path_factory.mktemp("nano")
    hugging_face.write(load_checkpoint(NANO), folder)
    return folder


def test_the_names_that_oracle_and_peer_read_a_folder_by(folder: Path) -> None:
    ours, theirs = (checkpoints.read(path, 51865) for path in (folder, NANO))
    assert not checkpoints.differences(ours.dims, ours.state_dict(), theirs.dims, theirs.state_dict())


def changed(folder: Path, out: Path, transformers: Any, added: list[str], multiple: int | None = None) -> Path:
    """Returns the folder after tokens were added to its tokenizer and its embedding, with transformers."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(added)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    transformers.WhisperFeatureExtractor.from_pretrained(folder).save_pretrained(out)
    return out


def times_as_one(tokens: list[int]) -> list[int]:
    """Puts one token in the place of every timestamp: transformers, with a spectrogram of its own, differs by some."""
    return [min(token, TIMESTAMP) for token in tokens]


def assert_transcribes_as_transformers(ours: Path, theirs: Path) -> None:
    from maxwhisper.compare.engines.transformers import Adapter

    model = load_model(ours)
    engine = Adapter("", task_for(load_checkpoint(NANO).dims, None, 2))
    engine.load(theirs)
    for file, language in CLIPS:
        audio = load_audio(FIXTURES / "clips" / file)
        result = model.transcribe(audio, language=language, temperature=0.0)
        tokens = [token for segment in result["segments"] for token in segment["tokens"]]
        theirs_of_clip: list[int] = []
        engine.transcribe(audio, language, theirs_of_clip.extend)
        assert times_as_one(tokens) == times_as_one(theirs_of_clip)
        assert min(tokens) < 50257 and TIMESTAMP <= max(tokens) < 51865


def after_lines(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> Path:
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(path)
    lines = re.search("run `(.*?)`", str(refusal.value))
    assert lines, refusal.value
    out.mkdir()
    monkeypatch.chdir(out)
    exec(lines[1].replace("'NAME'", repr(names.pop("NAME", ""))), names)
    return out / "whisper"


def test_a_padded_vocabulary(folder: Path, tmp_path: Path, transformers: Any) -> None:
    padded = changed(folder, tmp_path / "padded", transformers, [], 64)
    assert json.loads((padded / "config.json").read_text())["vocab_size"] == 51904
    with pytest.warns(UserWarning, match="the 39 rows"):
        assert_transcribes_as_transformers(padded, padded)


@pytest.mark.parametrize(("added", "multiple"), [(["Hectorian"], None), (["<|speaker|>", "Hectorian", "[PAD]"], 64)])
def test_added_tokens(
    folder: Path,
    tmp_path: Path,
    transformers: Any,
    added: list[str],
    multiple: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = changed(folder, tmp_path / "more", transformers, added, multiple)
    with pytest.raises(CheckpointError, match="were added to the 51865 tokens") as refusal:
        load_checkpoint(more)
    assert all(repr(token) in str(refusal.value) for token in added)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (more / file).rename(tmp_path / file)
    with pytest.raises(CheckpointError, match="no tokenizer.json beside it"):
        load_checkpoint(more)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).rename(more / file)
    assert_transcribes_as_transformers(after_lines(more, tmp_path / "out", monkeypatch), more)


def test_the_lines_for_a_file_of_a_trainer(
    folder: Path, tmp_path: Path, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    state = {"net." + name: tensor for name, tensor in model.state_dict().items()} | {"criterion.weight": torch.ones(3)}
    torch.save({"pytorch-lightning_version": "2.5.0", "state_dict": state}, tmp_path / "a.ckpt")
    written = after_lines(tmp_path / "a.ckpt", tmp_path / "out", monkeypatch, NAME=str(folder))
    ours, nano = load_checkpoint(written), load_checkpoint(NANO)
    assert ours.dims == nano.dims and ours.alignment_heads == load_checkpoint(folder).alignment_heads
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in nano.tensors.items())
