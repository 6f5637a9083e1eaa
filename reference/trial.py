"""A block on trial: the three computations of one comparison, each made once, and what the judge says of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor
from whisper.model import Whisper

from . import tf32
from .activations import BATCH, END, KINDS
from .blocks import TWINS
from .formulas import in_float64
from .inputs import moved
from .judge import UNIT_ROUNDOFF, Comparison, Explanation, Judgement, condition, explain, judge, judge_by_condition
from .measures import WELL_CONDITIONED, Condition
from .models import Model

THREADS = (1, 3, 5, 8)
"""For how many threads kernels cut their work, beside as many as there are here: an odd number leaves some over."""

Outputs = list[Tensor]
VARIABLE = "MAXWHISPER_THREADS"
Run = Callable[..., Outputs]
"""A block on MAX, or what stands in for one: from its inputs by name to its outputs."""


def threads_for(comparison: Comparison) -> tuple[int, ...]:
    """Returns for how many threads a comparison is made again. How work is cut depends on shapes, which all layers,
    dtypes and most kinds of inputs share: on speech, several windows and a text to the end the first layer is given all
    of THREADS in float32, every other comparison one of them in turn."""
    in_every_shape = comparison.layer == 0 and comparison.inputs.startswith(("speech", BATCH, END))
    if in_every_shape and comparison.dtype == torch.float32:
        return THREADS
    kind, _, moment = comparison.inputs.partition(".")
    turn = KINDS.index(kind) + comparison.layer + (moment == "first")
    return (THREADS[turn % len(THREADS)],)


@contextmanager
def cut_for(n_thread: int | None) -> Iterator[None]:
    """Has kernels of our own cut their work for a number of threads, whatever the machine has; None: for its own."""
    before = os.environ.pop(VARIABLE, None)
    if n_thread:
        os.environ[VARIABLE] = str(n_thread)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before:
            os.environ[VARIABLE] = before


class References(Protocol):
    """The model that is the oracle, and PyTorch's in the dtype under test, made when somebody first asks: a suite."""

    @property
    def model(self) -> Model: ...

    @property
    def peer(self) -> Whisper: ...


@dataclass(frozen=True, eq=False)
class Trial:
    """Oracle, peer and subject of a comparison on the same inputs, the oracle's own.

    given: the inputs by name, in the dtype under test. run: the subject.
    """

    suite: References
    comparison: Comparison
    given: dict[str, Tensor]
    run: Run

    @cached_property
    def there(self) -> dict[str, Tensor]:
        """Returns the inputs where peer and subject compute."""
        return moved(self.given, self.comparison.torch_device)

    @cached_property
    def subject(self) -> Outputs:
        """Returns what MAX makes of the inputs."""
        return self.outputs()

    @torch.no_grad()
    def outputs(self, n_thread: int | None = None) -> Outputs:
        """Returns what MAX makes of the inputs, with work cut for a number of threads.

        Such a cut runs in the memory of a run before it. Where every cut is tried, that has had no numbers for inputs,
        or what a cut leaves out would be there from one that was right.
        """
        if n_thread and threads_for(self.comparison) == THREADS:
            self.run(**self.no_numbers)
        with cut_for(n_thread):
            return [x.cpu() for x in self.run(**self.there)]

    @cached_property
    def no_numbers(self) -> dict[str, Tensor]:
        """Returns inputs of the same shapes of which nothing right can come: NaN, and the first token."""
        return {
            name: torch.full_like(x, torch.nan) if x.is_floating_point() else x * 0 if name == "tokens" else x
            for name, x in self.there.items()
        }

    @cached_property
    @torch.no_grad()
    def peer(self) -> Outputs:
        """Returns what PyTorch in the dtype under test makes of the inputs."""
        twin = TWINS[self.comparison.block]
        return [x.cpu() for x in twin(self.suite.peer, self.comparison.layer, **self.there)]

    @cached_property
    def oracle(self) -> Outputs:
        """Returns what PyTorch in float64 makes of the inputs."""
        return self.exactly(in_float64(self.given))

    @torch.no_grad()
    def exactly(self, inputs: dict[str, Tensor]) -> Outputs:
        """Returns what PyTorch in float64 makes of other inputs of that dtype."""
        return TWINS[self.comparison.block](self.suite.model.oracle, self.comparison.layer, **inputs)

    def finite_as_pytorch(self) -> bool:
        """Tells whether MAX's outputs are finite where those of PyTorch in the same dtype are, or of the oracle:
        infinity times what is almost 0 has the sign of a rounding error, and PyTorch's may be the wrong one."""
        ours, theirs = finite(self.subject), finite(self.peer)
        if all(map(torch.equal, ours, theirs)):
            return True
        each = zip(ours, theirs, finite(self.oracle), strict=True)
        return all(bool(((mine == its) | (mine == right)).all()) for mine, its, right in each)

    def judge(self, subject: Outputs | None = None) -> Judgement:
        """Returns the verdict; the condition of the block is found where it would not pass without.

        subject: what MAX made of the inputs, if not `self.subject`.
        """
        return judge_by_condition(partial(self.judged, subject=subject), lambda: self.condition)

    def judged(self, condition: Condition = WELL_CONDITIONED, subject: Outputs | None = None) -> Judgement:
        """Returns the verdict under a condition of the block on the inputs."""
        twin, dims = TWINS[self.comparison.block], self.suite.model.dims
        return judge(
            self.comparison,
            self.oracle,
            self.peer,
            self.subject if subject is None else subject,
            longest_reduction=twin.longest_reduction(dims),
            roundings=twin.roundings(dims),
            n_vocab=dims.n_vocab,
            condition=condition,
        )

    @cached_property
    def condition(self) -> Condition:
        """Returns the condition of the block on the inputs, for roundings in the comparison's dtype."""
        roundoff, seed = UNIT_ROUNDOFF[self.comparison.dtype], self.comparison.seed
        return condition(self.exactly, in_float64(self.given), roundoff, seed)

    def explain(self, subject: Outputs | None = None) -> tuple[Explanation, ...]:
        """Returns where and how MAX errs. subject: as for `judge`."""
        return explain(self.oracle, self.peer, self.subject if subject is None else subject, self.in_tf32())

    def in_tf32(self) -> dict[str, Outputs]:
        """Returns what the oracle makes of the inputs with products in TF32, by what a failure of float32 then looks
        like."""
        found = {}
        for rounding in tf32.ROUNDINGS if self.comparison.dtype == torch.float32 else ():
            with tf32.TF32(rounding):
                found[tf32.name(rounding)] = self.exactly(in_float64(self.given))
        return found


def finite(outputs: Outputs) -> Outputs:
    """Returns where values are finite."""
    return [x.isfinite() for x in outputs]
