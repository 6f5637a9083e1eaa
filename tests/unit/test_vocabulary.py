"""Vocabularies of other sizes than OpenAI's: computed right or refused, and never ids that mean something else."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_encoding, get_tokenizer

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.checkpoint.vocabulary import ENCODINGS

from .checkpoints import (
    CONFIG,
    DIMS,
    Tensors,
    assert_refused,
    assert_same,
    hugging_face_names,
    random_tensors,
    write_folder,
    write_pt,
    write_safetensors,
)

EMBEDDING = "decoder.token_embedding.weight"
TENSORS = random_tensors()


def of_size(n_vocab: int) -> Tensors:
    return TENSORS | {EMBEDDING: torch.randn(n_vocab, 16).half()}


def folder_of_size(folder: Path, n_vocab: int, **generation: Any) -> Path:
    write_folder(folder, hugging_face_names(of_size(n_vocab)), config=CONFIG | {"vocab_size": n_vocab})
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def special_tokens(size: int) -> dict[str, int]:
    """Returns those of OpenAI's tokenizer for a model of this size, two by names of older tokenizers."""
    model = Whisper(replace(DIMS, n_vocab=1))
    model.dims = replace(DIMS, n_vocab=size)
    tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages)
    older = {"<|nospeech|>": "<|nocaptions|>", "<|he|>": "<|iw|>"}
    return {older.get(name, name): id_ for name, id_ in tokenizer.special_tokens.items()}


def write_tokenizer(folder: Path, file: str, tokens: dict[str, int]) -> None:
    added = [{"id": id_, "content": name, "special": name.startswith("<|")} for name, id_ in tokens.items()]
    content: Any = {
        "tokenizer.json": {"model": {"type": "BPE", "vocab": {"!": 0, "Ġ": 220}}, "added_tokens": added},
        "tokenizer_config.json": {
            "added_tokens_decoder": {token["id"]: {"content": token["content"]} for token in added}
        },
        "added_tokens.json": tokens,
        "vocab.json": tokens,
    }[file]
    (folder / file).write_text(json.dumps(content))


FILES = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"]
files = pytest.mark.parametrize("file", FILES)
openais = pytest.mark.parametrize("size", ENCODINGS)
files_and_sizes = pytest.mark.parametrize(
    ("file", "size"), [*((file, 51865) for file in FILES), ("tokenizer.json", 51864), ("tokenizer.json", 51866)]
)


# ---- the sizes that there are --------------------------------------------------------------------------------------


def test_the_sizes_are_those_of_openais_encodings() -> None:
    for size, (name, languages) in ENCODINGS.items():
        assert get_encoding(name, languages).n_vocab == size
        dims = ModelDimensions(1, 1, 8, 1, 1, size, 1, 8, 1, 1)
        model = Whisper(dims)
        assert (model.is_multilingual, model.num_languages) == (name == "multilingual", languages)


WRITERS: dict[str, Callable[[Path, Tensors, Any], Path]] = {"a.pt": write_pt, "a.safetensors": write_safetensors}


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("n_vocab", [50257, 50365, 51863, *ENCODINGS, 51867, 51868, 51904])
def test_a_vocabulary_of_another_size(tmp_path: Path, file: str, n_vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dims = replace(DIMS, n_vocab=n_vocab)
    path = WRITERS[file](tmp_path / file, of_size(n_vocab), asdict(dims))
    if n_vocab in ENCODINGS:
        assert load_checkpoint(path).dims == dims
    else:
        assert_refused(path, f"n_vocab is {n_vocab}", "51864 (English), 51865 or 51866 (99 or 100 languages)")


def test_the_lines_that_cut_added_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = of_size(51868)
    path = write_pt(tmp_path / "a.pt", tensors, asdict(replace(DIMS, n_vocab=51868)))
    with pytest.raises(Exception) as refusal:
        load_checkpoint(path)
    monkeypatch.chdir(tmp_path)
    lines = re.search("run `(.*?)`", str(refusal.value))
    assert lines
    exec(lines[1], {"N": 51865})
    expected = tensors | {EMBEDDING: tensors[EMBEDDING][:51865]}
    assert_same(load_checkpoint(tmp_path / "whisper.pt"), expected, replace(DIMS, n_vocab=51865))


# ---- Hugging Face folders ------------------------------------------------------------------------------------------


@openais
def test_a_tokenizer_that_agrees(tmp_path: Path, size: int) -> None:
    folder = folder_of_size(tmp_path / "model", size)
    for file in FILES:
        write_tokenizer(folder, file, special_tokens(size))
    assert load_checkpoint(folder).dims.n_vocab == size


@files_and_sizes
def test_rows_without_a_token_are_left_out(tmp_path: Path, file: str, size: int) -> None:
    for n_vocab in (size + 1, 51904):
        folder = folder_of_size(tmp_path / f"{n_vocab}", n_vocab)
        write_tokenizer(folder, file, special_tokens(size))
        with pytest.warns(
            UserWarning, match=f"the {n_vocab - size} rows .* OpenAI's vocabulary of {size} are left out"
        ):
            loaded = load_checkpoint(folder)
        assert loaded.dims == replace(DIMS, n_vocab=size)
        stored = load_checkpoint(folder_of_size(tmp_path / "plain", size)).tensors
        assert [(name, tensor.shape) for name, tensor in loaded.tensors.items()] == [
            (name, tensor.shape) for name, tensor in stored.items()
        ]
        assert loaded.tensors[EMBEDDING].is_contiguous()


@files_and_sizes
def test_added_tokens_are_refused(tmp_path: Path, file: str, size: int) -> None:
    for added in ({"<|speaker|>": size}, {"Ġword": size, "[PAD]": size + 1, "<|x|>": size + 2}):
        folder = folder_of_size(tmp_path / f"{len(added)}", size + len(added))
        write_tokenizer(folder, file, special_tokens(size) | added)
        resize = f"model.resize_token_embeddings({size})"
        assert_refused(folder, f"n_vocab is {size + len(added)}", *map(repr, added), "were added", resize)
        folder = folder_of_size(tmp_path / "padded", 51904)
        write_tokenizer(folder, file, special_tokens(size) | added)
        assert_refused(folder, *map(repr, added), "were added")


@openais
def test_tokens_may_be_named_that_have_no_row(tmp_path: Path, size: int) -> None:
    folder = folder_of_size(tmp_path / "model", size)
    write_tokenizer(folder, "tokenizer.json", special_tokens(size))
    write_tokenizer(folder, "added_tokens.json", {"[PAD]": size})
    assert load_checkpoint(folder).dims.n_vocab == size


def test_a_tokenizer_without_timestamps(tmp_path: Path) -> None:
    tokens = {name: id_ for name, id_ in special_tokens(51865).items() if "." not in name}
    folder = folder_of_size(tmp_path / "model", 51865)
    write_tokenizer(folder, "tokenizer.json", tokens)
    assert load_checkpoint(folder).dims.n_vocab == 51865
    write_tokenizer(folder, "added_tokens.json", {"word": 50364})
    assert_refused(folder, "added_tokens.json", "token 50364 is 'word'", "'<|0.00|>'")
    folder_of_size(folder, 50365)
    assert_refused(folder, "n_vocab is 50365", "51865 tokens (99 languages)")


@files
def test_a_token_with_the_id_of_another(tmp_path: Path, file: str) -> None:
    folder = folder_of_size(tmp_path / "model", 51865)
    write_tokenizer(folder, file, special_tokens(51865) | {"<|xx|>": 50259})
    assert_refused(folder, f"{file}: token 50259 is '<|xx|>', but '<|en|>'")


@pytest.mark.parametrize("moved", [{"<|notimestamps|>": 50400}, {"<|transcribe|>": 50358, "<|translate|>": 50359}])
def test_ids_of_no_tokenizer_of_openais(tmp_path: Path, moved: dict[str, int]) -> None:
    folder = folder_of_size(tmp_path / "model", 51865)
    write_tokenizer(folder, "tokenizer.json", special_tokens(51865) | moved)
    name, id_ = next(iter(moved.items()))
    assert_refused(folder, "no tokenizer of OpenAI's", f"{name} = {id_} in tokenizer.json")


@pytest.mark.parametrize(("token", "name"), [(0, "!"), (279, "Ġthe"), (2020, "Ã©")])
def test_another_vocabulary_of_text(tmp_path: Path, token: int, name: str) -> None:
    encoding = get_encoding("multilingual")
    token = encoding.encode(bytes({"!": b"!", "Ġthe": b" the", "Ã©": "é".encode()}[name]).decode())[0]
    folder = folder_of_size(tmp_path / "model", 51865)
    write_tokenizer(folder, "vocab.json", {name: token})
    assert load_checkpoint(folder).dims.n_vocab == 51865
    write_tokenizer(folder, "vocab.json", {name: token + 1})
    assert_refused(folder, f"vocab.json: token {token + 1} is {name!r}")


@openais
def test_without_a_tokenizer_generation_config_counts(tmp_path: Path, size: int) -> None:
    stated = special_tokens(size)["<|notimestamps|>"]
    assert load_checkpoint(folder_of_size(tmp_path / "a", size, no_timestamps_token_id=stated)).dims.n_vocab == size
    for n_vocab in (size + 1, 51904):
        folder = folder_of_size(tmp_path / "b", n_vocab, no_timestamps_token_id=stated)
        cut = f"model.resize_token_embeddings({size})"
        assert_refused(folder, f"n_vocab is {n_vocab}", f"that of {size} tokens", "no tokenizer.json", cut)
    smaller = folder_of_size(tmp_path / "c", 51864, no_timestamps_token_id=stated)
    assert load_checkpoint(smaller).dims.n_vocab == 51864  # no token of this model can have been added to more


@pytest.mark.parametrize(
    ("n_vocab", "stated"), [(50257, None), (50365, 50363), (51863, 1), (51867, "50363"), (51904, None)]
)
def test_another_size_without_a_tokenizer(tmp_path: Path, n_vocab: int, stated: object) -> None:
    folder = folder_of_size(tmp_path / "model", n_vocab, no_timestamps_token_id=stated)
    assert_refused(folder, f"n_vocab is {n_vocab}", "no tokenizer.json beside it", "resize_token_embeddings(N)")


@files
@pytest.mark.parametrize(
    "content", ["[]", '{"a": "b"}', '{"added_tokens_decoder": {"a": {}}}', '{"a": null}', "{", '{"a": -1}']
)
def test_a_tokenizer_that_cannot_be_read(tmp_path: Path, file: str, content: str) -> None:
    folder = folder_of_size(tmp_path / "model", 51865)
    (folder / file).write_text(content)
    if file == "tokenizer_config.json" and content.startswith('{"a": '):
        assert load_checkpoint(folder)  # it need not list tokens
    else:
        assert_refused(folder, file)


def test_a_vocabulary_too_small_for_text_has_no_ids_to_mistake(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", hugging_face_names(TENSORS))
    write_tokenizer(folder, "tokenizer.json", special_tokens(51865) | {"word": 51865})
    assert load_checkpoint(folder).dims == DIMS
