"""Alignment heads of a checkpoint: its own if they fit, OpenAI's default with a warning if they are another model's."""

import json
import warnings
from pathlib import Path

import pytest
from whisper.model import Whisper

from maxwhisper.checkpoint import convert, load_checkpoint
from maxwhisper.errors import CheckpointError
from reference.checkpoints import model_of

from .checkpoints import (
    DIMS,
    HEADS,
    assert_refused,
    hugging_face_names,
    random_tensors,
    write_folder,
    write_safetensors,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", hugging_face_names(random_tensors()))


def write_heads(folder: Path, heads: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"alignment_heads": heads}))


def test_alignment_heads(tmp_path: Path, folder: Path) -> None:
    write_heads(folder, HEADS)
    assert load_checkpoint(folder).alignment_heads == ((0, 1), (1, 0))
    written = convert(folder, tmp_path / "converted.safetensors")
    assert load_checkpoint(written).alignment_heads == ((0, 1), (1, 0))
    write_heads(folder, [*HEADS, *HEADS])
    assert load_checkpoint(folder).alignment_heads == ((0, 1), (1, 0))
    write_heads(folder, None)
    assert load_checkpoint(folder).alignment_heads is None
    (folder / "generation_config.json").write_text("{}")
    assert load_checkpoint(folder).alignment_heads is None


@pytest.mark.parametrize(
    ("heads", "part"),
    [
        ([], "generation_config.json: the alignment heads are empty"),
        ([[2, 0]], "[2, 0] are not a layer (of 2) and a head (of 2)"),
        ([[0, 2]], "[0, 2] are not a layer"),
        ([[0, 0], [1, 1], [25, 6]], "[25, 6] are not a layer"),
        ([[7, 0], [10, 17], [12, 18], [13, 12], [16, 1]], "[10, 17], [12, 18], [13, 12] and 2 more are not a layer"),
        ([[10**30, 0]], "are not a layer"),
    ],
)
def test_alignment_heads_of_another_model(tmp_path: Path, folder: Path, heads: object, part: str) -> None:
    write_heads(folder, heads)
    with pytest.warns(UserWarning) as caught:
        assert load_checkpoint(folder).alignment_heads is None
    (message,) = [str(warning.message) for warning in caught]
    assert part in message and "OpenAI's default" in message and "\n" not in message
    path = write_safetensors(tmp_path / "model.safetensors", random_tensors(), heads=heads)
    with pytest.warns(UserWarning, match=r"model\.safetensors: .*OpenAI's default"):
        assert load_checkpoint(path).alignment_heads is None
    with pytest.warns(UserWarning, match="OpenAI's default"):
        written = convert(folder, tmp_path / "converted.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(written).alignment_heads is None


def test_the_warning_is_given_once_and_at_the_line_that_asked(folder: Path) -> None:
    write_heads(folder, [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            load_checkpoint(folder)
    (warning,) = caught
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "heads",
    [
        [[-1, 0]],
        [[0]],
        [[0, 0, 0]],
        [0],
        [["0", "0"]],
        [[True, False]],
        [[1.0, 0.0]],
        [[0, 0], None],
        {},
        "all",
        1,
        False,
    ],
)
def test_what_is_no_list_of_heads(tmp_path: Path, folder: Path, heads: object) -> None:
    write_heads(folder, heads)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: the alignment heads must be pairs"):
        load_checkpoint(folder)
    path = write_safetensors(tmp_path / "model.safetensors", random_tensors(), heads=heads)
    assert_refused(path, "the alignment heads must be pairs")


def test_what_a_peer_has_of_heads_that_fit_and_of_others() -> None:
    """Up to the last head of the last layer; else OpenAI's default, the last half of the layers."""
    last = (DIMS.n_text_layer - 1, DIMS.n_text_head - 1)
    default = Whisper(DIMS).alignment_heads.to_dense()
    assert model_of(DIMS, random_tensors(), [last]).alignment_heads.to_dense().nonzero().tolist() == [list(last)]
    for heads in ([(0, DIMS.n_text_head)], [(DIMS.n_text_layer, 0)], []):
        assert model_of(DIMS, random_tensors(), heads).alignment_heads.to_dense().equal(default)
