"""What is compared on: a checkpoint, or random weights of a model's dimensions; recordings and their text."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from whisper.audio import N_FRAMES, N_SAMPLES, SAMPLE_RATE, log_mel_spectrogram
from whisper.model import ModelDimensions, sinusoids

from ..audio import load_audio
from ..checkpoint import Checkpoint, expected_tensors, load_checkpoint
from ..errors import OptionError
from .convert import converted, store
from .sidecar import text_beside

RANDOM = "random:"


def dimensions(n_mels: int, n_vocab: int, n_state: int, n_audio_layer: int, n_text_layer: int) -> ModelDimensions:
    """Returns those of a model whose encoder and decoder are equally wide, with heads of 64 channels."""
    heads = n_state // 64
    return ModelDimensions(n_mels, 1500, n_state, heads, n_audio_layer, n_vocab, 448, n_state, heads, n_text_layer)


SIZES = {
    "tiny": dimensions(80, 51865, 384, 4, 4),
    "base": dimensions(80, 51865, 512, 6, 6),
    "small": dimensions(80, 51865, 768, 12, 12),
    "medium": dimensions(80, 51865, 1024, 24, 24),
    "large-v3": dimensions(128, 51866, 1280, 32, 32),
    "turbo": dimensions(128, 51866, 1280, 32, 4),
}


def checkpoint_for(model: str) -> Checkpoint:
    """Returns the checkpoint of a name or path, or random weights for `random:` and a key of SIZES.

    Raises CheckpointError, and OptionError for an unknown size.
    """
    if not model.startswith(RANDOM):
        return load_checkpoint(model)
    size = model.removeprefix(RANDOM)
    if size not in SIZES:
        raise OptionError(f"--model {model}: random weights are of {', '.join(SIZES)}")
    return Checkpoint(model, Path(model), SIZES[size], random_weights(SIZES[size]), None)


def stored_model(model: str) -> Path:
    """Returns the file of what `checkpoint_for` returns, in OpenAI's format, kept as that of a comparison.

    Raises as `checkpoint_for` and `store` do.
    """
    return converted("openai", store(checkpoint_for(model))) / "model.pt"


def random_weights(dims: ModelDimensions) -> dict[str, torch.Tensor]:
    """Returns a checkpoint's tensors in float16, as OpenAI's, of layers that keep the size of what passes through; the
    same at every call. No bias is 0 and no scale 1, so that whoever leaves one out is wrong."""
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "encoder.positional_embedding":
            return sinusoids(*shape)
        normal = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            return normal * math.prod(shape[1:]) ** -0.5
        return normal / 8 + float("ln" in name and name.endswith("weight"))

    return {name: drawn(name, shape).half() for name, shape in expected_tensors(dims).items()}


@dataclass(frozen=True)
class Recording:
    """A recording. audio: float32 (samples,) at 16 kHz. text: what was said, where known."""

    name: str
    audio: np.ndarray
    text: str | None

    @property
    def seconds(self) -> float:
        return len(self.audio) / SAMPLE_RATE

    def windows(self, n_mels: int) -> np.ndarray:
        """Returns the log-mel of all of it in windows of 30 s, the last one padded: float32 (window, n_mels, 3000)."""
        count = math.ceil(len(self.audio) / N_SAMPLES)
        mel = log_mel_spectrogram(self.audio, n_mels, padding=N_SAMPLES * count - len(self.audio)).numpy()
        return np.ascontiguousarray(mel.reshape(n_mels, count, N_FRAMES).transpose(1, 0, 2))


def recordings(files: list[str], texts: list[str] | None) -> list[Recording]:
    """Reads audio files; the text of each is in the file of `texts` at its place, or else in a .txt beside it.

    Raises AudioError for a file that cannot be read, OptionError for a text that cannot.
    """
    sidecars = [Path(text_beside(file)) for file in files]
    paths: list[Path | None] = [path if path.is_file() else None for path in sidecars]
    if texts is not None:
        paths = [Path(text) for text in texts]
    return [
        Recording(Path(file).name, load_audio(file), read_text(path) if path else None)
        for file, path in zip(files, paths, strict=True)
    ]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with a byte order mark, the first word would be another
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--text {path}: cannot be read as text: {error}") from error
