"""OpenAI's Whisper on Modular's MAX Graph.

    model = maxwhisper.load_model("tiny")
    model.transcribe("talk.mp3")["text"]

`load_model` returns what openai-whisper's function of that name does: an object with its methods and results.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError, AudioError, CheckpointError, DeviceError, MaxWhisperError, OptionError

if TYPE_CHECKING:
    from .audio import load_audio, log_mel_spectrogram
    from .checkpoint import convert, load_checkpoint
    from .whisper import Whisper, compile_model, load_model

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "AudioError",
    "CheckpointError",
    "DeviceError",
    "MaxWhisperError",
    "OptionError",
    "Whisper",
    "compile_model",
    "convert",
    "load_audio",
    "load_checkpoint",
    "load_model",
    "log_mel_spectrogram",
]

_MODULES = {
    "audio": ("load_audio", "log_mel_spectrogram"),
    "checkpoint": ("convert", "load_checkpoint"),
    "whisper": ("Whisper", "compile_model", "load_model"),
}


def __getattr__(name: str) -> Any:
    # Imported when first used: MAX takes seconds, and the command line answers most mistakes without it.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module 'maxwhisper' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
