"""The judge on trial: wrong models, every one of which it must catch, in the block that is wrong.

A *weight* fault (weight_faults.py) changes the tensors that MAX is given, and needs no compilation. A *graph* fault
(graph_faults.py) changes `maxwhisper.network` while one block's graph is built; all of a run compile into one artifact.
The oracle and the peer stay right in both.

Caught means that a check fails: one of the judge's measures on the block alone (the isolated verdict), or the chain
over the whole network, which must then name a submodule inside the faulty block as the first divergence.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from max.graph import TensorValue
from max.nn.layer import Module
from torch import Tensor
from whisper.model import ModelDimensions

from maxwhisper.engine.program import Artifact, Executable, Program
from maxwhisper.network.blocks import BLOCKS, Block

from . import mistakes
from .activations import KINDS
from .judge import Judgement, K, dtype_name
from .suite import Suite

Tensors = dict[str, Tensor]
LAYER = 1
"""Faults that are in a layer are in this one: neither the first nor, in the decoder, the last."""


@dataclass(frozen=True)
class Fault:
    """A wrong model.

    block: the entry of BLOCKS, the innermost, that is wrong by it. path: its place in the PyTorch model, where the
    first divergence must lie. change: of the tensors. patched: of the code, while the graph is built. kind: "weights"
    or "graph". published: whether an earlier attempt at this port is known to have made it.
    """

    name: str
    block: str
    path: str
    change: Callable[[Tensors, ModelDimensions], Mapping[str, Tensor]] | None = None
    patched: mistakes.Patch | None = None
    kind: str = "weights"
    published: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but the functions, which cannot be pickled, and which whoever reads of a fault does not call."""
        return vars(self) | {"change": None, "patched": None}


@dataclass(frozen=True)
class FaultResult:
    """What the judge made of a fault in one dtype.

    checks: those that failed, "isolated: <measure>" or "chain". divergence: where the chain first left its budget, None
    where it did not or was not run. used: how much of its budget the block took at most, above 1 being caught.
    rounding: by kind of inputs, the relative L2 of PyTorch's own error in the block. effect: the same of the faulty
    block; of one that was not caught, in float32.
    """

    fault: Fault
    dtype: torch.dtype
    checks: tuple[str, ...]
    divergence: str | None
    used: float
    rounding: Mapping[str, float]
    effect: Mapping[str, float]

    @property
    def caught(self) -> bool:
        return bool(self.checks)

    @property
    def right_block(self) -> bool:
        """Tells whether it was caught, and the chain, if that diverged, did so where the faulty block stands."""
        return self.caught and (self.divergence or self.fault.path).removeprefix("step ").startswith(self.fault.path)

    def below(self, times: float) -> bool:
        """Tells whether the fault changes the block by less than so many times PyTorch's rounding; never in float32."""
        small = (self.effect[kind] <= times * rounding for kind, rounding in self.rounding.items())
        return self.dtype != torch.float32 and all(small)

    @property
    def below_rounding(self) -> bool:
        return self.below(1)

    @property
    def accepted(self) -> bool:
        """Tells whether it was caught where it is, or has less effect than K roundings, where the judge is blind by
        design."""
        return self.right_block if self.caught else self.below(K)

    @property
    def only_check(self) -> str | None:
        """Returns the one check that caught it, if it was only one: nobody must delete that."""
        return self.checks[0] if len(self.checks) == 1 else None

    def __str__(self) -> str:
        found = ", ".join(self.checks) or "nothing"
        kind = max(self.rounding, key=lambda kind: self.effect[kind] / (self.rounding[kind] or 1), default="")
        lines = [
            f"fault: {self.fault.name}, in {self.fault.block}, {self.dtype}",
            f"  caught by {found}; the block used {self.used:.3g} of its budget",
            f"  the chain's first divergence: {self.divergence}, expected in {self.fault.path}",
        ]
        if kind:
            figures = f"effect {self.effect[kind]:.1e}, PyTorch's rounding {self.rounding[kind]:.1e}"
            lines.append(f"  relative L2, {kind}: {figures}")
        return "\n".join(lines)


def path_of(block: str) -> str:
    """Returns the place of a block in the PyTorch model, in LAYER where it is in a layer."""
    return BLOCKS[block].path.format(audio_layer=LAYER, text_layer=LAYER)


# ---- what many came to ----------------------------------------------------------------------------------------------

MISSED, WRONG_BLOCK, BELOW, CAUGHT = "missed", "caught, in the wrong block", "not caught, below the budget", "caught"
"""The worst first. Only the first two are failures."""


def outcome(fault: FaultResult) -> str:
    if fault.caught:
        return CAUGHT if fault.right_block else WRONG_BLOCK
    return BELOW if fault.accepted else MISSED


@dataclass(frozen=True)
class FaultTotals:
    """Counts of a dtype's faults. below: not caught, and below PyTorch's rounding; between: that and the budget."""

    n: int
    caught: int
    right_block: int
    below: int
    between: int
    missed: int
    only_one: int
    published: int


def fault_totals(faults: Sequence[FaultResult]) -> dict[str, FaultTotals]:
    totals = {}
    for dtype in dict.fromkeys(fault.dtype for fault in faults):
        of = [fault for fault in faults if fault.dtype == dtype]
        outcomes = [outcome(fault) for fault in of]
        totals[dtype_name(dtype)] = FaultTotals(
            n=len(of),
            caught=sum(fault.caught for fault in of),
            right_block=outcomes.count(CAUGHT),
            below=(below := sum(not fault.caught and fault.below_rounding for fault in of)),
            between=outcomes.count(BELOW) - below,
            missed=outcomes.count(MISSED),
            only_one=sum(fault.only_check is not None for fault in of),
            published=sum(fault.fault.published for fault in of),
        )
    return totals


# ---- the trial -----------------------------------------------------------------------------------------------------


def with_weight_fault(suite: Suite, fault: Fault) -> dict[str, Executable]:
    """Returns every graph of the suite, with the fault in its weights."""
    assert fault.change is not None
    tensors = suite.subject.tensors
    return suite.subject.graphs_with({**tensors, **fault.change(tensors, suite.dims)}, LAYER)


def faulty(fault: Fault, right: Program) -> Program:
    """Returns the program of the fault's block with the fault in it, which is there only while it is traced."""

    def function(module: Module, **inputs: TensorValue) -> Sequence[TensorValue]:
        assert fault.patched is not None
        with fault.patched():
            return right.function(module, **inputs)

    return replace(right, name=fault.name, function=function)


def compile_graph_faults(suite: Suite, faults: Sequence[Fault]) -> dict[str, Executable]:
    """Compiles the faulty blocks of graph faults together; returns them by the fault's name."""
    programs = [faulty(fault, BLOCKS[fault.block].program(suite.dims, suite.policy)) for fault in faults]
    artifact = Artifact(f"{suite.model.size}, graph faults", programs, suite.device)
    return artifact.init(suite.subject.tensors, audio_layer=LAYER, text_layer=LAYER)


def isolated(suite: Suite, fault: Fault, executable: Executable) -> Iterator[Judgement]:
    """Judges the faulty block alone, on one kind of inputs after the other."""
    block: Block = BLOCKS[fault.block]
    layer = min(LAYER, block.n_layer(suite.dims) - 1)
    for comparison in suite.comparisons(block, KINDS):
        if comparison.layer == layer:
            # All faults of a block are held against the same oracle and peer.
            trial = suite.trials.get(comparison) or suite.trial(comparison)
            suite.trials[comparison] = trial
            yield trial.judge([x.cpu() for x in executable(**trial.there)])


def until_caught(judgements: Iterable[Judgement]) -> list[Judgement]:
    """Returns the verdicts up to the first that shows the fault."""
    seen = []
    for judgement in judgements:
        seen.append(judgement)
        if not judgement.passed:
            break
    return seen


def result_of(
    fault: Fault,
    dtype: torch.dtype,
    judgements: Sequence[Judgement],
    in_float32: Sequence[Judgement],
    divergence: str | None,
) -> FaultResult:
    """Returns what the judge made of a fault.

    in_float32: for a fault that was not caught the same judgements in float32, where the error is the fault's effect
    and hardly any rounding.
    """
    failed = {f"isolated: {measure.name}" for j in judgements for _, measure in j.measures if not measure.within}
    failed |= {"isolated: not comparable" for judgement in judgements if judgement.defects}
    checks = sorted(failed) + (["chain"] if divergence else [])
    used = max((j.worst.used if j.pairs and not j.defects else math.inf for j in judgements), default=0.0)
    rounding = {j.comparison.inputs: j.relative_l2.peer for j in judgements if j.pairs}
    effect = {j.comparison.inputs: j.relative_l2.subject if j.pairs else math.inf for j in in_float32}
    return FaultResult(fault, dtype, tuple(checks), divergence, used, rounding, effect)
