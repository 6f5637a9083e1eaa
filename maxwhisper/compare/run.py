"""Asks the engines, one at a time and round by round."""

import contextlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from whisper.audio import log_mel_spectrogram, pad_or_trim
from whisper.model import ModelDimensions

from ..checkpoint import Checkpoint
from ..doctor import ProbeError, ask
from ..engine.artifacts import Artifacts
from ..engine.session import device_named, find_device
from ..errors import DeviceError, MaxWhisperError, OptionError
from ..files import replacing
from .convert import store
from .engines import REFERENCE, SPECS, SUBJECT, Spec, Task, missing, precision, rows, versions
from .material import Recording, checkpoint_for, recordings
from .process import EngineError, Worker, awake
from .results import Piece, Results, Row
from .scores import agreement, word_error_rate
from .tokens import task_for, tokenizer_of

PAUSE = 0.5
"""Seconds before an engine is asked: thread pools wait actively for a while after their work."""
STEPS = 64
"""Tokens from which the time of one is computed, unless --tokens says how many."""
REPEATS = 3
"""How often a window, and a text of a fixed number of tokens, is computed in each round; the fastest counts."""

log = logging.getLogger("maxwhisper")


def compare(
    audio: list[str],
    model: str,
    against: Sequence[str] | None,
    *,
    device: str,
    texts: list[str] | None = None,
    tokens: int | None = None,
    beam_size: int | None = None,
    batch_size: int,
    threads: int,
    rounds: int,
    artifacts: str | None = None,
) -> Results:
    """Runs maxwhisper and the engines in `against`, None for all, on `audio`.

    device: "cpu", "gpu", or "auto" for a GPU where there is one.
    tokens: decode this many for every window of 30 s, in place of transcribing.
    batch_size: how many pieces decode together, in the rows that are of batches.
    artifacts: a folder of graphs that maxwhisper takes; its rows are then those of the precisions there.

    Interrupted as it measures, it returns what was measured, and the rows that were not say so.

    Raises ArtifactError, AudioError, CheckpointError, DeviceError, OptionError, and MaxWhisperError if PyTorch Whisper,
    which the others are compared with, fails.
    """
    device = device_named(device)
    specs = rows(against, device)
    find_device(device)
    found = machine(device)
    heard = recordings(audio, texts)
    checkpoint = checkpoint_for(model)
    if artifacts:
        specs = held(specs, Artifacts(artifacts, device), checkpoint.dims)
    longest = checkpoint.dims.n_text_ctx // 2
    if tokens is not None and not 2 <= tokens <= longest:
        raise OptionError(f"--tokens must be from 2 to {longest}, which is where Whisper ends a text, not {tokens}")
    task = task_for(checkpoint.dims, beam_size, threads, device)
    task = replace(task, batch_size=batch_size, artifacts=artifacts)
    folder = store(checkpoint)
    with tempfile.TemporaryDirectory(prefix="maxwhisper-compare-") as scratch:
        comparison = Comparison(checkpoint, heard, task, tokens, rounds, folder, Path(scratch))
        measured = comparison.run(specs)
    return Results(
        model=model,
        options={**asdict(task), "tokens": tokens, "rounds": rounds, "languages": comparison.languages},
        machine=found,
        recordings=[
            {"name": each.name, "seconds": each.seconds, "text": each.text, "pytorch": text}
            for each, text in zip(heard, comparison.spoken_texts, strict=True)
        ],
        audio_s=sum(each.seconds for each in heard),
        rows=measured,
    )


def held(specs: list[Spec], artifacts: Artifacts, dims: ModelDimensions) -> list[Spec]:
    """Returns the rows without maxwhisper's in precisions that artifacts do not hold; raises OptionError if none is."""
    networks = [each.identity for each in artifacts.held if each.identity.unit == "network"]
    precisions = {each.compute for each in networks if each.dims == vars(dims)}
    left = [spec for spec in specs if spec.engine != SUBJECT or precision(spec.variant) in precisions]
    if not any(spec.engine == SUBJECT for spec in left):
        raise OptionError(f"--artifacts {artifacts.folder}: holds no network of these dimensions: {vars(dims)}")
    return left


class Comparison:
    """One run of the command, without its rendering."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        heard: list[Recording],
        task: Task,
        tokens: int | None,
        rounds: int,
        folder: Path,
        scratch: Path,
    ):
        self.dims, self.heard, self.task, self.tokens, self.rounds = checkpoint.dims, heard, task, tokens, rounds
        self.folder, self.scratch = folder, scratch
        self.tokenizer = tokenizer_of(checkpoint.dims)
        self.languages = ["en"] * len(heard)
        self.spoken_texts: list[str | None] = [None] * len(heard)
        self.window = self.save("window", self.mel(heard[0]))
        if tokens is None:
            self.audio = [self.save(f"audio-{i}", each.audio) for i, each in enumerate(heard)]
        else:
            self.audio = [self.save(f"mel-{i}", each.windows(self.dims.n_mels)) for i, each in enumerate(heard)]

    def save(self, name: str, array: np.ndarray) -> str:
        path = self.scratch / f"{name}.npy"
        np.save(path, array)
        return str(path)

    def mel(self, recording: Recording) -> np.ndarray:
        """Returns the first 30 s, float32 (n_mels, 3000)."""
        return log_mel_spectrogram(pad_or_trim(recording.audio), self.dims.n_mels).numpy()

    def run(self, specs: list[Spec]) -> list[Row]:
        """Returns a row for each of `specs`; raises MaxWhisperError if the reference fails."""
        rows = {spec.name: Row(spec.name, spec.note, versions(spec), missing(spec)) for spec in specs}
        spoken = self.reference()
        there = [spec for spec in specs if not rows[spec.name].not_installed]
        try:
            with contextlib.ExitStack() as stack:
                self.measure_all(there, rows, spoken, stack)
        except KeyboardInterrupt:
            for spec in there:
                rows[spec.name] = interrupted(rows[spec.name], self.rounds)
        return list(rows.values())

    def measure_all(
        self, specs: list[Spec], rows: dict[str, Row], spoken: list[list[int]], stack: contextlib.ExitStack
    ) -> None:
        """Measures engines into their rows; each starts when it is first its turn, and fails alone."""
        workers: dict[str, Worker] = {}
        for number in range(self.rounds):
            first = number % max(len(specs), 1)
            for spec in specs[first:] + specs[:first]:  # nobody is always the one after the slowest
                if (row := rows[spec.name]).error:
                    continue
                log.info("round %d of %d: %s", number + 1, self.rounds, spec.name)
                try:
                    if spec.name not in workers:
                        workers[spec.name] = self.started(spec, row, stack)
                    self.measure(workers[spec.name], row, spoken)
                except EngineError as error:
                    row.error = str(error)
                    if spec.name in workers:
                        workers.pop(spec.name).close()

    def reference(self) -> list[list[int]]:
        """Returns PyTorch Whisper's tokens for each recording, and finds the languages, which all others get."""
        spec = next(spec for spec in SPECS if spec.name == REFERENCE)
        log.info("the reference: %s", spec.name)
        with contextlib.closing(Worker(spec, self.folder, self.task)) as worker:
            try:
                worker.ask("load")
                if self.tokens is None and self.tokenizer.language is not None:
                    mels = [self.save(f"language-{i}", self.mel(each)) for i, each in enumerate(self.heard)]
                    self.languages = [worker.ask("language", mel=mel)["language"] for mel in mels]
                spoken = [tokens_of(answer) for answer in self.transcribed(worker)]
            except EngineError as error:
                raise MaxWhisperError(f"{spec.name}, which the others are compared with: {error}") from error
        if self.tokens is None:
            self.spoken_texts = [self.text(tokens) for tokens in spoken]
        return spoken

    def started(self, spec: Spec, row: Row, stack: contextlib.ExitStack) -> Worker:
        """Starts the worker of an engine and loads its model, timed; raises EngineError."""
        log.info("preparing %s", spec.name)
        with contextlib.closing(Worker(spec, self.folder, self.task)) as preparing:
            preparing.ask("prepare")
        worker = stack.enter_context(contextlib.closing(Worker(spec, self.folder, self.task)))
        with awake(worker.process):
            time.sleep(PAUSE)
            row.load_s = worker.ask("load")["seconds"]
        return worker

    def measure(self, worker: Worker, row: Row, spoken: list[list[int]]) -> None:
        """Measures one round of an engine; raises EngineError."""
        with awake(worker.process):
            time.sleep(PAUSE)
            if not row.total_s:
                # The first call of anything is slower, and users of a loaded model do not wait for it.
                tokens = [tokens_of(answer) for answer in self.transcribed(worker)]
                row.peak_bytes = worker.ask("memory")["bytes"]
                self.score(row, spoken, tokens)
            answers = self.transcribed(worker)
            row.total_s.append(sum(answer["seconds"] for answer in answers))
            row.pieces.append(self.pieces(answers))
            if not worker.spec.batched:
                self.measure_window(worker, row)

    def measure_window(self, worker: Worker, row: Row) -> None:
        """Measures one window and one token; raises EngineError."""
        # Of several, as an engine's memory was given back while others had their turn, and its threads slept.
        encoded = [worker.ask("encode", mel=self.window) for _ in range(REPEATS)]
        steps = self.tokens or STEPS
        one, many = (self.generated(worker, count) for count in (1, steps))
        for clock, encode, token in (
            ("seconds", row.encode_s, row.token_s),
            ("device_seconds", row.encode_device_s, row.token_device_s),
        ):
            if clock in encoded[0]:
                encode.append(fastest(encoded, clock))
                if one and many:
                    token.append((fastest(many, clock) - fastest(one, clock)) / (steps - 1))

    def transcribed(self, worker: Worker) -> list[dict[str, Any]]:
        if self.tokens is not None:
            return [worker.ask("windows", mel=path, n_tokens=self.tokens) for path in self.audio]
        pairs = zip(self.audio, self.languages, strict=True)
        return [worker.ask("transcribe", audio=path, language=language) for path, language in pairs]

    def generated(self, worker: Worker, count: int) -> list[dict[str, Any]]:
        """Returns the answers with `count` tokens, none if the engine cannot; raises EngineError for another number."""
        answers = [worker.ask("generate", n_tokens=count) for _ in range(REPEATS)]
        for answer in answers:
            if answer["tokens"] is None:
                return []
            if len(answer["tokens"]) != count:
                raise EngineError(f"asked for {count} tokens, it gave {len(answer['tokens'])}")
        return answers

    def score(self, row: Row, spoken: list[list[int]], tokens: list[list[int]]) -> None:
        row.tokens = sum(map(len, tokens))
        if self.tokens is not None:
            row.agreement = agreement(spoken, tokens)
            return
        theirs, ours = ([self.text_tokens(each) for each in side] for side in (spoken, tokens))
        row.texts = [self.text(each) for each in tokens]
        row.agreement = agreement(theirs, ours)
        row.wer = word_error_rate([text or "" for text in self.spoken_texts], row.texts, self.languages)
        known = [i for i, each in enumerate(self.heard) if each.text is not None]
        said = [each.text or "" for each in self.heard]
        row.wer_text = word_error_rate(*([side[i] for i in known] for side in (said, row.texts, self.languages)))

    def pieces(self, answers: list[dict[str, Any]]) -> list[Piece]:
        """Returns what was known when of a round; nothing where numbers of tokens were asked for."""
        found, start = [], 0.0
        for number, answer in enumerate(answers):
            for piece in answer.get("pieces", ()):
                text = self.tokenizer.decode(self.text_tokens(piece["tokens"]))
                found.append(Piece(number, start + piece["seconds"], text))
            start += answer["seconds"]
        return found

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(self.text_tokens(tokens)).strip()

    def text_tokens(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token < self.tokenizer.eot]


def interrupted(row: Row, rounds: int) -> Row:
    """Returns a row of a comparison that was interrupted, which says so where rounds are missing."""
    if row.error or len(row.total_s) == rounds:
        return row
    if not row.total_s:
        return replace(row, error="interrupted before it was measured")
    return replace(row, note=f"{row.note}; interrupted after {len(row.total_s)} of {rounds} rounds")


def tokens_of(answer: dict[str, Any]) -> list[int]:
    """Returns all tokens of an answer, which comes in pieces where a recording was transcribed."""
    if "pieces" in answer:
        return [token for piece in answer["pieces"] for token in piece["tokens"]]
    return answer["tokens"]


def fastest(answers: list[dict[str, Any]], clock: str) -> float:
    return min(answer[clock] for answer in answers)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Raises DeviceError if what there is to say of a GPU cannot be found out."""
    found = {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    return found | gpu() if device == "gpu" else found


def gpu() -> dict[str, Any]:
    """Returns the GPU's name and driver, and PyTorch's CUDA version, as `maxwhisper doctor` finds them."""
    try:
        driver, torch = ask("driver"), ask("torch")
    except ProbeError as error:
        raise DeviceError(f"the GPU cannot be used, `maxwhisper doctor` says why: {error}") from error
    if not torch["gpus"]:
        raise DeviceError(f"PyTorch finds no GPU: {torch['error']}")
    return {"gpu": torch["gpus"][0]["name"], "driver": driver["version"], "cuda": torch["cuda"]}


def processor() -> str:
    """Returns the processor's name, or its architecture where the system does not tell it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def write_json(results: Results, path: Path) -> None:
    """Writes everything that was found; the file appears when it is complete."""
    written(path, lambda unfinished: unfinished.write_text(json.dumps(asdict(results), indent=1)))


def written(path: Path, write: Any) -> None:
    """Has `write` make a file that gets its name afterwards; raises OptionError if it cannot be written."""
    try:
        with replacing(path) as unfinished:
            write(unfinished)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from error
