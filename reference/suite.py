"""A model under test: its blocks on MAX beside PyTorch's, and the verdict on each."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from whisper.model import ModelDimensions, Whisper

from maxwhisper.compiled import policy_of
from maxwhisper.engine.artifacts import Artifacts
from maxwhisper.engine.program import Executable
from maxwhisper.engine.session import Policy
from maxwhisper.network.blocks import BLOCKS, Block

from .blocks import pytorch_whisper
from .inputs import comparisons, inputs
from .judge import Comparison, Explanation, Judgement, dtype_name
from .measures import DTYPES as DTYPES  # for reference.perf.worker, which finds it here in every revision
from .models import Model
from .models import load as load
from .subject import Subject
from .trial import Run, Trial, threads_for
from .verdicts import Memory, Verdicts


@dataclass(frozen=True, eq=False)
class Suite:
    """A model in one dtype on one device ("cpu" or "gpu"): oracle, peer and subject of every block.

    held: what was compiled ahead of time, if anything was.
    memory: of verdicts, on a CPU; without one they are all found anew.
    only: the blocks that will be asked for, where these are not all: they compile without the others, unless all were
        compiled earlier.
    chains: by kind of inputs, what oracle and peer make of the whole network: see `reference.chain`. scenes: what
        `reference.steps` gives steppers, of each scene. trials: what faults are held against, in `reference.faults`.
    """

    model: Model
    dtype: torch.dtype
    device: str = "cpu"
    held: Artifacts | None = None
    memory: Memory | None = None
    only: frozenset[str] = frozenset()
    chains: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)
    scenes: dict[object, Any] = field(default_factory=dict)
    trials: dict[Comparison, Trial] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Suite({self.model.size}, {self.dtype}, {self.device})"

    @property
    def dims(self) -> ModelDimensions:
        return self.model.dims

    @cached_property
    def torch_device(self) -> torch.device:
        return torch.device("cpu" if self.device == "cpu" else "cuda")

    @cached_property
    def policy(self) -> Policy:
        return policy_of(self.model.tensors, self.device, dtype_name(self.dtype))

    @cached_property
    def peer(self) -> Whisper:
        """Returns PyTorch's model in the dtype under test."""
        return pytorch_whisper(*self.model.weights, self.dtype).to(self.torch_device)

    @cached_property
    def subject(self) -> Subject:
        """Returns the model on MAX."""
        return Subject(self.model, self.policy, self.device, self.held, self.only)

    def executable(self, block: Block, layer: int) -> Executable:
        """Returns the block on MAX with the weights of a layer."""
        return self.subject.executable(block, layer)

    def comparisons(self, block: Block, kinds: Iterable[str], seed: int = 0) -> Iterator[Comparison]:
        """Yields every layer of the block on every kind of inputs that means something for it."""
        return comparisons(block, self.model.size, self.dims, self.dtype, kinds, self.device, seed)

    def inputs(self, block: Block, comparison: Comparison) -> dict[str, Tensor]:
        """Returns the oracle's own inputs, rounded to the dtype under test."""
        return inputs(block, self.model, self.policy, comparison)

    # ---- verdicts ----------------------------------------------------------------------------------------------------

    def trial(self, comparison: Comparison, run: Run | None = None) -> Trial:
        """Returns the three computations of a comparison. run: the block on MAX, if it is not to be the suite's own."""
        block = BLOCKS[comparison.block]
        return Trial(self, comparison, self.inputs(block, comparison), run or self.executable(block, comparison.layer))

    def judge(self, comparison: Comparison, run: Run | None = None) -> Judgement:
        """Returns the isolated verdict, explained where only a cut of the work for other threads is wrong. run: as for
        `trial`; what is said of another than the suite's own is not kept."""
        if not run and (misread := self.misread(comparison)):
            return Judgement(comparison, (), tuple(misread))
        trial = self.trial(comparison, run)
        if run:
            return trial.judge()
        judgement = self.verdict(trial, trial.subject)
        for n_thread in threads_for(comparison) if self.device == "cpu" and judgement.passed else ():
            outputs = trial.outputs(n_thread)
            if not all(map(torch.equal, outputs, trial.subject)):
                cut = self.verdict(trial, outputs)
                if not cut.passed:
                    defects = (*cut.defects, f"with work cut for {n_thread} threads")
                    return replace(cut, defects=defects, explanations=trial.explain(outputs) if cut.pairs else ())
        return judgement

    def verdict(self, trial: Trial, outputs: list[Tensor]) -> Judgement:
        """Returns what the judge says of the subject's outputs, or said in an earlier run."""
        tensors = trial.given | {f"output {index}": x for index, x in enumerate(outputs)}
        (judgement,) = self.recalled(trial.comparison, tensors, lambda: [trial.judge(outputs)])
        return judgement

    def misread(self, comparison: Comparison) -> list[str]:
        """Returns what the subject's loader has got wrong of the block, where values say nothing of the graph."""
        block, layer = BLOCKS[comparison.block], comparison.layer
        path = block.path.format(audio_layer=layer, text_layer=layer) + "."
        without_layers = block.unit == "parts" and ".blocks." not in path
        return [
            f"the loaders of weights differ in {name}: {how}"
            for name, how in self.model.misread.items()
            if name.startswith(path) and not (without_layers and ".blocks." in name) or "." not in name
        ]

    def recalled(
        self, comparison: Comparison, tensors: Mapping[str, Tensor], judge: Callable[[], list[Judgement]], way: str = ""
    ) -> list[Judgement]:
        """Returns what `judge` gives, or gave in an earlier run: see `reference.verdicts`. way: tells apart what is
        compared in several ways under one name."""
        return self.verdicts.recalled(f"{comparison}{way}", tensors, judge) if self.verdicts else judge()

    @property
    def verdicts(self) -> Verdicts | None:
        """Returns those of earlier runs, which are kept on a CPU alone."""
        if self.memory is None or self.device != "cpu":
            return None
        return Verdicts(self.memory, self.model.fingerprint)

    def finite_as_pytorch(self, comparison: Comparison, given: dict[str, Tensor], way: str) -> bool:
        """Tells whether MAX's outputs are finite where PyTorch's are, or were in an earlier run. given: the inputs,
        which differ from those of the comparison in some `way`."""
        trial = Trial(self, comparison, given, self.executable(BLOCKS[comparison.block], comparison.layer))
        seen = {f"output {index}": x.isfinite() for index, x in enumerate(trial.subject)}
        if not self.verdicts:
            return trial.finite_as_pytorch()
        return self.verdicts.holds(f"{comparison}, finite, {way}", given | seen, trial.finite_as_pytorch)

    def explain(self, comparison: Comparison) -> tuple[Explanation, ...]:
        """Returns where and how MAX errs in the comparison."""
        return self.trial(comparison).explain()
