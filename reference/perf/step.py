"""python -m reference.perf.step: what a step of decoding on a GPU takes, and what it would take at least.

Host time is Python's for one launch, device time the GPU's own for one step of many that are sent at once; both for a
captured step, as it is decoded with, and for one whose kernels are launched one by one. Kernels and copies are those
that MAX's trace of launches has of one step. The floor is the time to read once, at the rate of a large read, what a
step has to read: the decoder's weights, and the keys and values.

On a CPU (`--device cpu`) the same graphs are compiled for it and executed: a rehearsal. It measures neither device time
nor kernels, and a launch returns when the step is done.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from max.driver import CPU, Device, DeviceEvent, launch_trace
from max.graph import DeviceRef
from whisper.model import ModelDimensions

from maxwhisper.compare.material import checkpoint_for
from maxwhisper.compiled import DTYPES, Network, joined_weights, rounded, storage_dtype
from maxwhisper.decoding.cache import CacheSlots, KeyValueCache
from maxwhisper.decoding.cpu import SELECT_TOKENS
from maxwhisper.decoding.gpu import MAX_CANDIDATES, SEARCH, STEPS_AT_ONCE, Steps, search_program, step_program
from maxwhisper.decoding.rules import Rules
from maxwhisper.decoding.stepper import Graphs, Texts
from maxwhisper.engine.artifacts import Artifacts
from maxwhisper.engine.program import Artifact
from maxwhisper.engine.session import TORCH_DTYPE, Policy, find_device
from maxwhisper.errors import MaxWhisperError

from ..fixtures import NANO
from ..reasons import one_line

N_PAST = 200
"""Tokens before the first step: about as many as a window of fluent speech has when it is half done."""
READ = 2**26
"""Elements of float32 in a large read, far more than caches hold."""
NOT_READ = re.compile(r"attn\.(key|value)\.|\.attn\.query\.|positional")
"""Weights that a step does not read, of the audio's keys and values and of what is joined; of positions next to
nothing."""


@dataclass(frozen=True)
class Case:
    """Texts that advance together: of some windows, each with some beams, or one."""

    n_window: int = 1
    n_beam: int = 1

    def __str__(self) -> str:
        beams = f", {self.n_beam} beams each" if self.n_beam > 1 else ""
        return f"{self.n_window} window{'s' if self.n_window > 1 else ''}{beams}"


CASES = (Case(), Case(n_beam=5), Case(n_window=8), Case(n_window=32))


@dataclass(frozen=True)
class Timing:
    """What one step takes, in microseconds; None is not measured. captured: whether it is launched as one.

    executed_host, executed_device: as the others, kernels launched one by one. launches: by kind, kernels among them.
    """

    case: str
    captured: bool
    host: float | None
    device: float | None
    executed_host: float
    executed_device: float | None
    launches: dict[str, int] | None
    floor: float
    step: float


def graphs_of(model: str, device: str, dtype: str, artifacts: str | None) -> tuple[Graphs, ModelDimensions, Device]:
    """Returns the graphs of steps, compiled for a device, or of artifacts; on a CPU those of a GPU are compiled."""
    checkpoint = rounded(checkpoint_for(model), dtype)
    if device != "cpu":
        held = Artifacts(artifacts, device) if artifacts else None
        return Network(checkpoint, device, held, dtype), checkpoint.dims, find_device(device)
    policy = Policy(DeviceRef.CPU(), storage_dtype(checkpoint.tensors, device, DTYPES[dtype]), DTYPES[dtype])
    programs = [program(checkpoint.dims, policy) for program in (step_program, search_program)]
    artifact, tensors = Artifact(f"steps of {model}", programs, device), checkpoint.tensors
    return artifact.init({**tensors, **joined_weights(tensors, artifact.stored.weights)}), checkpoint.dims, CPU()


def steps_of(
    graphs: Graphs, dims: ModelDimensions, case: Case, device: Device, dtype: torch.dtype
) -> tuple[Steps, int]:
    """Returns the steps of texts that never end, with random keys and values before them; also how many bytes a step
    has to read."""
    n_text, n_head = case.n_window * case.n_beam, dims.n_text_head
    n_channel = dims.n_text_state // n_head
    there: dict[str, Any] = {"dtype": dtype, "device": "cpu" if device.is_host else "cuda"}
    layers = range(2 * dims.n_text_layer)
    cache = KeyValueCache(
        cross=[torch.randn(case.n_window, n_head, dims.n_audio_ctx, n_channel, **there) for _ in layers]
    )
    cache.append([torch.randn(n_text, n_head, N_PAST, n_channel, **there) for _ in layers], dims.n_text_ctx)
    slots = CacheSlots(1, tokens_first=True)
    slots.place([cache])
    joined, graph = slots.joined(1), graphs[SELECT_TOKENS if case.n_beam == 1 else SEARCH]
    eot, begin = dims.n_vocab - 2, dims.n_vocab
    suppressed = torch.zeros(dims.n_vocab, dtype=torch.bool)
    suppressed[eot] = True
    wanted = None if case.n_beam == 1 else torch.full((case.n_window,), case.n_beam)
    begins, limits = torch.full((n_text,), 4), torch.tensor([begin, eot])
    rules = Rules(suppressed, begins, limits, 1 if case.n_beam == 1 else MAX_CANDIDATES, wanted)
    steps = Steps(graph, joined, dims, device)
    tokens = torch.arange(n_text)[:, None].repeat(1, N_PAST + 1)
    n_token = torch.full((n_text,), dims.n_text_ctx - N_PAST)
    steps.take(Texts.of(tokens, torch.zeros(n_text)), joined, rules, n_token, n_step=0)
    kv = sum(x.nbytes for x in cache.cross) + sum(x[:, :, :N_PAST].nbytes for x in cache.own)
    return steps, kv + sum(x.nbytes for name, x in graph.weights.items() if not NOT_READ.search(name))


def read_rate(device: Device) -> float:
    """Returns bytes per second of a large read by PyTorch, best of ten."""
    source = torch.ones(READ, device="cpu" if device.is_host else "cuda")

    def seconds() -> float:
        start = time.perf_counter()
        source.sum().item()
        return time.perf_counter() - start

    return source.nbytes / min(seconds() for _ in range(10))


def timed(steps: Steps, call: Callable[[], object], device: Device, rounds: int) -> tuple[float, float | None, float]:
    """Returns microseconds of one step, by a call for each: Python's, the device's, and from the first call of
    STEPS_AT_ONCE to the end of the last step. Medians of rounds, which begin alike, after one that is not counted."""
    of_host, of_device, of_both = [], [], []
    for _ in range(rounds + 1):
        steps.mirror.put()
        device.synchronize()
        first = event(device)
        begin = time.perf_counter()
        for _ in range(STEPS_AT_ONCE):
            call()
        sent = time.perf_counter()
        last = event(device)
        device.synchronize()
        of_both.append(time.perf_counter() - begin)
        of_host.append(sent - begin)
        if first and last:
            of_device.append(first.elapsed_time(last) / 1e3)  # from milliseconds
    host, both = (statistics.median(each[1:]) / STEPS_AT_ONCE * 1e6 for each in (of_host, of_both))
    return host, statistics.median(of_device[1:]) / STEPS_AT_ONCE * 1e6 if of_device else None, both


def event(device: Device) -> DeviceEvent | None:
    """Returns one that a GPU comes by behind all that it was sent."""
    if device.is_host:
        return None
    made = DeviceEvent(device, enable_timing=True)
    device.default_queue.record_event(made)
    return made


def launches(call: Callable[[], object], device: Device) -> dict[str, int] | None:
    """Returns how many of each kind of device operation a call launches; None on a CPU, which MAX does not trace."""
    if device.is_host:
        return None
    with launch_trace() as entries:
        call()
        device.synchronize()
    return dict(Counter(entry.kind.name.lower() for entry in entries))


def measure(
    graphs: Graphs, dims: ModelDimensions, case: Case, device: Device, dtype: torch.dtype, rate: float, rounds: int
) -> Timing:
    """Times the steps of a case. rate: of `read_rate`."""
    steps, n_bytes = steps_of(graphs, dims, case, device, dtype)
    repeated = steps.step
    host, on_device, both = timed(steps, repeated, device, rounds)
    executed_host, executed_device, _ = timed(steps, repeated.execute, device, rounds)
    times = None if device.is_host else host, on_device, executed_host, executed_device
    launched = launches(repeated.execute, device)
    return Timing(str(case), repeated.captured, *times, launched, n_bytes / rate * 1e6, both)


COLUMNS = {
    "texts": lambda t: t.case,
    "captured": lambda t: "yes" if t.captured else "no",
    "host": lambda t: figure(t.host),
    "device": lambda t: figure(t.device),
    "floor": lambda t: figure(t.floor),
    "device / floor": lambda t: "not measured" if t.device is None else f"{t.device / t.floor:.1f}",
    "step": lambda t: figure(t.step),
    "executed: host": lambda t: figure(t.executed_host),
    "executed: device": lambda t: figure(t.executed_device),
    "launches": lambda t: (
        "not measured" if t.launches is None else ", ".join(f"{n} {k}" for k, n in t.launches.items())
    ),
}


def figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0f}"


def table(timings: Sequence[Timing]) -> str:
    """Returns Markdown, microseconds of one step."""
    lines = [[*COLUMNS], ["---"] * len(COLUMNS), *([column(each) for column in COLUMNS.values()] for each in timings)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser("python -m reference.perf.step", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default=str(NANO), help="a checkpoint, or random:SIZE (default: the trained fixture)"
    )
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: a rehearsal (default: gpu)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="default: float16")
    parser.add_argument("--artifacts", metavar="DIR", help="graphs compiled ahead, for a GPU")
    parser.add_argument("--cases", type=int, default=len(CASES), help=f"the first so many of {len(CASES)}")
    parser.add_argument("--rounds", type=int, default=20, help=f"of {STEPS_AT_ONCE} steps (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    given = parser.parse_args(arguments)
    try:
        graphs, dims, device = graphs_of(given.model, given.device, given.dtype, given.artifacts)
    except MaxWhisperError as error:
        sys.exit(one_line(error))
    rate, dtype = read_rate(device), TORCH_DTYPE[DTYPES[given.dtype]]
    timings = []
    for case in CASES[: given.cases]:
        timings.append(measure(graphs, dims, case, device, dtype, rate, given.rounds))
        if given.json:  # of each case before the next begins
            of_all = {"read_bytes_per_second": rate, "timings": [asdict(each) for each in timings]}
            given.json.write_text(json.dumps({"model": given.model, **of_all}, indent=1))
    print(
        f"{given.model}, {given.dtype}, {given.device}; a large read: {rate / 1e9:.0f} GB/s; microseconds of one step"
    )
    print(table(timings))


if __name__ == "__main__":
    main()
