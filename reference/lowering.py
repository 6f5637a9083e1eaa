"""Compiling every graph for a target, which need not be there, and naming the blocks that do not lower.

The target's devices are virtual, and virtual devices are those of a whole process, so each target has a process of its
own. It writes the graphs as artifacts, for `pytest --artifacts` on a machine that has the target.

    python -m reference.lowering sm_90a SIZE:DTYPE ... [--out DIR] [--checkpoint PATH]

Without --out it fills MAX's cache from the last model on, for another such process to find.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from max.graph import Module

from maxwhisper.compiled import programs_of, units_on
from maxwhisper.decoding.cpu import SELECT_TOKENS
from maxwhisper.decoding.gpu import SEARCH
from maxwhisper.decoding.rules import TOKEN_RULES
from maxwhisper.decoding.speculative import QUANTIZE_KEYS, SPECULATE
from maxwhisper.engine.artifacts import HOST, Identity, Writer, aim_at, writing
from maxwhisper.engine.built_from import built_from
from maxwhisper.engine.precompile import Precompiler, has_room, started
from maxwhisper.engine.program import Artifact, Program
from maxwhisper.network.blocks import BLOCKS

from .intermediates import WITH_INTERMEDIATES
from .judge import dtype_name
from .measures import DTYPES
from .models import TRAINED, load
from .suite import Suite

SELECTING = {
    "cpu": (TOKEN_RULES, SELECT_TOKENS, SPECULATE, QUANTIZE_KEYS),
    "gpu": (TOKEN_RULES, SELECT_TOKENS, SEARCH),
}
"""By device, those that select the tokens of whole transcripts."""


def graphs(target: str, size: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Returns a model's graphs for a target, by name: blocks, those with intermediates, and what selects tokens."""
    device = "cpu" if target == HOST else "gpu"
    return (
        *BLOCKS,
        *(f"{name} with intermediates" for name in WITH_INTERMEDIATES),
        *(SELECTING[device] if selects_tokens(device, size, dtype) else ()),
    )


def selects_tokens(device: str, size: str, dtype: torch.dtype) -> bool:
    """Tells whether a model's tokens come from graphs: those of whole transcripts, which the suite makes in float32,
    and of benchmarks of engines, which on a GPU compute in any dtype."""
    return size in TRAINED and (device == "gpu" or dtype == torch.float32)


# ---- in the process that compiles ----------------------------------------------------------------------------------


def lower(name: str, programs: Sequence[Program], device: str) -> tuple[Artifact | None, dict[str, str]]:
    """Returns the artifact of the programs, or None and by program what MAX says against it."""
    try:
        return Artifact(name, programs, device), {}
    except Exception as error:
        if len(programs) == 1:
            return None, {programs[0].name: message(error)}
        if failures := {program.name: reason for program in programs if (reason := not_built(program))}:
            # Building takes a second, compiling minutes: the others are compiled together once more.
            rest = [program for program in programs if program.name not in failures]
            return None, failures | (lower(name, rest, device)[1] if rest else {})
        for program in programs:
            failures |= lower(program.name, [program], device)[1]
        nobody = {program.name: f"compiles alone, but not with its unit: {message(error)}" for program in programs}
        return None, failures or nobody


def not_built(program: Program) -> str | None:
    """Returns what MAX says against the program while its graph is built, if anything."""
    try:
        program.trace(Module())
    except Exception as error:
        return message(error)
    return None


def message(error: BaseException) -> str:
    """Returns what MAX says: its own error stands behind one that asks to report it."""
    return f"{type(error).__name__}: {error}" if error.__cause__ is None else message(error.__cause__)


def units(suite: Suite) -> Iterator[tuple[str, list[Program]]]:
    """Yields what the suite compiles together, and what `load_model` compiles beside that for whole transcripts."""
    yield from ((unit, suite.subject.programs(unit)) for unit in suite.subject.units)
    if selects_tokens(suite.device, suite.model.size, suite.dtype):
        others = [unit for unit in units_on(suite.device) if unit not in suite.subject.units]
        yield from ((unit, programs_of(unit, suite.dims, suite.policy)) for unit in others)


def lower_all(suite: Suite, writer: Writer) -> dict[str, str]:
    """Adds every artifact of the suite to the folder; returns what does not lower, and why."""
    failures: dict[str, str] = {}
    for unit, programs in units(suite):
        identity = Identity.of(unit, suite.dims, suite.policy, programs)
        if identity in writer:  # models share the log-mel spectrogram
            continue
        artifact, found = lower(suite.subject.name(unit), programs, suite.subject.device_of(unit))
        failures |= found
        if artifact:
            writer.add(identity, artifact.stored, built_from(programs))
    return failures


def fill_cache(suite: Suite) -> None:
    """Compiles every artifact of the suite, the last one first, into MAX's cache, for as long as there is memory for
    two processes. What does not lower is left out: who needs it says so."""
    for unit, programs in reversed([*units(suite)]):
        if not has_room():
            return
        with suppress(Exception):
            Artifact(suite.subject.name(unit), programs, suite.subject.device_of(unit))


class NotLowered(Exception):
    """Ends the writing of artifacts of which some are missing."""


def main() -> int:
    """Prints for each model in turn, as JSON on a line of its own, what does not lower, and why, by graph."""
    parser = argparse.ArgumentParser(prog="python -m reference.lowering", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("models", nargs="+", metavar="SIZE:DTYPE")
    parser.add_argument("--out")
    parser.add_argument("--checkpoint")
    options = parser.parse_args()

    def suite(model: str) -> Suite:
        size, _, dtype = model.partition(":")
        return Suite(load(size, options.checkpoint), DTYPES[dtype], device)

    if options.out is None:
        device = aim_at(options.target)
        for model in reversed(options.models):
            fill_cache(suite(model))
        return 0
    lowered = True
    try:
        with writing(options.out, options.target) as writer:
            device = aim_at(options.target)
            for model in options.models:
                failures = lower_all(suite(model), writer)
                lowered = lowered and not failures
                print(json.dumps(failures), flush=True)
            if not lowered:
                raise NotLowered
    except NotLowered:
        return 1
    return 0


# ---- in the process that asks --------------------------------------------------------------------------------------


class Lowering:
    """The other process, for one target and models by (size, dtype), writing artifacts into `out`."""

    def __init__(self, target: str, models: Sequence[tuple[str, torch.dtype]], out: Path, checkpoint: str | None):
        self.target, self.out = target, out
        names = [f"{size}:{dtype_name(dtype)}" for size, dtype in models]
        options = ["--checkpoint", checkpoint] if checkpoint else []
        command = ["-P", "-m", "reference.lowering", target, *names, "--out", str(out), *options]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process writes to it
        self.process = started(command, stdout=subprocess.PIPE, stderr=self.log)
        self.second = Precompiler("reference.lowering", [target, *names], *options)
        self.waiting = list(models)
        self.failures: dict[tuple[str, torch.dtype], dict[str, str]] = {}

    def failure(self, size: str, dtype: torch.dtype, graph: str) -> str | None:
        """Says why the graph does not lower, None if it does; waits until that is known."""
        assert self.process.stdout is not None
        self.second.start()
        while (size, dtype) not in self.failures:
            if not (line := self.process.stdout.readline()):
                return self.ended()
            self.failures[self.waiting.pop(0)] = json.loads(line)
        return self.failures[size, dtype].get(graph)

    def finish(self) -> bool:
        """Waits until all is compiled; returns whether the artifacts were written."""
        assert self.process.stdout is not None
        self.second.start()
        for line in self.process.stdout:
            self.failures[self.waiting.pop(0)] = json.loads(line)
        return self.process.wait() == 0

    def ended(self) -> str:
        """Says how the process ended that should have said more."""
        self.process.wait()
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").splitlines()[-20:]
        return "\n".join([f"the process that compiles ended with status {self.process.returncode}", *last])

    def summary(self) -> str:
        """Returns the last line of a run. Call it after `stop`."""
        models = f"{len(self.failures)} of {len(self.failures) + len(self.waiting)} models"
        failed = sum(len(failures) for failures in self.failures.values())
        wrote = f"artifacts in {self.out}" if self.process.returncode == 0 else "no artifacts written"
        return f"{self.target}: {models} compiled, {failed} graphs do not lower; {wrote}"

    def stop(self) -> None:
        """Ends it, with what it did not get to; lets it write what it has compiled if there is nothing left to do."""
        self.second.stop()
        unfinished = bool(self.waiting) and self.process.poll() is None
        if unfinished:
            self.process.terminate()
        self.process.wait()
        if unfinished:  # it had no chance to clear away what it was writing
            for folder in self.out.parent.glob(f".{self.out.name}-*"):
                shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
