"""A model on MAX: what of it compiles together, and its graphs with the weights of any layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from max.graph import DeviceRef
from max.graph import Module as GraphModule
from torch import Tensor

from maxwhisper.compiled import ON_CPU, rounded_tensors, unit_of
from maxwhisper.engine.artifacts import Artifacts, Cache
from maxwhisper.engine.folders import cache_folder
from maxwhisper.engine.program import Artifact, Executable, Program
from maxwhisper.engine.session import Policy
from maxwhisper.network.blocks import BLOCKS, Block
from maxwhisper.network.log_mel import LOG_MEL, log_mel_weights

from .intermediates import WITH_INTERMEDIATES, with_intermediates
from .models import TRAINED, Model

CHOSEN = "chosen"
"""The unit of the blocks of a selection."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The blocks of a model on MAX under a policy; each unit compiles when one of its blocks is first asked for.

    device, held, only: as `Suite` has them. artifacts: by unit, and executables: by unit and layer, those made so far.
    found_kept: by unit, whether it was compiled when somebody first asked.
    """

    model: Model
    policy: Policy
    device: str = "cpu"
    held: Artifacts | None = None
    only: frozenset[str] = frozenset()
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    executables: dict[tuple[str, int], dict[str, Executable]] = field(default_factory=dict)
    found_kept: dict[str, bool] = field(default_factory=dict)

    # ---- what compiles together --------------------------------------------------------------------------------------

    @cached_property
    def cache(self) -> Cache:
        """Returns where graphs are kept from run to run."""
        return Cache(cache_folder("graphs"))

    @property
    def transcribes(self) -> bool:
        """Tells whether whole transcripts are made of the model."""
        return self.model.size in TRAINED

    @property
    def units(self) -> list[str]:
        """Returns what compiles where all blocks are asked for."""
        return sorted({self.whole(block) for block in BLOCKS.values()})

    def whole(self, block: Block) -> str:
        """Returns what the block compiles together with where all blocks are asked for: all of the model, but where
        whole transcripts are made, the network alone, as `load_model` compiles it."""
        unit = unit_of(block.name, self.device)
        return unit if unit in ON_CPU or unit == "network" and self.transcribes else "parts"

    def unit(self, block: Block) -> str:
        """Returns what the block compiles together with."""
        whole = self.whole(block)
        alone = block.name in self.only and (whole == "parts" or block.name == LOG_MEL) and not self.held
        return CHOSEN if alone and not self.kept(whole) else whole

    def kept(self, unit: str) -> bool:
        """Tells whether a unit has been compiled already."""
        if unit not in self.found_kept:
            self.found_kept[unit] = self.cache.holds(unit, self.model.dims, self.policy, self.programs(unit))
        return self.found_kept[unit]

    @cached_property
    def intermediates(self) -> dict[str, tuple[Program, list[str]]]:
        """Returns by block its program with intermediates, and their names once that is traced."""
        return {name: with_intermediates(BLOCKS[name], self.model.dims, self.policy) for name in WITH_INTERMEDIATES}

    def intermediate_names(self, block: str) -> list[str]:
        """Returns the layers whose outputs stand behind those of a block with intermediates."""
        program, names = self.intermediates[block]
        if not names:  # its graph came compiled
            program.trace(GraphModule())
        return names

    def programs(self, unit: str) -> list[Program]:
        """Returns the graphs of a unit; "parts" holds those with intermediates too."""
        policy = replace(self.policy, device=DeviceRef.CPU()) if unit in ON_CPU else self.policy
        of = self.unit if unit == CHOSEN else self.whole
        blocks = [block for block in BLOCKS.values() if of(block) == unit]
        others = [program for program, _ in self.intermediates.values()] if unit == "parts" else []
        return [*(block.program(self.model.dims, policy) for block in blocks), *others]

    # ---- what is compiled --------------------------------------------------------------------------------------------

    def name(self, unit: str) -> str:
        """Returns what a person calls the unit."""
        return f"{self.model.size}, {self.policy.compute.name}, {unit}"

    def device_of(self, unit: str) -> str:
        """Returns the device that the unit computes on."""
        return "cpu" if unit in ON_CPU else self.device

    def artifact(self, unit: str) -> Artifact:
        """Returns the unit compiled, which it is at the first call."""
        if unit not in self.artifacts:
            load = (self.held or self.cache).loader(unit, self.model.dims, self.policy)
            self.artifacts[unit] = Artifact(self.name(unit), self.programs(unit), self.device_of(unit), load)
        return self.artifacts[unit]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Returns the weights of the checkpoint, as `load_model` has them, and those of the log-mel spectrogram."""
        return {**self.rounded(self.model.tensors), **log_mel_weights(self.model.dims.n_mels)}

    def rounded(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns weights in the dtypes that the graphs take."""
        return rounded_tensors(tensors, self.policy.compute.name)

    def initialised(self, unit: str, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Executable]:
        """Returns the unit's graphs with the weights of a layer."""
        return self.artifact(unit).init(self.rounded(tensors), **self.numbers(layer))

    def numbers(self, layer: int) -> dict[str, int]:
        """Returns what stands for a layer in the names of weights; of a layer that only encoder or decoder has, the
        other is given its last."""
        dims = self.model.dims
        return {"audio_layer": min(layer, dims.n_audio_layer - 1), "text_layer": min(layer, dims.n_text_layer - 1)}

    def own(self, unit: str, layer: int = 0) -> dict[str, Executable]:
        """Returns the unit's graphs with the model's own weights, those of one layer with that layer's."""
        if (unit, layer) not in self.executables:
            self.executables[unit, layer] = self.initialised(unit, layer, self.tensors)
        return self.executables[unit, layer]

    def executable(self, block: Block, layer: int) -> Executable:
        """Returns the block with the weights of a layer."""
        return self.own(self.unit(block), layer)[block.name]

    @property
    def graphs(self) -> dict[str, Executable]:
        """Returns every graph of every unit with the model's own weights."""
        return {name: run for unit in self.units for name, run in self.own(unit).items()}

    def graphs_with(self, tensors: Mapping[str, Tensor], layer: int) -> dict[str, Executable]:
        """Returns every graph of every unit with other weights, those of one layer with that layer's."""
        return {name: run for unit in self.units for name, run in self.initialised(unit, layer, tensors).items()}
