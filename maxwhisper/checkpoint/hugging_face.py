"""Hugging Face Whisper folders: their configuration and tensors as they are stored, and their names for both."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from maxwhisper.checkpoint.stored import read_json, read_tensors, some
from maxwhisper.checkpoint.wrapped import OUTPUT, Named, refuse_adapter, refuse_quantized
from maxwhisper.errors import CheckpointError

HUGGING_FACE_DIMS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
_PARTS = {
    "blocks": "layers",
    "attn": "self_attn",
    "attn_ln": "self_attn_layer_norm",
    "cross_attn": "encoder_attn",
    "cross_attn_ln": "encoder_attn_layer_norm",
    "mlp_ln": "final_layer_norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "out_proj",
    "ln_post": "layer_norm",
    "ln": "layer_norm",
    "token_embedding": "embed_tokens",
    "positional_embedding": "embed_positions.weight",
}
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INSIDE = ("snapshots/*/config.json", "*/config.json", "*.pt")
"""What a folder without config.json may hold that loads: a cache of the hub, a trainer's steps, OpenAI's format."""
_OF_OTHERS = {"n_audio_state": "MLX", "lang_ids": "CTranslate2"}
"""A key of config.json by which other libraries' models are known."""


def read_config(folder: Path, weights: Path | None) -> dict[str, Any]:
    """Reads config.json, with every key of HUGGING_FACE_DIMS.

    `weights`: the file that was asked for, if it was not the folder. Raises CheckpointError for another kind of model,
    for quantized weights, and for a folder with an adapter, which transformers would apply.
    """
    if weights is None and os.path.isfile(folder / "adapter_config.json"):
        refuse_adapter(folder)
    path = folder / "config.json"
    if not os.path.lexists(path):
        inside = next((found for pattern in _INSIDE for found in sorted(folder.glob(pattern))), None)
        instead = f": give {inside.parent if inside.name == path.name else inside}" if inside else ""
        raise CheckpointError(f"{folder}: has no config.json, as the folder of a Hugging Face model has{instead}")
    config = {"activation_function": "gelu", "scale_embedding": False} | read_json(path)
    if foreign := next((key for key in _OF_OTHERS if key in config), None):
        raise CheckpointError(
            f"{path}: has {foreign!r}, as a model converted for {_OF_OTHERS[foreign]} has, expected the Hugging Face"
            " model that it was made from"
        )
    for key, needed in (("model_type", "whisper"), ("activation_function", "gelu"), ("scale_embedding", False)):
        if config.get(key) != needed:
            raise CheckpointError(f"{path}: {key} is {config.get(key)!r}, expected {needed!r}")
    if config.get("quantization_config"):
        refuse_quantized(folder)
    if missing := set(HUGGING_FACE_DIMS.values()) - config.keys():
        raise CheckpointError(f"{path}: lacks {some(missing)}")
    return config


def with_tied_embedding(model: Named, config: dict[str, Any]) -> Named:
    """Returns `model` without its output projection, which is the token embedding where one of the two was stored."""
    tensors, names = dict(model.tensors), dict(model.names)
    output, name = tensors.pop(OUTPUT), names.pop(OUTPUT)
    embedding = hugging_face_name("decoder.token_embedding.weight")
    if config.get("tie_word_embeddings") is not False:
        tensors.setdefault(embedding, output)
        names.setdefault(embedding, name)
    return replace(model, names=names, tensors=tensors)


def hugging_face_name(name: str) -> str:
    """Turns the name of a tensor in OpenAI's state dict into Hugging Face's, without the "model." before it."""
    parts = name.replace("mlp.0", "fc1").replace("mlp.2", "fc2").split(".")
    return ".".join(_PARTS.get(part, part) for part in parts)


def read_weights(folder: Path, weights: Path | None) -> tuple[Path, dict[Any, Any]]:
    """Returns the file, of all shards their index, and the tensors in it by the names they have there.

    Reads `weights` if given. Raises CheckpointError.
    """
    path = weights or next((folder / file for file in _WEIGHTS if os.path.isfile(folder / file)), None)
    if path is None:
        raise CheckpointError(f"{folder}: holds none of {', '.join(_WEIGHTS)}")
    if path.suffix != ".json":
        return path, read_tensors(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and "\0" not in file for file in weight_map.values()
    ):
        raise CheckpointError(f"{path}: 'weight_map' must give a file name for each tensor")
    stored: dict[Any, Any] = {}
    for file in sorted(set(weight_map.values())):
        shard = read_tensors(folder / file)
        if astray := shard.keys() ^ {name for name in weight_map if weight_map[name] == file}:
            raise CheckpointError(f"{folder / file}: this file and {path.name} disagree on holding {some(astray)}")
        stored |= shard
    return path, stored
