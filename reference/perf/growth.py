"""python -m reference.perf.growth: how time and memory grow with audio length, batch, model size and threads.

One of the four varies, the others stay: tiny's dimensions, one window, every CPU. Weights are random, and because those
never end a text, every 30 s of audio get a fixed number of tokens. maxwhisper and PyTorch Whisper take turns, round by
round, each time in a new process: the peak of a process's memory never falls.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from whisper.audio import N_SAMPLES
from whisper.model import ModelDimensions

from maxwhisper.audio import load_audio
from maxwhisper.cli.option_types import above_zero
from maxwhisper.compare.command import available
from maxwhisper.compare.convert import store
from maxwhisper.compare.engines import REFERENCE, SPECS, SUBJECT, Spec, versions
from maxwhisper.compare.material import RANDOM, SIZES, Recording, checkpoint_for
from maxwhisper.compare.process import EngineError, Worker
from maxwhisper.compare.run import PAUSE, machine, written
from maxwhisper.compare.tokens import task_for
from maxwhisper.errors import OptionError

from ..commands import status
from ..fixtures import FIXTURES
from ..reasons import one_line
from .growth_report import Cost, Growth, Point, Row, markdown, plot

CLIP = FIXTURES / "clips" / "english-4.ogg"
TOKENS = 20
"""How many tokens are decoded for every 30 s: few, for an hour of audio not to take PyTorch one."""
LONG = 30
"""Minutes of a recording from which on one round is enough: an interruption is a small part of its time."""

AXES: dict[str, tuple[Any, ...]] = {
    "minutes": (1, 2, 5, 10, 30, 60),
    "batch": (1, 2, 4, 8, 16),
    "size": ("tiny", "base", "small", "medium"),
    "threads": (1, 2),
}
"""By the field of `Point` that varies, its values."""

log = logging.getLogger("maxwhisper")


@dataclass(frozen=True)
class Material:
    """Files of a point, for a request to the worker. warm_up: what is asked first, and is not timed."""

    request: str
    warm_up: dict[str, str]
    timed: dict[str, str]
    n_window: int


class Measurement:
    """One run of the command, without its rendering. scratch: a folder for what the engines read."""

    def __init__(self, rounds: int, scratch: Path):
        self.rounds, self.scratch = rounds, scratch
        self.clip = load_audio(CLIP)
        self.models: dict[str, tuple[Path, ModelDimensions]] = {}
        self.prepared: set[tuple[str, str]] = set()
        self.specs = [spec for spec in SPECS if spec.name in (SUBJECT, REFERENCE)]

    def row(self, axis: str, point: Point) -> Row:
        """Measures both engines at a point, in turn; one that fails is not asked again."""
        material = self.material(point)
        row = Row(axis, point, {spec.name: Cost() for spec in self.specs})
        n_round = 1 if (point.minutes or 0) >= LONG else self.rounds
        for number in range(n_round):
            for spec in self.specs[:: -1 if number % 2 else 1]:
                cost = row.costs[spec.name]
                if not cost.error:
                    log.info("%s %s, round %d of %d: %s", axis, row.value, number + 1, n_round, spec.name)
                    self.measure(spec, point, material, cost)
        return row

    def measure(self, spec: Spec, point: Point, material: Material, cost: Cost) -> None:
        """Adds one round of an engine to its cost, or its error."""
        try:
            with self.worker(spec, point) as worker:
                worker.ask("load")
                # The first call of anything is slower, and users of a loaded model do not wait for it.
                worker.ask(material.request, n_tokens=TOKENS, **material.warm_up)
                answer = worker.ask(material.request, n_tokens=TOKENS, **material.timed)
                if (found := len(answer["tokens"])) != (expected := material.n_window * TOKENS):
                    raise EngineError(f"asked for {expected} tokens, it gave {found}")
                peak_bytes = worker.ask("memory")["bytes"]
        except EngineError as error:
            cost.error = str(error)
        else:
            cost.seconds.append(answer["seconds"])
            cost.peak_bytes.append(peak_bytes)

    @contextlib.contextmanager
    def worker(self, spec: Spec, point: Point) -> Iterator[Worker]:
        """Yields a new process of an engine, whose graphs another one has compiled; raises EngineError."""
        folder, dims = self.model(point.size)
        task = task_for(dims, None, point.threads)
        if (spec.name, point.size) not in self.prepared:
            log.info("preparing %s, %s", spec.name, point.size)
            with contextlib.closing(Worker(spec, folder, task)) as preparing:
                preparing.ask("prepare")
            self.prepared.add((spec.name, point.size))
        time.sleep(PAUSE)  # for our own threads, which have made weights and spectrograms
        with contextlib.closing(Worker(spec, folder, task)) as worker:
            yield worker

    def model(self, size: str) -> tuple[Path, ModelDimensions]:
        """Returns the folder, as `store` gives it, and the dimensions of a model of random weights, the same at every
        call, kept on disk only."""
        if size not in self.models:
            checkpoint = checkpoint_for(RANDOM + size)
            self.models[size] = store(checkpoint), checkpoint.dims
        return self.models[size]

    def material(self, point: Point) -> Material:
        """Saves a clip over and over: its samples, or the spectrograms of as many windows as the batch has."""
        if point.minutes:
            n_window = 2 * point.minutes
            first, whole = self.save("first", self.audio(1)), self.save("whole", self.audio(n_window))
            return Material("transcribe_fixed", {"audio": first}, {"audio": whole}, n_window)
        dims = self.model(point.size)[1]
        windows = Recording(CLIP.name, self.audio(point.batch), None).windows(dims.n_mels)
        path = {"mel": self.save("windows", windows)}
        return Material("generate_batch", path, path, point.batch)

    def audio(self, n_window: int) -> np.ndarray:
        """Returns float32 (samples,), of as many times 30 s."""
        return np.resize(self.clip, n_window * N_SAMPLES)

    def save(self, name: str, array: np.ndarray) -> str:
        path = self.scratch / f"{name}.npy"
        np.save(path, array)
        return str(path)


def measured(axes: Sequence[str], sizes: Sequence[str], rounds: int) -> Growth:
    """Measures everything on some of AXES. Raises OptionError if the cache of checkpoints cannot be written to."""
    base = Point("tiny", available())
    values = {**AXES, "size": sizes, "threads": [n for n in AXES["threads"] if n <= base.threads]}
    with tempfile.TemporaryDirectory(prefix="maxwhisper-growth-") as scratch:
        measurement = Measurement(rounds, Path(scratch))
        rows = [measurement.row(axis, replace(base, **{axis: value})) for axis in axes for value in values[axis]]
    return Growth(TOKENS, base, machine(), {spec.name: versions(spec) for spec in measurement.specs}, rows)


# ---- the command ---------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reference.perf.growth", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--axis", nargs="+", default=list(AXES), choices=AXES, help="what varies (default: all)")
    add("--sizes", nargs="+", default=AXES["size"], choices=SIZES, help="models that size varies over")
    add("--rounds", type=above_zero, default=3, help=f"one from {LONG} minutes on (default: %(default)s)")
    add("--out", default="build/growth", metavar="DIR", help="for growth.md, .json and .png (default: %(default)s)")
    return parser.parse_args(arguments)


def writable(out: str) -> Path:
    """Returns the folder, made if it is not there. Raises OptionError."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out {out}: expected a folder, or where one can be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"--out {out}: expected a folder that can be written to")
    return folder


def write(growth: Growth, folder: Path) -> None:
    """Prints the tables and writes the files. Raises OptionError, which names each file that cannot be made and why,
    after the others have been written."""
    print(text := markdown(growth), flush=True)
    files: dict[str, Callable[[Path], object]] = {
        "growth.md": lambda unfinished: unfinished.write_text(text),
        "growth.json": lambda unfinished: unfinished.write_text(json.dumps(asdict(growth), indent=1)),
        "growth.png": lambda unfinished: plot(growth, unfinished),
    }
    missing = []
    for name, make in files.items():
        try:
            written(folder / name, make)
        except Exception as error:
            missing.append(str(error) if isinstance(error, OptionError) else f"{folder / name}: {one_line(error)}")
    if missing:
        raise OptionError("; ".join(missing))


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return status("growth", partial(measure, parse(arguments)))


def measure(options: argparse.Namespace) -> int:
    """Measures, prints the tables, writes the files; returns 1 if an engine failed."""
    folder = writable(options.out)  # before the work, not after
    growth = measured(options.axis, options.sizes, options.rounds)
    write(growth, folder)
    return 1 if growth.failures else 0


if __name__ == "__main__":
    sys.exit(main())
