"""OpenAI checkpoints, safetensors files and Hugging Face folders, read into one validated state dict.

Whatever the source, the result holds exactly the tensors of OpenAI's Whisper in OpenAI's names and order
(https://github.com/openai/whisper, model.py). A checkpoint is refused, with a `CheckpointError` that names the
file and the tensor, if any tensor is missing, unexpected, misshapen, not finite, or stored in a type other than
float16, bfloat16 and float32. float64 is refused too: no published Whisper uses it, and narrowing would change
its values unasked.

Pickles are read with `weights_only=True`, so that no checkpoint can run code. Tensors are memory-mapped where the
file allows it. The checksums inside a `.pt` archive are verified. Safetensors files, and pickles older than torch 1.6,
carry none: in those a changed byte inside a tensor is noticed only if it makes the tensor non-finite.
"""

import base64
import gzip
import json
import math
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from whisper.model import ModelDimensions

from .cache import cache_home, writable
from .errors import CheckpointError, OptionError

Heads = tuple[tuple[int, int], ...]
StrPath = str | os.PathLike[str]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_DIMS_KEY = "whisper_dims"
_HEADS_KEY = "whisper_alignment_heads"

# The tensors whose shape states dimensions of the model, for messages.
_STATED_BY = {
    "encoder.positional_embedding": ("n_audio_ctx", "n_audio_state"),
    "encoder.conv1.weight": ("n_audio_state", "n_mels"),
    "decoder.positional_embedding": ("n_text_ctx", "n_text_state"),
    "decoder.token_embedding.weight": ("n_vocab", "n_text_state"),
}

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
_HUGGING_FACE_PARTS = {
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
_HUGGING_FACE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A validated Whisper checkpoint.

    `tensors` holds every tensor of OpenAI's state dict, in OpenAI's names and order: contiguous, on the CPU, in the
    dtype it is stored in. `alignment_heads` are the (layer, head) pairs of cross-attention used for word timestamps;
    None stands for OpenAI's default, all heads of the upper half of the decoder.
    """

    name: str
    path: Path
    dims: ModelDimensions
    tensors: dict[str, torch.Tensor] = field(repr=False)
    alignment_heads: Heads | None


def load_checkpoint(name_or_path: StrPath, download_root: StrPath | None = None) -> Checkpoint:
    """Reads and validates a checkpoint.

    `name_or_path` is one of OpenAI's model names ("tiny", ..., "turbo"), an OpenAI `.pt` file, a `.safetensors` file
    written by `convert`, or a Hugging Face Whisper folder (or the safetensors file inside it). A named model is fetched
    by openai-whisper's own downloader into `download_root`, by default `$XDG_CACHE_HOME/whisper` or `~/.cache/whisper`.

    Raises CheckpointError.
    """
    if isinstance(name_or_path, str) and name_or_path in whisper.available_models():
        return _load_named(name_or_path, download_root)
    path = Path(name_or_path)
    if os.path.isdir(path):
        return _load_hugging_face(path)
    if not os.path.isfile(path):
        names = ", ".join(whisper.available_models())
        raise CheckpointError(f"{path}: no such file or folder, nor one of the model names {names}")
    return _load_safetensors(path) if path.suffix == ".safetensors" else _load_openai(path)


def convert(source: StrPath, destination: StrPath) -> Path:
    """Writes the checkpoint `source` as one safetensors file, with the dimensions and alignment heads in its metadata.

    An existing `destination` is replaced, in one step, once the new file is complete.

    Raises CheckpointError if `source` cannot be used, OptionError if `destination` cannot be written.
    """
    destination = Path(destination)
    if destination.suffix != ".safetensors":
        raise OptionError(f"{destination}: the destination must be a file name that ends in .safetensors")
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=destination.parent) as folder:
            checkpoint = load_checkpoint(source)
            metadata = {_DIMS_KEY: json.dumps(asdict(checkpoint.dims))}
            if checkpoint.alignment_heads is not None:
                metadata[_HEADS_KEY] = json.dumps(checkpoint.alignment_heads)
            # Cloned, because safetensors refuses tensors that share memory, as tied ones do.
            tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
            unfinished = Path(folder) / destination.name
            unfinished.touch()
            mode = unfinished.stat().st_mode
            save_file(tensors, unfinished, metadata)
            unfinished.chmod(mode)  # safetensors makes its files private
            os.replace(unfinished, destination)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"{destination}: cannot be written: {_reason(error)}") from error
    return destination


def expected_tensors(dims: ModelDimensions) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in the state dict of OpenAI's Whisper of these dimensions, in its order."""
    audio, text = dims.n_audio_state, dims.n_text_state
    shapes: dict[str, tuple[int, ...]] = {"encoder.positional_embedding": (dims.n_audio_ctx, audio)}
    shapes |= _layer("encoder.conv1", audio, dims.n_mels, 3)
    shapes |= _layer("encoder.conv2", audio, audio, 3)
    for i in range(dims.n_audio_layer):
        shapes |= _block(f"encoder.blocks.{i}", audio, ("attn",))
    shapes |= _layer("encoder.ln_post", audio)
    shapes["decoder.positional_embedding"] = (dims.n_text_ctx, text)
    shapes["decoder.token_embedding.weight"] = (dims.n_vocab, text)
    for i in range(dims.n_text_layer):
        shapes |= _block(f"decoder.blocks.{i}", text, ("attn", "cross_attn"))
    return shapes | _layer("decoder.ln", text)


def _layer(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _block(name: str, state: int, attentions: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for attention in attentions:
        shapes |= _layer(f"{name}.{attention}.query", state, state)
        shapes[f"{name}.{attention}.key.weight"] = (state, state)  # the key projection has no bias
        shapes |= _layer(f"{name}.{attention}.value", state, state)
        shapes |= _layer(f"{name}.{attention}.out", state, state)
        shapes |= _layer(f"{name}.{attention}_ln", state)
    shapes |= _layer(f"{name}.mlp.0", 4 * state, state)
    shapes |= _layer(f"{name}.mlp.2", state, 4 * state)
    return shapes | _layer(f"{name}.mlp_ln", state)


def _load_named(name: str, download_root: StrPath | None) -> Checkpoint:
    if download_root is None:
        download_root = writable(cache_home() / "whisper")
    try:
        path = Path(whisper._download(whisper._MODELS[name], os.fspath(download_root), in_memory=False))
    except Exception as error:  # the network and the disk, but also a server's answer that the downloader stumbles over
        raise CheckpointError(f"{name}: cannot be fetched into {download_root}: {_reason(error)}") from error
    checkpoint = _load_openai(path)
    dims = checkpoint.dims
    mask = np.frombuffer(gzip.decompress(base64.b85decode(whisper._ALIGNMENT_HEADS[name])), dtype=bool)
    pairs = np.argwhere(mask.reshape(dims.n_text_layer, dims.n_text_head)).tolist()
    return replace(checkpoint, name=name, alignment_heads=_heads(path, dims, pairs))


def _load_openai(path: Path) -> Checkpoint:
    content = _unpickle(path)
    if not {"dims", "model_state_dict"} <= content.keys():
        raise CheckpointError(
            f"{path}: not an OpenAI checkpoint, which holds 'dims' and 'model_state_dict';"
            " for a Hugging Face model give the folder that holds its config.json"
        )
    dims = _dimensions(path, content["dims"])
    return Checkpoint(path.stem, path, dims, _validated(path, dims, content["model_state_dict"]), None)


def _load_safetensors(path: Path) -> Checkpoint:
    stored, metadata = _read_safetensors(path)
    if _DIMS_KEY not in metadata:
        if os.path.isfile(path.parent / "config.json"):
            return _load_hugging_face(path.parent, path)
        raise CheckpointError(f"{path}: has no {_DIMS_KEY!r} in its metadata and no config.json beside it")
    dims = _dimensions(path, _parse_json(path, metadata[_DIMS_KEY]))
    tensors = _validated(path, dims, stored)
    heads = _heads(path, dims, _parse_json(path, metadata.get(_HEADS_KEY, "null")))
    return Checkpoint(path.stem, path, dims, tensors, heads)


def _load_hugging_face(folder: Path, weights: Path | None = None) -> Checkpoint:
    dims = _hugging_face_dimensions(folder / "config.json")
    path, stored = _read_hugging_face_weights(folder, weights)
    has_output = "proj_out.weight" in stored
    output = stored.pop("proj_out.weight", None)
    prefix = "model." if any(str(name).startswith("model.") for name in stored) else ""
    tensors = _validated(path, dims, stored, lambda name: prefix + hugging_face_name(name))
    if has_output:
        embedding = tensors["decoder.token_embedding.weight"]
        output = _checked(f"{path}: tensor 'proj_out.weight'", output, tuple(embedding.shape))
        if output.dtype != embedding.dtype or not torch.equal(output, embedding):
            raise CheckpointError(f"{path}: tensor 'proj_out.weight' differs from the token embedding it is tied to")
    generation = folder / "generation_config.json"
    pairs = _read_json(generation).get("alignment_heads") if os.path.isfile(generation) else None
    return Checkpoint(folder.resolve().name, folder, dims, tensors, _heads(generation, dims, pairs))


def _hugging_face_dimensions(path: Path) -> ModelDimensions:
    config = {"activation_function": "gelu", "scale_embedding": False} | _read_json(path)
    for key, needed in (("model_type", "whisper"), ("activation_function", "gelu"), ("scale_embedding", False)):
        if config.get(key) != needed:
            raise CheckpointError(f"{path}: {key} is {config.get(key)!r}, expected {needed!r}")
    if missing := set(HUGGING_FACE_DIMS.values()) - config.keys():
        raise CheckpointError(f"{path}: lacks {_some(missing)}")
    return _dimensions(path, {ours: config[theirs] for ours, theirs in HUGGING_FACE_DIMS.items()})


def hugging_face_name(name: str) -> str:
    parts = name.replace("mlp.0", "fc1").replace("mlp.2", "fc2").split(".")
    return ".".join(_HUGGING_FACE_PARTS.get(part, part) for part in parts)


def _read_hugging_face_weights(folder: Path, weights: Path | None) -> tuple[Path, dict[Any, Any]]:
    path = weights or next((folder / file for file in _HUGGING_FACE_WEIGHTS if os.path.isfile(folder / file)), None)
    if path is None:
        raise CheckpointError(f"{folder}: holds none of {', '.join(_HUGGING_FACE_WEIGHTS)}")
    if path.suffix != ".json":
        return path, _read_tensors(path)
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: 'weight_map' must give a file name for each tensor")
    stored: dict[Any, Any] = {}
    for file in sorted(set(weight_map.values())):
        shard = _read_tensors(folder / file)
        if astray := shard.keys() ^ {name for name in weight_map if weight_map[name] == file}:
            raise CheckpointError(f"{folder / file}: this file and {path.name} disagree on holding {_some(astray)}")
        stored |= shard
    return path, stored


def _read_tensors(path: Path) -> dict[Any, Any]:
    return _read_safetensors(path)[0] if path.suffix == ".safetensors" else _unpickle(path)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # besides its own error, the reader lets those of the file system and of torch through
        raise CheckpointError(f"{path}: cannot be read as safetensors: {_reason(error)}") from error


def _unpickle(path: Path) -> dict[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on damaged bytes before it gives up on them
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
    except Exception as error:  # on damaged bytes torch raises nearly every built-in exception
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise CheckpointError(f"{path}: refused, since reading it would run or build {foreign[1]}") from error
        raise CheckpointError(f"{path}: damaged, or not a PyTorch checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return content


def _can_be_mapped(path: Path) -> bool:
    """Whether torch can map the tensors in this file; raises BadZipFile if a checksum in the archive does not hold."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False  # the format before torch 1.6
    with zipfile.ZipFile(path) as archive:
        # torch verifies neither the checksums nor the table that locates the tensors
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not hold")
        # and would map compressed entries as if they were plain
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = _parse_json(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def _parse_json(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON: {_reason(error)}") from error


def _dimensions(path: Path, values: object) -> ModelDimensions:
    names = [each.name for each in fields(ModelDimensions)]
    if not isinstance(values, dict) or values.keys() != set(names):
        raise CheckpointError(f"{path}: the dimensions must be exactly {', '.join(names)}")
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {name} is {value!r}, expected a positive integer")
    dims = ModelDimensions(**values)
    for side in ("audio", "text"):
        state, head = values[f"n_{side}_state"], values[f"n_{side}_head"]
        if state % head:
            raise CheckpointError(f"{path}: n_{side}_state is {state}, not divisible by n_{side}_head, which is {head}")
    if dims.n_audio_state != dims.n_text_state:  # cross-attention has no projection between the two
        raise CheckpointError(f"{path}: n_audio_state is {dims.n_audio_state} but n_text_state is {dims.n_text_state}")
    return dims


def _heads(path: Path, dims: ModelDimensions, pairs: object) -> Heads | None:
    if pairs is None:
        return None
    every = [[layer, head] for layer in range(dims.n_text_layer) for head in range(dims.n_text_head)]
    if not isinstance(pairs, list) or not pairs or any(pair not in every for pair in pairs):
        raise CheckpointError(
            f"{path}: the alignment heads must be pairs of a layer (of {dims.n_text_layer}) and a head"
            f" (of {dims.n_text_head})"
        )
    return tuple((layer, head) for layer, head in every if [layer, head] in pairs)


def _validated(
    path: Path, dims: ModelDimensions, stored: object, stored_name: Callable[[str], str] = str
) -> dict[str, torch.Tensor]:
    """The tensors of `stored` in OpenAI's names and order; `stored_name` maps an OpenAI name to the one in the file."""
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: the state dict is a {type(stored).__name__}, expected a dict")
    # Before anything is listed by layer: the dimensions may claim any number of them.
    for part, claimed in (("encoder", dims.n_audio_layer), ("decoder", dims.n_text_layer)):
        pattern = re.compile(rf"(?:model\.)?{part}\.(?:blocks|layers)\.([0-9]+)\.")
        found = len({match[1] for name in stored if (match := pattern.match(str(name)))})
        if found != claimed:
            key = "n_audio_layer" if part == "encoder" else "n_text_layer"
            raise CheckpointError(f"{path}: {key} is {claimed}, but the tensors of {found} {part} layers are stored")
    shapes = expected_tensors(dims)
    names = {name: stored_name(name) for name in shapes}
    if missing := set(names.values()) - stored.keys():
        raise CheckpointError(f"{path}: lacks tensor {_some(missing)}")
    if unexpected := stored.keys() - set(names.values()):
        raise CheckpointError(f"{path}: holds unexpected tensor {_some(unexpected)}")
    tensors = {}
    for name, shape in shapes.items():
        stated = ", ".join(f"{key} is {getattr(dims, key)}" for key in _STATED_BY.get(name, ()))
        where = f"{path}: tensor {names[name]!r}"
        tensors[name] = _checked(where, stored[names[name]], shape, f" since {stated}" if stated else "")
    return tensors


def _checked(where: str, tensor: object, shape: tuple[int, ...], because: str = "") -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(f"{where} is not a dense tensor")
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{where} is stored as {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if tensor.shape != shape:
        raise CheckpointError(f"{where} is {tuple(tensor.shape)}, expected {shape}{because}")
    tensor = tensor.detach().contiguous()
    # Minimum and maximum are NaN if any element is, and take one pass without a temporary.
    if not all(math.isfinite(extreme.item()) for extreme in tensor.aminmax()):
        raise CheckpointError(f"{where} holds values that are not finite")
    return tensor


def _some(names: Any) -> str:
    """Up to three names, and how many more there are."""
    listed = sorted(map(repr, names))
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _reason(error: Exception) -> str:
    """An exception as one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
