"""Checkpoints of a small Whisper in every format, for the tests of what reads them."""

import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from whisper.model import ModelDimensions, Whisper

from maxwhisper.checkpoint import Checkpoint, load_checkpoint
from maxwhisper.errors import CheckpointError

DIMS = ModelDimensions(
    n_mels=3, n_audio_ctx=6, n_audio_state=16, n_audio_head=4, n_audio_layer=3,
    n_vocab=50, n_text_ctx=7, n_text_state=16, n_text_head=2, n_text_layer=2,
)  # fmt: skip
HEADS = [[1, 0], [0, 1]]
SHAPES = {name: tensor.shape for name, tensor in Whisper(DIMS).state_dict().items()}
NAMES = sorted(SHAPES)

# Hugging Face's names, spelled out, so that a slip in the table under test cannot hide.
HUGGING_FACE = [
    ("model.encoder.embed_positions.weight", "encoder.positional_embedding"),
    ("model.encoder.layer_norm.", "encoder.ln_post."),
    ("model.decoder.embed_positions.weight", "decoder.positional_embedding"),
    ("model.decoder.embed_tokens.weight", "decoder.token_embedding.weight"),
    ("model.decoder.layer_norm.", "decoder.ln."),
    ("model.encoder.conv1.", "encoder.conv1."),
    ("model.encoder.conv2.", "encoder.conv2."),
]
for _part, _layers in (("encoder", 3), ("decoder", 2)):
    for _i in range(_layers):
        _theirs, _ours = f"model.{_part}.layers.{_i}.", f"{_part}.blocks.{_i}."
        for _their_attn, _our_attn in (("self_attn", "attn"), ("encoder_attn", "cross_attn")):
            for _their_linear, _our_linear in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
                HUGGING_FACE.append(
                    (f"{_theirs}{_their_attn}.{_their_linear}_proj.", f"{_ours}{_our_attn}.{_our_linear}.")
                )
            HUGGING_FACE.append((f"{_theirs}{_their_attn}_layer_norm.", f"{_ours}{_our_attn}_ln."))
        HUGGING_FACE.append((f"{_theirs}fc1.", f"{_ours}mlp.0."))
        HUGGING_FACE.append((f"{_theirs}fc2.", f"{_ours}mlp.2."))
        HUGGING_FACE.append((f"{_theirs}final_layer_norm.", f"{_ours}mlp_ln."))

CONFIG = {
    "model_type": "whisper", "activation_function": "gelu", "scale_embedding": False,
    "num_mel_bins": 3, "max_source_positions": 6, "d_model": 16, "encoder_attention_heads": 4, "encoder_layers": 3,
    "vocab_size": 50, "max_target_positions": 7, "decoder_attention_heads": 2, "decoder_layers": 2,
}  # fmt: skip

Tensors = dict[str, Any]


def random_tensors(dtype: torch.dtype = torch.float16, dims: ModelDimensions = DIMS) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES if dims is DIMS else {name: t.shape for name, t in Whisper(dims).state_dict().items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def hugging_face_names(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        theirs, ours = next((t, o) for t, o in HUGGING_FACE if name.startswith(o))
        renamed[theirs + name.removeprefix(ours)] = tensor
    return renamed


def write_pt(path: Path, tensors: Tensors, dims: object = None, **options: Any) -> Path:
    torch.save({"dims": asdict(DIMS) if dims is None else dims, "model_state_dict": tensors}, path, **options)
    return path


def write_safetensors(path: Path, tensors: Tensors, dims: object = None, heads: object = None) -> Path:
    metadata = {"whisper_dims": json.dumps(asdict(DIMS) if dims is None else dims)}
    if heads is not None:
        metadata["whisper_alignment_heads"] = json.dumps(heads)
    save_file(tensors, path, metadata)
    return path


def write_folder(folder: Path, tensors: Tensors, file: str = "model.safetensors", config: object = None) -> Path:
    """Writes a Hugging Face folder, `tensors` by its names; an index file stands for two shards and the index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save: Callable[[Tensors, Path], Any] = torch.save if ".bin" in file else save_file
    if not file.endswith(".json"):
        save(tensors, folder / file)
        return folder
    shards = [file.replace(".index.json", "").replace(".", f"-{i}-of-2.") for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save({name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}, folder / shard)
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def compressed(path: Path) -> Path:
    """Returns the same zip archive with every entry deflated."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def assert_same(loaded: Checkpoint, tensors: Tensors, dims: ModelDimensions = DIMS) -> None:
    assert loaded.dims == dims
    assert list(loaded.tensors) == list(SHAPES if dims is DIMS else Whisper(dims).state_dict())
    for name, tensor in loaded.tensors.items():
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name
        assert tensor.is_contiguous() and tensor.device.type == "cpu", name


def assert_refused(path: str | Path, *parts: str, **options: Any) -> None:
    """Requires that loading is refused in one line that contains each of `parts`, and nothing else is said."""
    with pytest.raises(CheckpointError) as refusal, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        load_checkpoint(path, **options)
    message = str(refusal.value)
    assert "\n" not in message
    assert [warning.message for warning in caught if warning.category is UserWarning] == []
    for part in (str(path), *parts):
        assert part in message, message
