"""whisper.cpp, through pywhispercpp.

Its Python functions transcribe whole recordings. Encoder and decoder step are called in the C library that it brings,
because its bindings of these two take no tokens and return no logits.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_void_p
from functools import cached_property
from itertools import count
from pathlib import Path

import _pywhispercpp
import numpy as np
from pywhispercpp.model import Model

from .base import Engine

NO_FALLBACK = {"temperature": 0.0, "temperature_inc": 0.0}


class Adapter(Engine):
    def load(self, folder: Path) -> None:
        self.path = folder / "model.bin"
        beam = self.task.beam_size
        strategy = {"beam_search": {"beam_size": beam, "patience": -1.0}} if beam else {"greedy": {"best_of": 1}}
        self.model = Model(
            str(self.path),
            params_sampling_strategy=int(bool(beam)),
            n_threads=self.task.threads,
            print_progress=False,
            suppress_nst=True,  # what OpenAI's list of suppressed tokens holds
            **NO_FALLBACK,
            **strategy,
        )

    def transcribe(self, audio: np.ndarray, language: str, tell: Callable[[list[int]], None]) -> None:
        context, told = self.model._ctx, count()

        def tell_next(_: object) -> None:
            i = next(told)
            n_token = _pywhispercpp.whisper_full_n_tokens(context, i)
            tell([_pywhispercpp.whisper_full_get_token_id(context, i, j) for j in range(n_token)])

        self.model.transcribe(audio, language=language, new_segment_callback=tell_next)

    @cached_property
    def steps(self) -> "Steps":
        """Loads a second copy of the model when the encoder is first asked for: after memory was read."""
        return Steps(self.path, self.task.threads)

    def encode(self, mel: np.ndarray) -> np.ndarray:
        self.steps.encode(mel)
        return mel

    def generate(self, features: np.ndarray, n_tokens: int) -> list[int]:
        if self.task.beam_size:
            raise NotImplementedError("whisper.cpp has no beam search outside of its transcription")
        new, past = self.task.prompt, 0
        tokens: list[int] = []
        for _ in range(n_tokens):
            logits = self.steps.decode(new, past)
            logits[[*self.task.suppress, self.task.eot]] = -np.inf
            if not tokens:
                logits[self.task.suppress_first] = -np.inf
            past += len(new)
            new = [int(logits.argmax())]
            tokens += new
        return tokens


class Steps:
    """A context of the C library. Raises OSError where it refuses the file, RuntimeError where a call fails."""

    def __init__(self, path: Path, threads: int):
        self.threads = threads
        # The one that the bindings have loaded already, under whichever name the wheel gives it.
        [name] = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libwhisper" in line}
        self.library = ctypes.CDLL(name)
        self.library.whisper_init_from_file.restype = c_void_p
        self.library.whisper_init_from_file.argtypes = [c_char_p]
        self.library.whisper_set_mel.argtypes = [c_void_p, POINTER(c_float), c_int, c_int]
        self.library.whisper_encode.argtypes = [c_void_p, c_int, c_int]
        self.library.whisper_decode.argtypes = [c_void_p, POINTER(c_int32), c_int, c_int, c_int]
        self.library.whisper_n_vocab.argtypes = [c_void_p]
        self.library.whisper_get_logits.argtypes = [c_void_p]
        self.library.whisper_get_logits.restype = POINTER(c_float)
        self.context = self.library.whisper_init_from_file(str(path).encode())
        if not self.context:
            raise OSError(f"whisper.cpp cannot load {path}")
        self.n_vocab = self.library.whisper_n_vocab(self.context)

    def encode(self, mel: np.ndarray) -> None:
        mel = np.ascontiguousarray(mel, np.float32)
        n_mels, n_frames = mel.shape
        self.check(self.library.whisper_set_mel(self.context, mel.ctypes.data_as(POINTER(c_float)), n_frames, n_mels))
        self.check(self.library.whisper_encode(self.context, 0, self.threads))

    def decode(self, tokens: list[int], past: int) -> np.ndarray:
        """Returns the logits (n_vocab,) after `tokens`, of which `past` others are already in the cache."""
        array = (c_int32 * len(tokens))(*tokens)
        self.check(self.library.whisper_decode(self.context, array, len(tokens), past, self.threads))
        rows = np.ctypeslib.as_array(self.library.whisper_get_logits(self.context), (len(tokens), self.n_vocab))
        return rows[-1]  # the only one that is filled

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"whisper.cpp returned {status}")
