"""An OpenAI checkpoint as whisper.cpp's file: matrices in float16, vectors and positions in float32."""

import struct
from pathlib import Path
from typing import BinaryIO

import torch
from whisper.audio import mel_filters

from ..checkpoint import Checkpoint
from .tokens import tokenizer_of

MAGIC = 0x67676D6C
FLOAT32, FLOAT16 = 0, 1
COLUMNS = ("encoder.conv1.bias", "encoder.conv2.bias")
"""Vectors that whisper.cpp adds along time, stored as (channel, 1)."""


def write(checkpoint: Checkpoint, path: Path) -> None:
    dims = checkpoint.dims
    audio = (dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer)
    text = (dims.n_text_ctx, dims.n_text_state, dims.n_text_head, dims.n_text_layer)
    with path.open("wb") as file:
        integers(file, MAGIC, dims.n_vocab, *audio, *text, dims.n_mels, FLOAT16)
        filters = mel_filters("cpu", dims.n_mels)
        integers(file, *filters.shape)
        file.write(filters.float().numpy().tobytes())
        write_vocabulary(checkpoint, file)
        for name, tensor in checkpoint.tensors.items():
            write_tensor(file, name, tensor)


def integers(file: BinaryIO, *values: int) -> None:
    file.write(struct.pack(f"<{len(values)}i", *values))


def write_vocabulary(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """Writes the tokens of text, each as its bytes; whisper.cpp knows the special ones by their place."""
    tokenizer = tokenizer_of(checkpoint.dims)
    integers(file, tokenizer.eot)
    for token in range(tokenizer.eot):
        text = tokenizer.encoding.decode_single_token_bytes(token)
        integers(file, len(text))
        file.write(text)


def write_tensor(file: BinaryIO, name: str, tensor: torch.Tensor) -> None:
    if name in COLUMNS:
        tensor = tensor[:, None]
    full = tensor.ndim < 2 or name in COLUMNS or name.endswith("positional_embedding")
    integers(file, tensor.ndim, len(name), FLOAT32 if full else FLOAT16, *reversed(tensor.shape))
    file.write(name.encode())
    file.write(tensor.to(torch.float32 if full else torch.float16).contiguous().numpy().tobytes())
