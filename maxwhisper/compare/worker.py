"""The process of one engine: reads a request a line, as JSON, and answers each with a line.

    python -m maxwhisper.compare.worker ENGINE CHECKPOINT_FOLDER TASK

Requests are `{"do": name, ...}`, answers `{"seconds": ..., ...}` or `{"error": one line}`; the functions below that
take keywords are the requests. Whatever the engine itself prints goes to standard error.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .convert import convert, converted
from .engines import SPECS, Engine, Task


class Requests:
    """The engine, and what it can be asked for. Every function returns the fields of its answer."""

    engine: Engine

    def __init__(self, name: str, folder: Path, task: Task):
        self.spec = next(spec for spec in SPECS if spec.name == name)
        self.folder, self.task = folder, task

    def prepare(self) -> dict[str, Any]:
        """Converts the checkpoint, and compiles it where that takes time only once."""
        folder = convert(self.spec.conversion, self.folder)
        self.make().prepare(folder)
        return {}

    def load(self) -> dict[str, Any]:
        self.engine = self.make()
        self.engine.load(converted(self.spec.conversion, self.folder))
        self.engine.synchronize()
        return {}

    def make(self) -> Engine:
        module = importlib.import_module(f".engines.{self.spec.module}", __package__)
        return getattr(module, self.spec.adapter)(self.spec.variant, self.task)

    def language(self, mel: str) -> dict[str, Any]:
        return {"language": self.engine.detect_language(np.load(mel))}

    def transcribe(self, audio: str, language: str) -> dict[str, Any]:
        """Returns the tokens as they came, each list with the seconds until it was there."""
        samples, start = np.load(audio), time.perf_counter()
        pieces: list[dict[str, Any]] = []

        def tell(tokens: list[int]) -> None:
            pieces.append({"seconds": time.perf_counter() - start, "tokens": [int(token) for token in tokens]})

        self.engine.transcribe(samples, language, tell)
        self.engine.synchronize()
        return {"pieces": pieces}

    def windows(self, mel: str, n_tokens: int) -> dict[str, Any]:
        """Decodes a fixed number of tokens for every window of (window, n_mels, 3000)."""
        generated = self.engine.windows(np.load(mel), n_tokens)
        self.engine.synchronize()
        return {"tokens": [int(token) for tokens in generated for token in tokens]}

    def generate_batch(self, mel: str, n_tokens: int) -> dict[str, Any]:
        """Decodes a fixed number of tokens for every window of (window, n_mels, 3000), all at once."""
        generated = self.engine.generate_batch(np.load(mel), n_tokens)
        return {"tokens": [int(token) for tokens in generated for token in tokens]}

    def transcribe_fixed(self, audio: str, n_tokens: int) -> dict[str, Any]:
        """Decodes a fixed number of tokens for every 30 s of (samples,), the spectrogram made by the engine itself."""
        return {"tokens": [int(token) for token in self.engine.transcribe_fixed(np.load(audio), n_tokens)]}

    def encode(self, mel: str) -> dict[str, Any]:
        """Encodes one window (n_mels, 3000), which `generate` then uses."""
        window = np.load(mel)
        self.features, times = self.timed(lambda: self.engine.encode(window))
        return times

    def generate(self, n_tokens: int) -> dict[str, Any]:
        """Decodes tokens, which are None where the engine cannot do this with these options."""
        try:
            tokens, times = self.timed(lambda: self.engine.generate(self.features, n_tokens))
        except NotImplementedError:
            return {"tokens": None}
        return {"tokens": [int(token) for token in tokens], **times}

    def timed(self, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """Returns what `call` returns, and its times: by the clock, and on the device where there are events."""
        first, start = self.engine.event(), time.perf_counter()
        result = call()
        last = self.engine.event()
        self.engine.synchronize()
        times = {"seconds": time.perf_counter() - start}
        if last:
            last.synchronize()
            times["device_seconds"] = first.elapsed_time(last) / 1000
        return result, times

    def memory(self) -> dict[str, Any]:
        return {"bytes": peak_memory()}


def peak_memory() -> int:
    """Returns the most bytes of memory that this process has had at a time."""
    status = Path("/proc/self/status")
    if status.exists():  # where it is that of the program, and not also of the process that started it
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def answer(function: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of an answer, the function's time among them unless it took its own."""
    start = time.perf_counter()
    try:
        fields = function(**arguments)
    except Exception as error:  # whatever an engine raises is its row in the table
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}
    return {"seconds": time.perf_counter() - start, **fields}


def main() -> None:
    name, folder, task = sys.argv[1:]
    # The pipe stays with us; what a library prints to its standard output must not get into it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests = Requests(name, Path(folder), Task(**json.loads(task)))
    for line in sys.stdin:
        arguments = json.loads(line)
        fields = answer(getattr(requests, arguments.pop("do")), arguments)
        print(json.dumps(fields), file=answers, flush=True)


if __name__ == "__main__":
    main()
