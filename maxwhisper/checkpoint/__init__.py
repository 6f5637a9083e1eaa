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
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper
from safetensors import SafetensorError
from safetensors.torch import save_file
from whisper.model import ModelDimensions

from maxwhisper import names
from maxwhisper.checkpoint.hugging_face import (
    HUGGING_FACE_DIMS,
    hugging_face_name,
    read_config,
    read_weights,
    with_tied_embedding,
)
from maxwhisper.checkpoint.stored import (
    is_safetensors,
    parse_json,
    read_json,
    read_safetensors,
    reason,
    some,
    unpickle,
)
from maxwhisper.checkpoint.vocabulary import check_vocabulary, vocabulary_size
from maxwhisper.checkpoint.wrapped import OUTPUT, Named, model_in, named, rewriting
from maxwhisper.engine.folders import cache_home, folder_named, one_at_a_time, writable
from maxwhisper.errors import CheckpointError, OptionError
from maxwhisper.files import replacing
from maxwhisper.options import refused

Heads = tuple[tuple[int, int], ...]
StrPath = str | os.PathLike[str]

DENSE = (torch.strided, "cpu")
"""Layout and device of a tensor whose values are in memory, one beside the other."""
DTYPES = tuple(getattr(torch, name) for name in names.DTYPES)

_DIMS_KEY = "whisper_dims"
_HEADS_KEY = "whisper_alignment_heads"

# The tensors whose shape states dimensions of the model, for messages.
_STATED_BY = {
    "encoder.positional_embedding": ("n_audio_ctx", "n_audio_state"),
    "encoder.conv1.weight": ("n_audio_state", "n_mels"),
    "decoder.positional_embedding": ("n_text_ctx", "n_text_state"),
    "decoder.token_embedding.weight": ("n_vocab", "n_text_state"),
}


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

    Warns where alignment heads are of another model, and where rows of the token embedding that stand for no token are
    left out. Raises CheckpointError, and OptionError for what is no name.
    """
    if isinstance(name_or_path, str) and name_or_path in whisper.available_models():
        return _load_named(name_or_path, download_root)
    if not isinstance(name_or_path, str | os.PathLike):
        raise refused("name", name_or_path, "the name of a model, or of a file or folder")
    path = Path(name_or_path)
    if os.path.isdir(name_or_path):  # not of the path, which makes the folder one is in of an empty name
        return _load_hugging_face(path)
    if not os.path.isfile(path):
        if os.path.exists(name_or_path):
            raise CheckpointError(f"{path}: neither a file nor a folder, expected a checkpoint")
        names = ", ".join(whisper.available_models())
        shown = path if name_or_path else "''"
        raise CheckpointError(f"{shown}: no such file or folder, nor one of the model names {names}")
    return _load_safetensors(path) if is_safetensors(path) else _load_openai(path)


def convert(source: StrPath, destination: StrPath) -> Path:
    """Writes the checkpoint `source` as one safetensors file, with the dimensions and alignment heads in its metadata.

    An existing `destination` is replaced, in one step, once the new file is complete.

    Raises CheckpointError if `source` cannot be used, OptionError if `destination` cannot be written.
    """
    destination = Path(destination)
    if destination.suffix != ".safetensors":
        raise OptionError(f"{destination}: the destination must be a file name that ends in .safetensors")
    try:
        with replacing(destination) as unfinished:
            checkpoint = load_checkpoint(source)
            metadata = {_DIMS_KEY: json.dumps(asdict(checkpoint.dims))}
            if checkpoint.alignment_heads is not None:
                metadata[_HEADS_KEY] = json.dumps(checkpoint.alignment_heads)
            # Cloned, because safetensors refuses tensors that share memory, as tied ones do.
            tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
            unfinished.touch()
            mode = unfinished.stat().st_mode
            save_file(tensors, unfinished, metadata)
            unfinished.chmod(mode)  # safetensors makes its files private
    except (OSError, SafetensorError) as error:
        raise OptionError(f"{destination}: cannot be written: {reason(error)}") from error
    return destination


def expected_tensors(dims: ModelDimensions) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor of OpenAI's Whisper of these dimensions, in the state dict's order."""
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
    download_root = folder_named("download_root", download_root)
    try:
        path = Path(_fetched(whisper._MODELS[name], str(download_root)))
    except Exception as error:  # the network and the disk, but also a server's answer that the downloader stumbles over
        raise CheckpointError(f"{name}: cannot be fetched into {download_root}: {reason(error)}") from error
    checkpoint = _load_openai(path)
    dims = checkpoint.dims
    mask = np.frombuffer(gzip.decompress(base64.b85decode(whisper._ALIGNMENT_HEADS[name])), dtype=bool)
    pairs = np.argwhere(mask.reshape(dims.n_text_layer, dims.n_text_head)).tolist()
    return replace(checkpoint, name=name, alignment_heads=_heads(path, dims, pairs))


def _fetched(url: str, root: str) -> str:
    """Returns the file that openai-whisper's downloader has put into a folder: one process does, others wait for it, or
    they would write into the same file."""
    file = os.path.abspath(os.path.join(root, os.path.basename(url)))
    with one_at_a_time(file):
        if not os.path.isfile(file):
            return whisper._download(url, root, in_memory=False)
    return whisper._download(url, root, in_memory=False)  # which reads all of it, for its checksum


def _load_openai(path: Path) -> Checkpoint:
    dims, stored = model_in(path, unpickle(path))
    dimensions = _dimensions(path, dims)
    check_vocabulary(path, dimensions.n_vocab)
    return Checkpoint(path.stem, path, dimensions, _validated(path, dimensions, named(path, stored)), None)


def _load_safetensors(path: Path) -> Checkpoint:
    stored, metadata = read_safetensors(path)
    if _DIMS_KEY not in metadata:
        if os.path.isfile(path.parent / "config.json"):
            return _load_hugging_face(path.parent, path)
        lacks = f"has no {_DIMS_KEY!r} in its metadata and no config.json beside it"
        raise CheckpointError(f"{path}: {lacks}; {rewriting(path, stored)}")
    dims = _dimensions(path, parse_json(path, metadata[_DIMS_KEY]))
    check_vocabulary(path, dims.n_vocab)
    tensors = _validated(path, dims, named(path, stored))
    heads = _heads(path, dims, parse_json(path, metadata.get(_HEADS_KEY, "null")))
    return Checkpoint(path.stem, path, dims, tensors, heads)


def _load_hugging_face(folder: Path, weights: Path | None = None) -> Checkpoint:
    config = read_config(folder, weights)
    dims = _dimensions(folder / "config.json", {ours: config[theirs] for ours, theirs in HUGGING_FACE_DIMS.items()})
    path, stored = read_weights(folder, weights)
    model = named(path, stored)
    output = model.tensors.get(OUTPUT)
    if has_output := OUTPUT in model.tensors:
        model = with_tied_embedding(model, config)
    tensors = _validated(path, dims, model, hugging_face_name)
    if has_output:
        _check_tied(path, output, tensors["decoder.token_embedding.weight"])
    generation = folder / "generation_config.json"
    generating = read_json(generation) if os.path.isfile(generation) else {}
    heads = _heads(generation, dims, generating.get("alignment_heads"))
    dims = _without_added_rows(folder, dims, tensors, generating)
    return Checkpoint(folder.resolve().name, folder, dims, tensors, heads)


def _check_tied(path: Path, output: object, embedding: torch.Tensor) -> None:
    """Accepts an output projection that is the token embedding, or one of the two rounded to the dtype of the other."""
    output = _checked(f"{path}: tensor {OUTPUT!r}", output, tuple(embedding.shape))
    if not torch.equal(output, embedding.to(output.dtype)) and not torch.equal(output.to(embedding.dtype), embedding):
        raise CheckpointError(f"{path}: tensor {OUTPUT!r} differs from the token embedding it is tied to")


def _without_added_rows(
    folder: Path, dims: ModelDimensions, tensors: dict[str, torch.Tensor], generating: dict[str, Any]
) -> ModelDimensions:
    """Cuts rows that stand for no token from the token embedding in `tensors`; returns the dimensions without them."""
    size = vocabulary_size(folder, dims.n_vocab, generating)
    if size < dims.n_vocab:
        _warn(
            f"{folder}: the {dims.n_vocab - size} rows of the token embedding behind OpenAI's vocabulary of {size} are"
            " left out, since the tokenizer beside it has no tokens for them"
        )
        name = "decoder.token_embedding.weight"
        tensors[name] = tensors[name][:size]
    return replace(dims, n_vocab=size)


def _dimensions(path: Path, values: object) -> ModelDimensions:
    values = vars(values) if isinstance(values, ModelDimensions) else values
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
    """Returns alignment heads in OpenAI's order; None, with a warning, where there are none or another model's."""
    if pairs is None:
        return None
    shape = f"a layer (of {dims.n_text_layer}) and a head (of {dims.n_text_head})"
    if not isinstance(pairs, list) or not all(_is_head(pair) for pair in pairs):
        raise CheckpointError(f"{path}: the alignment heads must be pairs of {shape}")
    astray = [pair for pair in pairs if pair[0] >= dims.n_text_layer or pair[1] >= dims.n_text_head]
    if astray or not pairs:
        found = f"of the alignment heads, {some(astray)} are not {shape}" if astray else "the alignment heads are empty"
        _warn(f"{path}: {found}; word timestamps use OpenAI's default, all heads of the upper half of the layers")
        return None
    return tuple(sorted({(layer, head) for layer, head in pairs}))


def _is_head(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(index) is int and index >= 0 for index in pair)


def _warn(message: str) -> None:
    """Warns at the line outside of this package that asked for a checkpoint, so that each is told once."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _validated(
    path: Path, dims: ModelDimensions, model: Named, plain_name: Callable[[str], str] = str
) -> dict[str, torch.Tensor]:
    """Returns the tensors of `model` in OpenAI's names and order; `plain_name` maps an OpenAI name to the one there."""
    # Before anything is listed by layer: the dimensions may claim any number of them.
    for part, claimed in (("encoder", dims.n_audio_layer), ("decoder", dims.n_text_layer)):
        pattern = re.compile(rf"{part}\.(?:blocks|layers)\.([0-9]+)\.")
        found = len({match[1] for name in model.tensors if (match := pattern.match(name))})
        if found != claimed:
            key = "n_audio_layer" if part == "encoder" else "n_text_layer"
            raise CheckpointError(f"{path}: {key} is {claimed}, but the tensors of {found} {part} layers are stored")
    shapes = expected_tensors(dims)
    names = {name: plain_name(name) for name in shapes}
    if missing := set(names.values()) - model.tensors.keys():
        raise CheckpointError(f"{path}: lacks tensor {some(model.prefix + name for name in missing)}")
    if unexpected := model.tensors.keys() - set(names.values()):
        raise CheckpointError(f"{path}: holds unexpected tensor {some(model.names[name] for name in unexpected)}")
    tensors = {}
    for name, shape in shapes.items():
        stated = ", ".join(f"{key} is {getattr(dims, key)}" for key in _STATED_BY.get(name, ()))
        where = f"{path}: tensor {model.names[names[name]]!r}"
        tensors[name] = _checked(where, model.tensors[names[name]], shape, f" since {stated}" if stated else "")
    return tensors


def _checked(where: str, tensor: object, shape: tuple[int, ...], because: str = "") -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.is_nested or (tensor.layout, tensor.device.type) != DENSE:
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
