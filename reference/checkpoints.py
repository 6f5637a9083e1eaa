"""Weights and alignment heads as oracle and peer get them, read by openai-whisper or from safetensors, and whether the
subject's loader has read the same."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import whisper
from safetensors import SafetensorError, safe_open
from torch import Tensor
from whisper.model import ModelDimensions, Whisper

EMBEDDING, OUTPUT = "decoder.token_embedding.weight", "proj_out.weight"
NAMES = (
    (".layers.", ".blocks."),
    ("self_attn_layer_norm", "attn_ln"),
    ("encoder_attn_layer_norm", "cross_attn_ln"),
    ("self_attn", "attn"),
    ("encoder_attn", "cross_attn"),
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("out_proj", "out"),
    ("final_layer_norm", "mlp_ln"),
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
    ("encoder.layer_norm", "encoder.ln_post"),
    ("decoder.layer_norm", "decoder.ln"),
    ("embed_tokens", "token_embedding"),
    ("embed_positions.weight", "positional_embedding"),
)
"""Parts of Hugging Face's names and OpenAI's for them, to be replaced one after the other: those of transformers'
convert_openai_to_hf.py, the other way round."""


class UnreadableError(Exception):
    """A checkpoint that no reader but maxwhisper's own reads."""


def read(source: str | Path, n_vocab: int) -> Whisper:
    """Reads a checkpoint into openai-whisper's model in float32, with its alignment heads.

    source: what `maxwhisper.load_checkpoint` is given. n_vocab: the tokens of its vocabulary, behind which rows that a
    trainer has added to the token embedding are left out. Raises UnreadableError.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return hugging_face(path, sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.bin")), n_vocab)
        if path.suffix != ".safetensors":
            return whisper.load_model(os.fspath(source), device="cpu")
        tensors, metadata = stored(path)
        if "whisper_dims" not in metadata:
            return hugging_face(path.parent, [path], n_vocab)
        heads = json.loads(metadata.get("whisper_alignment_heads", "null"))
        return model_of(ModelDimensions(**json.loads(metadata["whisper_dims"])), tensors, heads)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, UnpicklingError, SafetensorError) as error:
        raise UnreadableError(f"{source}: only maxwhisper's loader reads it: {error}".partition("\n")[0]) from error


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file of weights as they are named there, and its metadata."""
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True), {}
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def hugging_face(folder: Path, files: list[Path], n_vocab: int) -> Whisper:
    """Reads a Hugging Face folder by its config.json and its files of weights."""
    config, tensors = json.loads((folder / "config.json").read_text()), dict[str, Tensor]()
    for file in files:
        tensors |= {openai_name(name): tensor for name, tensor in stored(file)[0].items()}
    output = tensors.pop(OUTPUT, torch.empty(0))
    tensors[EMBEDDING] = tensors.get(EMBEDDING, output)[:n_vocab]
    of = {"state": "d_model", "head": "{}_attention_heads", "layer": "{}_layers"}
    sides = (("audio", "encoder"), ("text", "decoder"))
    sizes = {f"n_{ours}_{what}": config[key.format(side)] for ours, side in sides for what, key in of.items()}
    contexts = {"n_audio_ctx": config["max_source_positions"], "n_text_ctx": config["max_target_positions"]}
    dims = ModelDimensions(n_mels=config["num_mel_bins"], n_vocab=len(tensors[EMBEDDING]), **sizes, **contexts)
    generation = folder / "generation_config.json"
    generating = json.loads(generation.read_text()) if generation.is_file() else {}
    return model_of(dims, tensors, generating.get("alignment_heads"))


def openai_name(name: str) -> str:
    """Returns OpenAI's name for one of Hugging Face's."""
    name = name.removeprefix("model.")
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


def model_of(dims: ModelDimensions, tensors: Mapping[str, Tensor], heads: Any) -> Whisper:
    """Returns openai-whisper's model; without heads, or with another model's, it has OpenAI's default."""
    model = Whisper(dims)
    model.load_state_dict(tensors)
    if heads and all(layer < dims.n_text_layer and head < dims.n_text_head for layer, head in heads):
        mask = torch.zeros(dims.n_text_layer, dims.n_text_head, dtype=torch.bool)
        mask[tuple(torch.tensor(heads).T)] = True
        model.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return model


# ---- do the loaders agree? -----------------------------------------------------------------------------------------


def differences(
    dims: ModelDimensions, tensors: Mapping[str, Tensor], right_dims: ModelDimensions, right: Mapping[str, Tensor]
) -> dict[str, str]:
    """Returns what the subject's loader has in the place of what is right, by dimension and tensor, where they differ.

    Values are compared whatever dtype they are held in.
    """
    sizes = {name: (getattr(dims, name), size) for name, size in vars(right_dims).items()}
    wrong = {name: f"it is {ours}, not {theirs}" for name, (ours, theirs) in sizes.items() if ours != theirs}
    wrong |= {name: "it is not in the file" for name in tensors.keys() - right.keys()}
    exact = {name: tensor.float() for name, tensor in right.items()}
    for name, theirs in exact.items():
        if name not in tensors:
            wrong[name] = "it is missing"
        elif not torch.equal(ours := tensors[name].float(), theirs):
            wrong[name] = looks_like(ours, theirs, {other: x for other, x in exact.items() if other != name})
    return wrong


def differing_heads(ours: Sequence[Sequence[int]] | None, right: Whisper) -> dict[str, str]:
    """Returns what differs of the alignment heads, a layer and a head each; None stands for OpenAI's default."""
    dims, theirs = right.dims, right.alignment_heads.coalesce().indices().T.tolist()
    if ours is None:
        upper = range(dims.n_text_layer // 2, dims.n_text_layer)
        ours = [(layer, head) for layer in upper for head in range(dims.n_text_head)]
    found = sorted(map(list, ours))
    return {} if found == theirs else {"alignment heads": f"they are {found}, not {theirs}"}


def looks_like(ours: Tensor, theirs: Tensor, others: Mapping[str, Tensor]) -> str:
    """Says what a loader has done to a tensor, where that can be told."""
    if source := next((name for name, x in others.items() if torch.equal(x, ours)), None):
        return f"it holds {source}"
    if ours.shape == theirs.shape[::-1] and torch.equal(ours, theirs.permute(*range(theirs.ndim)[::-1])):
        return "it is transposed"
    if ours.shape != theirs.shape:
        return f"it is {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    if not ours.any():
        return "it is zero"
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(ours, theirs.to(dtype).float()):
            return f"it is rounded to {dtype}"
    return f"{int((ours != theirs).sum())} of {ours.numel()} values differ"
