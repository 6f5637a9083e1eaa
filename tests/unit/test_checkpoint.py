"""Checkpoints: every format round-trips bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper.model import ModelDimensions, Whisper

from maxwhisper.checkpoint import convert, expected_tensors, load_checkpoint

from .checkpoints import (
    NAMES,
    Tensors,
    assert_same,
    compressed,
    hugging_face_names,
    random_tensors,
    write_folder,
    write_pt,
    write_safetensors,
)

FORMATS: dict[str, Callable[[Path, Tensors], Path]] = {
    "pt": lambda folder, t: write_pt(folder / "model.pt", t),
    "pt before torch 1.6": lambda folder, t: write_pt(folder / "model.pt", t, _use_new_zipfile_serialization=False),
    "pt compressed": lambda folder, t: compressed(write_pt(folder / "model.pt", t)),
    "safetensors": lambda folder, t: write_safetensors(folder / "model.safetensors", t),
    "folder": lambda folder, t: write_folder(folder / "model", hugging_face_names(t)),
    "folder, sharded": lambda folder, t: write_folder(
        folder / "model", hugging_face_names(t), "model.safetensors.index.json"
    ),
    "folder, bin": lambda folder, t: write_folder(folder / "model", hugging_face_names(t), "pytorch_model.bin"),
    "folder, bin, sharded": lambda folder, t: write_folder(
        folder / "model", hugging_face_names(t), "pytorch_model.bin.index.json"
    ),
    "folder, without the language model head": lambda folder, t: write_folder(
        folder / "model", {name.removeprefix("model."): tensor for name, tensor in hugging_face_names(t).items()}
    ),
    "file in a folder": lambda folder, t: write_folder(folder / "model", hugging_face_names(t)) / "model.safetensors",
}


# What is read


sizes = st.integers(1, 3)


@settings(max_examples=20)
@given(st.builds(ModelDimensions, sizes, sizes, st.just(8), sizes, sizes, sizes, sizes, st.just(8), sizes, sizes))
def test_expected_tensors_are_those_of_openai_whisper(dims: ModelDimensions) -> None:
    state = Whisper(dims).state_dict()
    assert list(expected_tensors(dims).items()) == [(name, tuple(tensor.shape)) for name, tensor in state.items()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", FORMATS)
def test_every_format_round_trips(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    tensors = random_tensors(dtype)
    loaded = load_checkpoint(FORMATS[layout](tmp_path, tensors))
    assert_same(loaded, tensors)
    assert loaded.alignment_heads is None

    written = convert(FORMATS[layout](tmp_path, tensors), tmp_path / "converted.safetensors")
    assert written == tmp_path / "converted.safetensors"
    assert_same(load_checkpoint(written), tensors)


def test_dtypes_may_be_mixed_and_order_and_strides_do_not_matter(tmp_path: Path) -> None:
    tensors = random_tensors(torch.float32)
    for name, dtype in zip(NAMES, [torch.float16, torch.bfloat16, torch.float32] * len(NAMES), strict=False):
        tensors[name] = tensors[name].to(dtype)
    stored = {name: tensors[name].mT.contiguous().mT if tensors[name].ndim > 1 else tensors[name] for name in NAMES}
    stored["encoder.blocks.0.attn.key.weight"] = torch.nn.Parameter(stored["encoder.blocks.0.attn.key.weight"])
    assert not stored["encoder.conv1.weight"].is_contiguous()
    loaded = load_checkpoint(write_pt(tmp_path / "mixed.pt", stored))
    assert_same(loaded, tensors)
    assert not any(tensor.requires_grad for tensor in loaded.tensors.values())


def test_a_safetensors_file_of_any_name(tmp_path: Path) -> None:
    """The hub's cache has such names, where what ends in .safetensors is a link."""
    written = write_safetensors(tmp_path / "model.safetensors", random_tensors())
    assert_same(load_checkpoint(written.rename(tmp_path / "7ebdc6ba")), random_tensors())


def test_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors()
    path = write_pt(tmp_path / "mine.pt", tensors)
    folder = write_folder(tmp_path / "yours", hugging_face_names(tensors))
    assert (load_checkpoint(path).name, load_checkpoint(str(path)).path) == ("mine", path)
    assert (load_checkpoint(folder).name, load_checkpoint(folder).path) == ("yours", folder)
    monkeypatch.chdir(folder)
    assert load_checkpoint(".").name == "yours"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list what is mapped")
@pytest.mark.parametrize("layout", ["pt", "safetensors", "folder, sharded", "folder, bin"])
def test_tensors_are_mapped_not_read(tmp_path: Path, layout: str) -> None:
    loaded = load_checkpoint(FORMATS[layout](tmp_path, random_tensors()))
    assert f"{loaded.path}" in Path("/proc/self/maps").read_text()


def test_tensors_that_share_memory_convert(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["encoder.ln_post.bias"] = tensors["encoder.ln_post.weight"]
    written = convert(write_pt(tmp_path / "tied.pt", tensors), tmp_path / "tied.safetensors")
    assert_same(load_checkpoint(written), tensors)
