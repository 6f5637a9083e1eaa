"""One run of `maxwhisper bulk`: what is left to do, on this machine alone or on a cluster."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import tqdm
from ray.data.checkpoint import CheckpointConfig
from ray.exceptions import RayError

from ..errors import MaxWhisperError, OptionError
from ..whisper import Whisper
from .filesystems import filesystem_of, for_arrow
from .inputs import Inputs, identify, inputs_of
from .parts import Parts, Totals
from .stages import NotYetWritten, Transcriber, decode

ROWS = 32
"""Inputs at most that are written and committed together: what a kill costs an actor."""
AUDIO_BYTES = 2**26
"""Bytes of decoded audio, 35 minutes of it, from which on a block is passed on."""
LOST = re.compile(r"[?\t\n\r]")
"""What Ray takes for no part of the name of a Parquet file."""
PATIENCE = 2.0
"""Seconds between looks at what is done, at least; a look takes a tenth of the time at most."""


@dataclass(frozen=True)
class Workers:
    """What computes: how many actors, each of which holds a model, and what Ray keeps for each of them."""

    actors: int
    batch_size: int
    cpus: int
    gpus: float
    memory_gb: int | None
    cluster: str | None


@dataclass(frozen=True)
class Summary:
    """What there is now, and how long this run has taken."""

    totals: Totals
    seconds: float

    def text(self) -> str:
        """Returns a line for people."""
        totals = self.totals
        found = f"{totals.rows} files, {totals.errors} of them with errors"
        if totals.transient:
            found += f", {totals.transient} of which may pass: the same command tries again"
        if not totals.audio:
            return f"{found}; no audio was left to transcribe"
        return (
            f"{found}; this run: {totals.audio / 3600:.3f} h of audio"
            f" in {self.seconds:.0f} s, {totals.audio / self.seconds:.1f} x real time;"
            f" {totals.audio / max(totals.model, 1e-9):.1f} x while a model computes"
        )


def run(
    source: str,
    output: str,
    load: Callable[[], Whisper],
    options: dict[str, Any],
    settings: dict[str, Any],
    workers: Workers,
) -> Summary:
    """Transcribes what INPUT stands for and OUTPUT does not have yet, and writes OUTPUT/transcripts.parquet and .jsonl.

    load: gives the model. options: of `transcribe`. settings: what transcripts depend on, by the names of the options.
    Raises MaxWhisperError if it cannot be done; what has been done by then stays, and the next run goes on.
    """
    inputs = inputs_of(source)
    for name in (filesystem_of(each)[1] for each in (output, *inputs.parquet)):
        if wrong := LOST.search(name):
            raise OptionError(f"{name}: has {wrong[0]!r} in its name, with which Ray finds no file: rename it")
    parts = Parts(output)
    with parts.locked():
        parts.claim(settings)
        parts.mend()
        parts.retry()
        earlier = set(parts.committed())
        start = time.perf_counter()
        if inputs.paths:
            parts.write_inputs(inputs.paths)
        with started(workers), progress(parts, inputs.number), failures(output):
            rows_of(inputs, parts, load, options, workers).write_parquet(parts.rows, filesystem=for_arrow(parts.system))
        totals = parts.finish(earlier, {identify(path, None) for path in inputs.paths})
        return Summary(totals, time.perf_counter() - start)


def rows_of(
    inputs: Inputs, parts: Parts, load: Callable[[], Whisper], options: dict[str, Any], workers: Workers
) -> ray.data.Dataset:
    """Returns the rows of what is left to do, which Ray reads, decodes and transcribes as they are written."""
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        "id",
        parts.checkpoint,
        delete_checkpoint_on_success=False,
        override_filesystem=for_arrow(parts.system),
        checkpoint_filter_cls=NotYetWritten,
    )
    context.target_max_block_size = AUDIO_BYTES
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # Ray's own says nothing of what happened
    files, system = (
        (inputs.parquet, filesystem_of(inputs.parquet[0])[0]) if inputs.parquet else ([parts.inputs], parts.system)
    )
    inside = [filesystem_of(file)[1] for file in files]
    table = ray.data.read_parquet(inside, filesystem=for_arrow(system), columns=inputs.columns or ["path"])
    # With memory of its own, Ray does not run it within the actors, whose model would wait for it.
    audio = table.repartition(target_num_rows_per_block=ROWS).map_batches(
        decode, batch_format="pyarrow", batch_size=None, num_cpus=1, memory=4 * AUDIO_BYTES
    )
    return audio.map_batches(
        Transcriber,
        fn_constructor_args=(load, options, workers.batch_size),
        batch_format="pyarrow",
        batch_size=None,  # all of a block: as one recording ends, another of it takes its place
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.actors, initial_size=workers.actors),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
        memory=workers.memory_gb * 10**9 if workers.memory_gb else None,
    )


@contextmanager
def started(workers: Workers) -> Iterator[None]:
    """Connects to the cluster, or starts Ray on this machine, without dashboard or network, and stops it at the end."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is said in one line, by `failures`
    if ray.is_initialized():
        yield
        return
    if workers.cluster:
        how: dict[str, Any] = {"address": workers.cluster}
    else:
        # One CPU of Ray's for each actor's and one for who leaves out what is done, or on a machine with one core they
        # would have all there are, and nobody would decode.
        cpus = len(os.sched_getaffinity(0)) + workers.actors * workers.cpus + 1
        how = {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = f"--cluster {workers.cluster}: cannot be reached" if workers.cluster else "Ray cannot be started"
        raise MaxWhisperError(f"{what}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def failures(output: str) -> Iterator[None]:
    """Says in one line what Ray says in a hundred."""
    try:
        yield
    except Exception as error:
        causes = list(origins(error))
        # Ray's errors are instances of the class of what they come from too, with all of a trace as their message.
        ours = (cause for cause in causes if isinstance(cause, MaxWhisperError) and not isinstance(cause, RayError))
        if known := next(ours, None):
            raise type(known)(without_advice(known)) from error
        said = " ".join(without_advice(causes[-1]).split()) or type(error).__name__
        raise MaxWhisperError(
            f"OUTPUT {output}: stopped by {type(causes[-1]).__name__}: {said}; what is done stays, and the same command"
            " goes on"
        ) from error


def without_advice(error: BaseException) -> str:
    """Returns what an error said before Ray added how to have it try again."""
    return str(error).partition("\nFailed to ")[0]


def origins(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, and what it comes from, through the processes that passed it on."""
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


@contextmanager
def progress(parts: Parts, total: int) -> Iterator[None]:
    """Shows how many inputs are committed, on standard error, by what is in the folder."""
    done = threading.Event()
    numbers: dict[str, int] = {}

    def look() -> int:
        for part in parts.committed():
            if part not in numbers:
                numbers[part] = parts.number(parts.ids_of(part)) or 0
        return sum(numbers.values())

    with tqdm.tqdm(total=total, unit=" files", initial=look(), disable=None) as bar:

        def watch() -> None:
            took = 0.0
            while not done.wait(max(PATIENCE, 10 * took)):
                start = time.perf_counter()
                bar.update(look() - bar.n)
                took = time.perf_counter() - start

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            bar.update(look() - bar.n)
