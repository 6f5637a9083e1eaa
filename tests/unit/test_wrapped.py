"""Checkpoints as training leaves them: what is unambiguous loads, of the rest it is said what it is and what to do.

The lines of Python in a message are run here, and must turn the file into a checkpoint.
"""

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import whisper
from safetensors.torch import save_file
from whisper.model import Whisper

from maxwhisper.checkpoint import Checkpoint, load_checkpoint
from maxwhisper.errors import CheckpointError

from .checkpoints import (
    CONFIG,
    DIMS,
    NAMES,
    Tensors,
    assert_refused,
    assert_same,
    hugging_face_names,
    random_tensors,
    write_folder,
    write_pt,
    write_safetensors,
)

OUTPUT = "proj_out.weight"


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def after_lines(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Returns what the lines in the message about `path` make of it."""
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(path)
    lines = re.search("run `(.*?)`", str(refusal.value))
    assert lines, refusal.value
    monkeypatch.setattr(whisper, "load_model", {"NAME": SimpleNamespace(dims=DIMS)}.get)
    monkeypatch.chdir(folder)
    exec(lines[1], {})
    return load_checkpoint(folder / "whisper.pt")


# ---- names ---------------------------------------------------------------------------------------------------------


PREFIXES = ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.", "model.model.", "net.whisper."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_left_out(tmp_path: Path, prefix: str) -> None:
    tensors = random_tensors()
    assert_same(load_checkpoint(write_pt(tmp_path / "model.pt", prefixed(prefix, tensors))), tensors)
    assert_same(load_checkpoint(write_safetensors(tmp_path / "a.safetensors", prefixed(prefix, tensors))), tensors)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module.whisper."])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin.index.json"])
def test_a_prefix_of_hugging_faces_names_is_left_out(tmp_path: Path, prefix: str, file: str) -> None:
    tensors = random_tensors()
    stored = hugging_face_names(tensors)
    stored[OUTPUT] = tensors["decoder.token_embedding.weight"].clone()
    assert_same(load_checkpoint(write_folder(tmp_path / "model", prefixed(prefix, stored), file)), tensors)
    stored[OUTPUT][3, 3] += 1
    assert_refused(write_folder(tmp_path / "model", prefixed(prefix, stored), file), "'proj_out.weight' differs")


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
def test_a_wrapper_within_the_model_is_left_out(tmp_path: Path, wrapper: str) -> None:
    tensors = random_tensors()
    stored = {re.sub(r"(blocks\.\d+\.)", rf"\1{wrapper}.", name): tensor for name, tensor in tensors.items()}
    assert stored.keys() != tensors.keys()
    assert_same(load_checkpoint(write_pt(tmp_path / "model.pt", prefixed("model.", stored))), tensors)


def test_a_tensor_that_is_wrong_has_its_name_in_the_file(tmp_path: Path) -> None:
    tensors = prefixed("module.", random_tensors())
    name = "module.decoder.blocks.1.mlp.2.bias"
    assert_refused(write_pt(tmp_path / "a.pt", tensors | {name: torch.zeros(3).half()}), repr(name), "is (3,)")
    assert_refused(write_pt(tmp_path / "a.pt", tensors | {"module.more": torch.zeros(3)}), "'module.more'")
    del tensors[name]
    assert_refused(write_pt(tmp_path / "a.pt", tensors), "lacks tensor", "decoder.blocks.1.mlp.2.bias'")


@pytest.mark.parametrize("missing", [[], ["encoder.conv1.weight"], NAMES[:-1]])
def test_two_models_are_not_mixed(tmp_path: Path, missing: list[str]) -> None:
    student = prefixed("model.", {name: t for name, t in random_tensors().items() if name not in missing})
    path = write_pt(tmp_path / "model.pt", prefixed("ema.", random_tensors()) | student)
    assert_refused(path, "holds tensors of 2 models", "'ema.', 'model.'")


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["module.encoder.ln_post.bias"] = torch.ones(16).half()
    assert_refused(write_pt(tmp_path / "model.pt", tensors), "both", "'module.encoder.ln_post.bias'")


# ---- what is around the tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state", "net"])
@pytest.mark.parametrize("legacy", [False, True])
def test_dimensions_and_one_state_dict_are_a_checkpoint(tmp_path: Path, key: str, legacy: bool) -> None:
    tensors = random_tensors()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"dims": asdict(DIMS), key: prefixed("model.", tensors), "optimizer": optimizer, "epoch": 3}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(load_checkpoint(tmp_path / "model.pt"), tensors)


def test_dimensions_may_be_openais_object(tmp_path: Path) -> None:
    tensors = random_tensors()
    assert_same(load_checkpoint(write_pt(tmp_path / "model.pt", tensors, DIMS)), tensors)
    wrong = replace(DIMS, n_mels="3")
    assert_refused(write_pt(tmp_path / "wrong.pt", tensors, wrong), "n_mels is '3', expected a positive integer")


LIGHTNING = {"pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}, "epoch": 3}


@pytest.mark.parametrize(
    ("around", "key", "prefix", "what"),
    [
        (LIGHTNING, "state_dict", "model.", "a checkpoint of PyTorch Lightning"),
        ({"optimizer": {}, "epoch": 3}, "model", "module.", "a checkpoint of a training run"),
        ({}, None, "", "a bare state dict"),
        ({}, None, "_orig_mod.model.", "a bare state dict"),
    ],
)
def test_tensors_without_dimensions(
    tmp_path: Path, around: dict[str, Any], key: str, prefix: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors()
    stored = prefixed(prefix, tensors) | ({"criterion.weight": torch.ones(3)} if key else {})
    torch.save(around | ({key: stored} if key else stored), tmp_path / "a.ckpt")
    assert_refused(tmp_path / "a.ckpt", what, "without the dimensions")
    assert_same(after_lines(tmp_path / "a.ckpt", tmp_path, monkeypatch), tensors)


def test_a_safetensors_file_without_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors()
    save_file(prefixed("model.", tensors), tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", "has no 'whisper_dims'")
    assert_same(after_lines(tmp_path / "a.safetensors", tmp_path, monkeypatch), tensors)


def test_several_state_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"dims": asdict(DIMS), "ema": random_tensors(), "model": random_tensors(torch.float32)}
    torch.save(content, tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt", "with tensors under 'ema', 'model'")
    assert_same(after_lines(tmp_path / "a.pt", tmp_path, monkeypatch), content["ema"])


def test_hugging_faces_tensors_in_a_file_of_a_trainer(tmp_path: Path) -> None:
    torch.save(LIGHTNING | {"state_dict": prefixed("net.", hugging_face_names(random_tensors()))}, tmp_path / "a.ckpt")
    assert_refused(tmp_path / "a.ckpt", "of PyTorch Lightning", "give the folder", ".from_pretrained('NAME')", "'net.'")


def test_a_whole_model_that_was_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Whisper(DIMS)
    model.load_state_dict(random_tensors())  # openai-whisper's positions are memory that nobody has written
    torch.save(model, tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt", "would run or build whisper.model.Whisper", "a whole model", "if you trust it")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    assert_same(after_lines(tmp_path / "a.pt", tmp_path, monkeypatch), tensors)


def test_what_a_trainer_pickled_beside_the_tensors(tmp_path: Path) -> None:
    content = {"state_dict": random_tensors(), "hyper_parameters": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "a.ckpt")
    assert_refused(tmp_path / "a.ckpt", "argparse.Namespace", "save 'dims' and 'model_state_dict' alone")


# ---- adapters and quantized weights --------------------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "openai/whisper-tiny"}
MERGING = (
    "PEFT adapter (LORA) of openai/whisper-tiny",
    ".from_pretrained('openai/whisper-tiny')",
    "merge_and_unload()",
)
LORA = {
    f"base_model.model.model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": torch.zeros(8, 16) for side in "AB"
}


def test_an_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert_refused(folder, *MERGING)
    save_file(LORA, folder / "adapter_model.safetensors")
    torch.save(LORA, folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.safetensors", folder / "adapter_model.bin"):
        assert_refused(path, *MERGING)
    (folder / "adapter_config.json").unlink()
    assert_refused(folder / "adapter_model.bin", "PEFT adapter", "where it was trained", "merge_and_unload()")


def test_an_adapter_beside_its_model(tmp_path: Path) -> None:
    tensors = random_tensors()
    folder = write_folder(tmp_path / "model", hugging_face_names(tensors))
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert_refused(folder, *MERGING, f"or give {folder / 'model.safetensors'} for the model")
    assert_same(load_checkpoint(folder / "model.safetensors"), tensors)


@pytest.mark.parametrize("names", ["{}.base_layer.{}", "{}.modules_to_save.default.{}"])
def test_an_adapter_that_still_wraps_its_model(tmp_path: Path, names: str) -> None:
    stored = {}
    for name, tensor in hugging_face_names(random_tensors()).items():
        module, _, kind = name.rpartition(".")
        stored["base_model.model." + (names.format(module, kind) if module.endswith("q_proj") else name)] = tensor
    for extra in ({}, LORA):
        assert_refused(write_folder(tmp_path / "model", stored | extra), "PEFT adapter", "merge_and_unload()")
    assert_refused(write_pt(tmp_path / "model.pt", stored), "PEFT adapter", "merge_and_unload()")


def test_quantized_weights(tmp_path: Path) -> None:
    stored = hugging_face_names(random_tensors())
    config = CONFIG | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    folder = write_folder(tmp_path / "model", stored, config=config)
    assert_refused(folder, "the weights are quantized", "dequantize()")
    assert_same(
        load_checkpoint(write_folder(tmp_path / "none", stored, config=CONFIG | {"quantization_config": None})),
        random_tensors(),
    )
    name = "model.encoder.layers.0.fc1"
    for extra in ("SCB", "weight_format", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "qweight"):
        folder = write_folder(tmp_path / extra, stored | {f"{name}.{extra}": torch.zeros(2)})
        assert_refused(folder, "the weights are quantized", "dequantize()")
    path = write_pt(tmp_path / "a.pt", random_tensors() | {"encoder.blocks.0.mlp.0._packed_params.dtype": torch.qint8})
    assert_refused(path, "the weights are quantized")


# ---- the output projection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output", [torch.float16, torch.bfloat16, torch.float32])
def test_an_equal_output_projection_in_any_dtype(tmp_path: Path, stored: torch.dtype, output: torch.dtype) -> None:
    tensors = random_tensors(stored)
    embedding = tensors["decoder.token_embedding.weight"]
    for projection in (embedding.to(output), embedding.float().to(output)):
        named = hugging_face_names(tensors) | {OUTPUT: projection.clone()}
        assert_same(load_checkpoint(write_folder(tmp_path / "model", named)), tensors)
    projection = embedding.to(output).clone()
    projection[3, 3] *= 1.5
    named = hugging_face_names(tensors) | {OUTPUT: projection}
    assert_refused(write_folder(tmp_path / "model", named), "'proj_out.weight' differs")


def test_an_embedding_that_was_rounded_after_the_output_projection(tmp_path: Path) -> None:
    tensors = random_tensors(torch.float32)
    full = tensors["decoder.token_embedding.weight"]
    tensors["decoder.token_embedding.weight"] = full.half()
    named = hugging_face_names(tensors) | {OUTPUT: full}
    assert_same(load_checkpoint(write_folder(tmp_path / "model", named)), tensors)


def test_an_output_projection_that_overflows_in_the_other_dtype_differs(tmp_path: Path) -> None:
    tensors = random_tensors()
    projection = tensors["decoder.token_embedding.weight"].float()
    projection[3, 3] = 1e30
    named = hugging_face_names(tensors) | {OUTPUT: projection}
    assert_refused(write_folder(tmp_path / "model", named), "'proj_out.weight' differs")


def test_a_tied_embedding_that_is_stored_as_output_projection_alone(tmp_path: Path) -> None:
    tensors = random_tensors()
    named = hugging_face_names(tensors)
    named[OUTPUT] = named.pop("model.decoder.embed_tokens.weight")
    assert_same(load_checkpoint(write_folder(tmp_path / "model", named)), tensors)
    config = CONFIG | {"tie_word_embeddings": False}
    assert_refused(write_folder(tmp_path / "model", named, config=config), "lacks tensor 'model.decoder.embed_tokens")
    named[OUTPUT] = torch.zeros(50, 15).half()
    assert_refused(write_folder(tmp_path / "model", named), "'proj_out.weight' is (50, 15), expected (50, 16)")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_named(tmp_path: Path) -> None:
    name = "decoder.ln.bias"
    path = write_pt(tmp_path / "model.pt", random_tensors() | {name: torch.nested.nested_tensor([torch.ones(16)])})
    assert_refused(path, repr(name), "not a dense tensor")
