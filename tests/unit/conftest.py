"""What every test leaves as it found it, and the model that most are about."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from whisper.audio import N_SAMPLES, pad_or_trim
from whisper.model import Whisper as OpenAIWhisper

from maxwhisper.audio import load_audio, log_mel_spectrogram
from maxwhisper.decoding.openai_loop import not_in_graph
from maxwhisper.engine.artifacts import not_kept
from maxwhisper.engine.instructions import warn_of_slow_dtype
from maxwhisper.engine.program import Executable
from maxwhisper.errors import warn_once
from maxwhisper.frozen import in_pytorch
from maxwhisper.options import warn_of
from maxwhisper.whisper import Whisper, load_model
from reference.activations import CLIPS
from reference.fixtures import FIXTURES, NANO
from reference.versions import version

SPOKEN = [clip for clip in CLIPS if not clip["no_speech"]]
WINDOW = {
    "en": FIXTURES / "clips" / "english-1.wav",
    "de": next(FIXTURES / clip["file"] for clip in SPOKEN if clip["language"] == "de"),
}


@pytest.fixture(scope="module")
def model() -> Whisper:
    """Returns the trained fixture on MAX."""
    return load_model(NANO)


class Remembering:
    """The encoder's graph, which each window is given once: what tests hear is a few clips, again and again."""

    def __init__(self, executable: Executable):
        self.executable = executable
        self.found: dict[bytes, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executable, name)

    def __call__(self, mel: torch.Tensor) -> list[torch.Tensor]:
        windows = [hashlib.sha1(window.contiguous().numpy()).digest() for window in mel]
        for key, window in zip(windows, mel, strict=True):
            if key not in self.found:
                self.found[key] = self.executable(mel=window[None])[0]
        return [torch.cat([self.found[key] for key in windows])]


@pytest.fixture(scope="module")
def encodes_once(model: Whisper) -> None:
    """Has the module's model remember what it has encoded, where tests are of what comes after that."""
    model.network.executables["encoder"] = Remembering(model.network["encoder"])


@pytest.fixture(scope="module")
def openai() -> OpenAIWhisper:
    """Returns the trained fixture in PyTorch."""
    return whisper.load_model(str(NANO), device="cpu")


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """Returns the samples of an English clip."""
    return load_audio(FIXTURES / "clips" / "english-4.ogg")


@pytest.fixture(scope="module")
def mel(audio: np.ndarray) -> torch.Tensor:
    """Returns the log-mel spectrogram of the clip's first window, (n_mels, 3000)."""
    return whisper.log_mel_spectrogram(pad_or_trim(audio))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Fails a test that leaves another environment to later ones: if MAX's cache goes elsewhere, for one, all that
    these need is compiled anew."""
    before = dict(os.environ)
    yield
    changed = {name for name in before | os.environ if before.get(name) != os.environ.get(name)}
    assert changed <= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # pytest's and PyTorch's own


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    """Has what is said or found once in a process said in each test, whatever the tests before it had it say."""
    for said_once in (in_pytorch, not_in_graph, not_kept, version, warn_of_slow_dtype, warn_of, warn_once):
        said_once.cache_clear()


@pytest.fixture(scope="module")
def mels() -> torch.Tensor:
    """Returns one English window and one German, (2, n_mels, 3000)."""
    audios = [pad_or_trim(load_audio(WINDOW[language]), N_SAMPLES) for language in ("en", "de")]
    return torch.stack([log_mel_spectrogram(audio, 80) for audio in audios])


@pytest.fixture(scope="module")
def features(model: Whisper, mels: torch.Tensor) -> torch.Tensor:
    return model.encoder(mels)


@pytest.fixture(scope="module")
def tokens(model: Whisper, mels: torch.Tensor) -> torch.Tensor:
    """Returns what the model says to the English window, as (1, token)."""
    result = model.decode(mels[0], fp16=False, language="en")
    assert len(result.tokens) > 5
    tokenizer = whisper.tokenizer.get_tokenizer(True, language="en", task="transcribe")
    return torch.tensor([[*tokenizer.sot_sequence, *result.tokens]])
