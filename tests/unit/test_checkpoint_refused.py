"""Checkpoints that are refused: everything that is wrong with one is one clear line."""

import itertools
import json
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from maxwhisper.checkpoint import expected_tensors, load_checkpoint
from maxwhisper.errors import CheckpointError

from .checkpoints import (
    CONFIG,
    DIMS,
    NAMES,
    assert_refused,
    assert_same,
    hugging_face_names,
    random_tensors,
    write_folder,
    write_pt,
    write_safetensors,
)
from .test_checkpoint import FORMATS

# Tensors that are wrong


OPENAI_FORMATS = ["pt", "pt before torch 1.6", "safetensors"]
formats_and_names = pytest.mark.parametrize("layout", ["pt", "safetensors", "folder", "folder, bin, sharded"])


def stored_name(layout: str, name: str) -> str:
    return next(iter(hugging_face_names({name: None}))) if layout.startswith("folder") else name


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Returns what gives a new empty folder at each call, for tests that hypothesis repeats."""
    folders = (tmp_path_factory.mktemp("scratch") / str(i) for i in itertools.count())

    def new_folder() -> Path:
        folder = next(folders)
        folder.mkdir()
        return folder

    return new_folder


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Returns the bytes of a good file in each of OpenAI's formats."""
    folder = tmp_path_factory.mktemp("contents")
    return {layout: FORMATS[layout](folder, random_tensors()).read_bytes() for layout in OPENAI_FORMATS}


@formats_and_names
@settings(max_examples=15)
@given(name=st.sampled_from(NAMES))
def test_a_missing_tensor_is_named(scratch: Callable[[], Path], layout: str, name: str) -> None:
    tensors = random_tensors()
    del tensors[name]
    assert_refused(FORMATS[layout](scratch(), tensors), "lacks tensor", repr(stored_name(layout, name)))


@formats_and_names
@settings(max_examples=15)
@given(name=st.sampled_from(NAMES), data=st.data())
def test_a_misshapen_tensor_is_named(scratch: Callable[[], Path], layout: str, name: str, data: st.DataObject) -> None:
    tensors = random_tensors()
    shape = tuple(tensors[name].shape)
    same_size = st.sampled_from([(tensors[name].numel(),), (1, *shape), shape[::-1]])
    other_size = st.lists(st.integers(0, 20), max_size=4).map(tuple)
    wrong = data.draw((same_size | other_size).filter(lambda drawn: drawn != shape))
    tensors[name] = torch.ones(wrong, dtype=torch.float16)
    path = FORMATS[layout](scratch(), tensors)
    assert_refused(path, repr(stored_name(layout, name)), f"is {wrong}, expected {shape}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    """In five tensors each; in another test the value is in others."""
    for name in random.Random(f"{dtype} {value}").sample(NAMES, 5):
        tensors = random_tensors(dtype)
        tensors[name].view(-1)[torch.randint(tensors[name].numel(), ())] = value
        assert_refused(write_pt(tmp_path / "model.pt", tensors), repr(name), "not finite")


def test_the_largest_finite_values_are_accepted(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensors = random_tensors(dtype)
        tensors["encoder.ln_post.weight"].fill_(torch.finfo(dtype).max)
        tensors["encoder.ln_post.bias"].fill_(torch.finfo(dtype).min)
        assert_same(load_checkpoint(write_pt(tmp_path / f"{dtype}.pt", tensors)), tensors)


@formats_and_names
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_a_wrong_dtype_is_named(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    tensors = random_tensors()
    name = "decoder.blocks.1.mlp.2.bias"
    tensors[name] = tensors[name].to(dtype)
    path = FORMATS[layout](tmp_path, tensors)
    assert_refused(path, repr(stored_name(layout, name)), f"is stored as {dtype}", "torch.float16")


@pytest.mark.parametrize(
    "value",
    [None, 1.5, [1.0], torch.eye(16).to_sparse(), torch.empty(16, 16, device="meta")],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_a_dense_tensor_is_named(tmp_path: Path, value: object) -> None:
    name = "encoder.blocks.0.attn.out.weight"
    path = write_pt(tmp_path / "model.pt", random_tensors() | {name: value})
    assert_refused(path, repr(name), "not a dense tensor")


@formats_and_names
@pytest.mark.parametrize("name", ["decoder.mask", "encoder.blocks.0.attn.key.bias", "alignment_heads", "lora\nA"])
def test_an_unexpected_tensor_is_named(tmp_path: Path, layout: str, name: str) -> None:
    path = FORMATS[layout](tmp_path, random_tensors())
    extra = {name: torch.zeros(2)}
    if layout == "pt":
        write_pt(path, random_tensors() | extra)
    elif layout == "safetensors":
        write_safetensors(path, random_tensors() | extra)
    else:
        file = "model.safetensors" if layout == "folder" else "pytorch_model.bin.index.json"
        write_folder(path, hugging_face_names(random_tensors()) | extra, file)
    if name.endswith("key.bias") and layout.startswith("folder"):
        assert_refused(path)  # an OpenAI name in a Hugging Face file: a fourth encoder layer, or an unexpected tensor
    else:
        assert_refused(path, "unexpected tensor", repr(name))


def test_many_wrong_tensors_are_counted(tmp_path: Path) -> None:
    stored = {name: tensor for name, tensor in random_tensors().items() if "mlp" not in name}
    assert_refused(write_pt(tmp_path / "model.pt", stored), "'decoder.blocks.0.mlp.0.bias'", f"and {6 * 5 - 3} more")


@pytest.mark.parametrize("state", [None, [], {}, {1: torch.zeros(1)}, {("encoder",): torch.zeros(1)}])
def test_what_is_not_a_state_dict(tmp_path: Path, state: Any) -> None:
    assert_refused(write_pt(tmp_path / "model.pt", state))


# Dimensions that are wrong


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"n_audio_layer": 2}, ["n_audio_layer is 2", "3 encoder layers"]),
        ({"n_text_layer": 10**15}, ["n_text_layer is 1000000000000000", "2 decoder layers"]),
        ({"n_vocab": 51}, ["n_vocab is 51", "decoder.token_embedding.weight", "(50, 16)", "(51, 16)"]),
        ({"n_mels": 80}, ["n_mels is 80", "encoder.conv1.weight", "(16, 3, 3)", "(16, 80, 3)"]),
        ({"n_audio_ctx": 7}, ["n_audio_ctx is 7", "encoder.positional_embedding", "(6, 16)", "(7, 16)"]),
        ({"n_text_ctx": 8}, ["n_text_ctx is 8", "decoder.positional_embedding", "(7, 16)", "(8, 16)"]),
        ({"n_audio_state": 32, "n_text_state": 32}, ["n_audio_state is 32", "encoder.positional_embedding", "(6, 16)"]),
        ({"n_text_state": 32}, ["n_audio_state is 16 but n_text_state is 32"]),
        ({"n_audio_head": 3}, ["n_audio_state is 16, not divisible by n_audio_head, which is 3"]),
        ({"n_text_head": 5}, ["n_text_state is 16, not divisible by n_text_head, which is 5"]),
        ({"n_mels": 0}, ["n_mels is 0, expected a positive integer"]),
        ({"n_mels": -3}, ["n_mels is -3, expected a positive integer"]),
        ({"n_mels": 3.0}, ["n_mels is 3.0, expected a positive integer"]),
        ({"n_text_layer": True}, ["n_text_layer is True, expected a positive integer"]),
        ({"n_vocab": "50"}, ["n_vocab is '50', expected a positive integer"]),
        ({"n_text_head": None}, ["n_text_head is None, expected a positive integer"]),
        ({"n_colours": 3}, ["the dimensions must be exactly n_mels, n_audio_ctx"]),
    ],
)
def test_dimensions_that_contradict_the_tensors(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    dims = asdict(DIMS) | changes
    assert_refused(write_pt(tmp_path / "model.pt", random_tensors(), dims), *parts)
    assert_refused(write_safetensors(tmp_path / "model.safetensors", random_tensors(), dims), *parts)


@pytest.mark.parametrize("dims", [[], "tiny", 3, {}, {"n_mels": 3}])
def test_dimensions_that_are_not_there(tmp_path: Path, dims: object) -> None:
    assert_refused(write_pt(tmp_path / "model.pt", random_tensors(), dims), "the dimensions must be exactly")
    path = write_safetensors(tmp_path / "model.safetensors", random_tensors(), dims)
    assert_refused(path, "the dimensions must be exactly")


# Files that are wrong


def test_what_is_not_there(tmp_path: Path) -> None:
    for name in ("tinny", str(tmp_path / "tiny.pt"), "", "\0", "x" * 5000):
        assert_refused(name, "no such file or folder, nor one of the model names", "tiny.en", "large-v3-turbo")
    assert_refused(os.devnull, "neither a file nor a folder, expected a checkpoint")


@pytest.mark.parametrize("inside", ["snapshots/abc/config.json", "checkpoint-500/config.json", "model.pt", None])
def test_a_folder_without_a_model_names_the_one_inside(tmp_path: Path, inside: str | None) -> None:
    """The hub's cache has such folders, and so has somebody with files of their own."""
    instead = ""
    if inside:
        (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / inside).touch()
        instead = f": give {tmp_path / inside.removesuffix('/config.json')}"
    with pytest.raises(CheckpointError, match=f"has no config.json, as the folder of a .* has{re.escape(instead)}$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"n_audio_state": 384, "model_type": "whisper"}, "has 'n_audio_state', as a model converted for MLX has"),
        ({"lang_ids": [50259]}, "has 'lang_ids', as a model converted for CTranslate2 has"),
    ],
)
def test_the_folder_of_another_library(tmp_path: Path, config: dict[str, Any], part: str) -> None:
    assert_refused(write_folder(tmp_path / "model", {}, config=config), "config.json", part)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"lmgg" + bytes(40), "a ggml file, as whisper.cpp reads it"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (b"\6\0\0\0\x0c\0WhisperSpec\0" + bytes(40), "a model converted for CTranslate2"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS in the place of the file"),
        (b'{\n  "metadata": {}\n}', "a file of JSON, whose folder is to be given"),
    ],
    ids=["ggml", "gguf", "ctranslate2", "lfs", "json"],
)
@pytest.mark.parametrize("file", ["a.pt", "a.safetensors", "a.bin", "a.safetensors.index.json"])
def test_a_file_of_another_library_is_called_what_it_is(tmp_path: Path, file: str, content: bytes, kind: str) -> None:
    (tmp_path / file).write_bytes(content)
    assert_refused(tmp_path / file, f"{file}: {kind}", "expected a checkpoint of PyTorch or safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\x03\x04", b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x04."]
)
@pytest.mark.parametrize("file", ["a.pt", "a.safetensors", "a.bin"])
def test_files_that_are_no_checkpoint(tmp_path: Path, file: str, content: bytes) -> None:
    path = tmp_path / file
    path.write_bytes(content)
    assert_refused(path)
    folder = write_folder(tmp_path / "folder", {})
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, "model.safetensors")


@settings(max_examples=100)
@given(
    content=st.binary(max_size=200),
    suffix=st.sampled_from([".pt", ".safetensors"]),
    magic=st.sampled_from([b"", b"PK\x03\x04"]),
)
def test_random_bytes(scratch: Callable[[], Path], content: bytes, suffix: str, magic: bytes) -> None:
    path = scratch() / f"model{suffix}"
    path.write_bytes(magic + content)
    assert_refused(path)


@settings(max_examples=100)
@given(content=st.binary(max_size=100))
def test_valid_archive_with_garbage_inside(scratch: Callable[[], Path], content: bytes) -> None:
    path = scratch() / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    assert_refused(path)


@pytest.mark.parametrize("layout", OPENAI_FORMATS)
@settings(max_examples=60)
@given(data=st.data())
def test_truncation_anywhere_is_noticed(
    scratch: Callable[[], Path], contents: dict[str, bytes], layout: str, data: st.DataObject
) -> None:
    content = contents[layout]
    path = scratch() / ("model.safetensors" if layout == "safetensors" else "model.pt")
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert_refused(path)


@pytest.mark.parametrize("layout", OPENAI_FORMATS)
@settings(max_examples=100)
@given(data=st.data())
def test_a_changed_byte_is_refused_where_the_format_has_checksums(
    scratch: Callable[[], Path], contents: dict[str, bytes], layout: str, data: st.DataObject
) -> None:
    content = bytearray(contents[layout])
    anywhere = st.integers(0, len(content) - 1)
    # Most changes go where the file describes its tensors: its first fifth and, in an archive, its last tenth.
    where = data.draw(anywhere | st.integers(0, len(content) // 5) | st.integers(-(len(content) // 10), -1))
    content[where] ^= data.draw(st.integers(1, 255))
    path = scratch() / ("model.safetensors" if layout == "safetensors" else "model.pt")
    path.write_bytes(content)
    try:
        loaded = load_checkpoint(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert list(loaded.tensors) == list(expected_tensors(loaded.dims))
        if layout == "pt":
            assert_same(loaded, random_tensors())  # the change was where nothing is kept


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Intruder:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "intruded"),)

    content = {"dims": asdict(DIMS), "model_state_dict": random_tensors(), "extra": Intruder()}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Intruder(), protocol=2))
    folder = write_folder(
        tmp_path / "folder", hugging_face_names(random_tensors()) | {"x": Intruder()}, "pytorch_model.bin"
    )
    for path in (tmp_path / "zip.pt", tmp_path / "legacy.pt", tmp_path / "plain.pt", folder):
        assert_refused(path, "refused", ".mkdir")
        assert not (tmp_path / "intruded").exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert (tmp_path / "intruded").exists()  # so the file was dangerous


def test_code_is_refused_even_where_the_environment_allows_it(tmp_path: Path) -> None:
    class Intruder:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "intruded"),)

    torch.save(Intruder(), tmp_path / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        assert_refused(tmp_path / "model.pt", "refused")
    assert not (tmp_path / "intruded").exists()


@pytest.mark.parametrize("content", [[], 3, None, {}, {"model_state_dict": {}}, {"dims": {}}, {"dims": {}, 1: {}}])
def test_a_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt")


def test_hugging_face_weights_without_their_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", hugging_face_names(random_tensors()), "pytorch_model.bin")
    assert_refused(folder / "pytorch_model.bin", "give the folder")
    save_file(hugging_face_names(random_tensors()), tmp_path / "alone.safetensors")
    assert_refused(tmp_path / "alone.safetensors", "whisper_dims", "no config.json beside it")


def test_one_shard_is_not_the_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", hugging_face_names(random_tensors()), "model.safetensors.index.json")
    assert_refused(folder / "model-1-of-2.safetensors", "lacks tensor")


@pytest.mark.parametrize("text", ["{", "", "[1]", "nul", "\0", '"whisper"', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_broken_json(tmp_path: Path, file: str, text: str) -> None:
    folder = write_folder(tmp_path / "model", hugging_face_names(random_tensors()), "model.safetensors.index.json")
    (folder / file).write_text(text)
    assert_refused(folder, file)
    (folder / file).write_bytes(b"{\xff\xfe}")
    assert_refused(folder, file, "broken JSON")


def test_metadata_that_is_broken_json(tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "model.safetensors", {"whisper_dims": "{"})
    assert_refused(tmp_path / "model.safetensors", "broken JSON")


@pytest.mark.parametrize(
    "key", [key for key in CONFIG if key not in ("model_type", "activation_function", "scale_embedding")]
)
def test_config_that_lacks_a_key(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    folder = write_folder(tmp_path / "model", hugging_face_names(random_tensors()), config=config)
    assert_refused(folder, "config.json", f"lacks {key!r}")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "wav2vec2"}, "model_type is 'wav2vec2', expected 'whisper'"),
        ({"model_type": None}, "model_type is None, expected 'whisper'"),
        ({"activation_function": "relu"}, "activation_function is 'relu', expected 'gelu'"),
        ({"scale_embedding": True}, "scale_embedding is True, expected False"),
        ({"vocab_size": 51}, "n_vocab is 51"),
        ({"encoder_layers": 4}, "n_audio_layer is 4, but the tensors of 3 encoder layers"),
        ({"decoder_attention_heads": 0}, "n_text_head is 0"),
    ],
)
def test_config_of_another_model(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert_refused(
        write_folder(tmp_path / "model", hugging_face_names(random_tensors()), config=CONFIG | changes), part
    )


def test_config_may_leave_out_what_has_one_usable_value(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key not in ("activation_function", "scale_embedding")}
    tensors = random_tensors()
    assert_same(load_checkpoint(write_folder(tmp_path / "model", hugging_face_names(tensors), config=config)), tensors)


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {})
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "holds none of model.safetensors, ")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": ["b"]}, {"a": "b\0"}])
def test_index_that_names_no_files(tmp_path: Path, weight_map: object) -> None:
    folder = write_folder(tmp_path / "model", hugging_face_names(random_tensors()), "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(folder, "model.safetensors.index.json", "must give a file name for each tensor")


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_index_that_contradicts_its_shards(tmp_path: Path, file: str) -> None:
    folder = write_folder(tmp_path / "model", hugging_face_names(random_tensors()), file)
    index = json.loads((folder / file).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    other = shard.replace("-1-", "-2-")
    assert other != shard
    for changed in ({name: other}, {"model.more": shard}):
        (folder / file).write_text(json.dumps({"weight_map": index["weight_map"] | changed}))
        assert_refused(folder, "disagree on holding", repr(next(iter(changed))))
    (folder / file).write_text(json.dumps(index))
    (folder / other).unlink()
    assert_refused(folder, other, "No such file")
