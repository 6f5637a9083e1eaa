"""A process that times the blocks and decode loops of one source tree on one engine, told what to do line by line.

    PYTHONPATH=TREE python -P worker.py SIZE DTYPE DEVICE [--checkpoint PATH] [--artifacts DIR]

Requests and replies are JSON objects, one a line; reference/perf/engine.py is the other end. `maxwhisper` and
`reference` are those of TREE, so that a gate has two revisions timed by the same lines, these. They rely on little of a
tree, for it may be an old one: `BLOCKS`; of `reference.suite` DTYPES, load and Suite; for loops Whisper and Checkpoint.

Each engine gets a process of its own because the thread pools of two engines disturb each other: their threads spin for
a while after every call, on the cores that the other wants.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TextIO

import torch
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.tokenizer import get_tokenizer

import maxwhisper
from maxwhisper.network.blocks import BLOCKS
from reference.suite import DTYPES, Suite, load

PR_SET_PDEATHSIG = 1
MATRIX, VECTOR = 2048, 2**26
"""Rows of the matrix product and elements of the copy and of the read that find the machine's ceilings: far more than
its caches hold."""
N_TOKEN = 50
"""How many tokens every text of a decode loop has, which does not end before."""


@dataclass(frozen=True)
class Loop:
    """openai-whisper's `decode` of some windows at once, from their audio features on. beam_size: None is greedy."""

    n_window: int = 1
    beam_size: int | None = None


LOOPS = {"decode.greedy": Loop(), "decode.beams": Loop(beam_size=5), "decode.batch": Loop(n_window=8)}
"""What users wait for beside the encoder: more than a block, so none of `BLOCKS`."""
FEATURES = "decoder.keys_values"
"""The block that takes audio features."""


def gpu_queue(engine: str) -> tuple[Any, Callable[[], Any]]:
    """Returns what the engine computes on, and what makes events to be recorded there."""
    if engine == "PyTorch":
        return torch.cuda.current_stream(), partial(torch.cuda.Event, enable_timing=True)
    from max.driver import Accelerator, DeviceEvent

    device = Accelerator()
    return device.default_queue, partial(DeviceEvent, device, enable_timing=True)


class Blocks:
    """The blocks of a suite, and in float32 its decode loops, ready to be timed."""

    def __init__(self, suite: Suite):
        self.suite = suite
        self.calls: dict[str, Callable[[], object]] = {}

    def takes(self) -> dict[str, list[str]]:
        """Returns, by block or loop, its inputs: names, dtypes and dimensions."""
        dims, policy = self.suite.dims, self.suite.policy
        taken = {
            name: [f"{given} {kind}" for given, kind in block.inputs(dims, policy).items()]
            for name, block in BLOCKS.items()
        }
        if self.suite.dtype == torch.float32 and self.selects_tokens:
            taken |= dict.fromkeys(LOOPS, taken[FEATURES])
        return taken

    @property
    def selects_tokens(self) -> bool:
        """Tells whether the graphs of decode loops can be had: artifacts hold those of models that speak."""
        if self.suite.held is None:
            return True
        from maxwhisper.compiled import DECODING

        held, dims = self.suite.held.held, vars(self.suite.dims)
        return any(each.identity.unit == DECODING and each.identity.dims == dims for each in held)

    def save(self, block: str, path: str) -> None:
        """Writes the block's inputs, its true ones for speech in its last layer, at the end of the text.

        Contiguous, as a user's are: those that are views of a whole recording would be copied at every call.
        """
        block = FEATURES if block in LOOPS else block
        inputs = self.suite.inputs(BLOCKS[block], self.comparison(block))
        torch.save({name: x.contiguous() for name, x in inputs.items()}, path)

    def prepare(self, block: str, path: str, engine: str) -> None:
        """Compiles the block, loads the inputs that `save` wrote, and runs it once."""
        if block in LOOPS:
            (features,) = torch.load(path).values()
            self.calls[block] = self.decoding(LOOPS[block], features.to(self.suite.torch_device), engine)
        else:
            self.calls[block] = self.executing(block, path, engine)
        self.time(block, 1)

    def executing(self, block: str, path: str, engine: str) -> Callable[[], object]:
        comparison = self.comparison(block)
        device = torch.device("cpu") if comparison.device == "cpu" else self.suite.torch_device
        inputs = {name: x.to(device) if x.ndim else x for name, x in torch.load(path).items()}
        if engine == "PyTorch":
            return self.on_pytorch(block, comparison.layer, inputs)
        run = self.suite.executable(BLOCKS[block], comparison.layer)
        return lambda: run(**inputs)

    def on_pytorch(self, block: str, layer: int, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
        from reference.blocks import TWINS

        @torch.inference_mode()
        def call() -> object:
            return TWINS[block](self.suite.peer, layer, **inputs)

        return call

    def decoding(self, loop: Loop, features: torch.Tensor, engine: str) -> Callable[[], list[DecodingResult]]:
        """Returns what decodes N_TOKEN tokens of each window; features: (window, n_audio_ctx, state), of which the
        first is taken, and for more windows the same moved by a second each."""
        model = self.suite.peer if engine == "PyTorch" else self.drop_in
        options = DecodingOptions(
            language="en",
            beam_size=loop.beam_size,
            sample_len=N_TOKEN,
            suppress_tokens=[get_tokenizer(model.is_multilingual, num_languages=model.num_languages).eot],
            without_timestamps=True,
            fp16=False,
        )
        windows = torch.stack([features[0].roll(50 * i, dims=0) for i in range(loop.n_window)])
        return lambda: model.decode(windows, options)

    @cached_property
    def drop_in(self) -> Any:
        """Returns the suite's weights as openai-whisper's object, on MAX."""
        from maxwhisper.checkpoint import Checkpoint
        from maxwhisper.whisper import Whisper

        model = self.suite.model
        checkpoint = Checkpoint(model.size, Path(model.size), model.dims, dict(model.tensors), None)
        return Whisper(checkpoint, self.suite.device, self.suite.held)

    def time(self, block: str, calls: int) -> list[float]:
        """Returns the seconds of each of so many calls, after one that is not timed: threads are awake and caches are
        warm, as in a user's loop."""
        return self.seconds(self.calls[block], calls)

    def device_time(self, block: str, engine: str, calls: int) -> list[float]:
        """Returns the seconds of each of so many calls, after one that is not counted, on the clock of the GPU: between
        two events on the engine's queue.

        Python waits for the last call alone, so that it is ahead of the GPU, unless a call takes Python longer. There
        are none of a block that is computed on the CPU, nor of a loop, which waits after every token.
        """
        if block in LOOPS or self.comparison(block).device == "cpu":
            return []
        queue, event = gpu_queue(engine)
        events = [(event(), event()) for _ in range(calls + 1)]
        for start, end in events:
            queue.record_event(start)
            self.calls[block]()
            queue.record_event(end)
        events[-1][1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events[1:]]  # from milliseconds

    def product(self, engine: str) -> dict[str, float]:
        """Measures the FLOP/s of a large matrix product in the suite's dtype, best of ten."""
        a = torch.ones(MATRIX, MATRIX, dtype=self.suite.dtype, device=self.suite.torch_device)
        call = self.product_on_max(a) if engine == "MAX" else lambda: a @ a
        return {"matmul": 2 * MATRIX**3 / min(self.seconds(call, 10))}

    def product_on_max(self, a: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
        from max.graph import TensorType

        from maxwhisper.engine.program import Artifact, Program
        from maxwhisper.network.model import Linear

        policy = replace(self.suite.policy, storage=self.suite.policy.compute)
        inputs = {"x": TensorType(policy.compute, [1, MATRIX, MATRIX], policy.device)}
        linear = Linear(MATRIX, MATRIX, policy, bias=False)
        program = Program("product", "", linear, lambda linear, x: [linear(x)], inputs)
        run = Artifact("a large product", [program], self.suite.device).init({"weight": a.cpu()})["product"]
        return lambda: run(x=a[None])

    def bandwidth(self) -> dict[str, float]:
        """Measures the bytes/s, best of ten, of a large copy, which reads and writes, and of a large read."""
        device = self.suite.torch_device
        source = torch.ones(VECTOR, device=device)
        target, size = torch.empty_like(source), source.nbytes
        return {
            "copy": 2 * size / min(self.seconds(lambda: target.copy_(source), 10)),
            "read": size / min(self.seconds(source.sum, 10)),
        }

    def seconds(self, call: Callable[[], object], calls: int) -> list[float]:
        seconds = []
        for _ in range(calls + 1):
            start = time.perf_counter()
            call()
            if self.suite.device == "gpu":  # a GPU works on while Python goes on; the time is that of the work
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def comparison(self, block: str) -> Any:
        return list(self.suite.comparisons(BLOCKS[block], ["speech"]))[-1]


def replies_to() -> TextIO:
    """Returns the stream of replies. What else is printed, by any library, goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return replies


def end_with_parent() -> None:
    """Has this process end with its parent, on Linux: one that is stopped does not see its pipe close."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def holding(suite: Suite, artifacts: str) -> Suite:
    """Returns the suite with artifacts; ends the process where the tree's code cannot read them."""
    try:
        from maxwhisper.engine.artifacts import Artifacts

        return replace(suite, held=Artifacts(artifacts, suite.device))
    except (ImportError, TypeError) as error:
        sys.exit(f"the code of this tree cannot read artifacts: {error}")


def main() -> None:
    end_with_parent()
    replies = replies_to()
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("size", "dtype", "device"):
        parser.add_argument(name)
    for name in ("--checkpoint", "--artifacts"):
        parser.add_argument(name)
    options = parser.parse_args()
    suite = Suite(load(options.size, options.checkpoint), DTYPES[options.dtype], options.device)
    if options.artifacts:
        suite = holding(suite, options.artifacts)
    blocks = Blocks(suite)
    tree = str(Path(maxwhisper.__file__).parent.parent)
    print(json.dumps({"result": {"tree": tree, "takes": blocks.takes()}}), file=replies)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            result = getattr(blocks, request.pop("do"))(**request)
            print(json.dumps({"result": result}), file=replies)
        except Exception as error:  # whatever a tree's block raises is for the other end to report
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)


if __name__ == "__main__":
    main()
