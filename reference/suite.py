"""A model under test: its weights, its blocks on MAX, their PyTorch twins, and the judgement of each."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from max.dtype import DType
from max.graph import DeviceRef
from max.graph import Module as GraphModule
from torch import Tensor
from whisper.model import ModelDimensions, Whisper

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compiled import ON_CPU, storage_dtype, unit_of
from maxwhisper.engine.artifacts import Artifacts, Cache
from maxwhisper.engine.folders import cache_folder
from maxwhisper.engine.program import Artifact, Executable, Program
from maxwhisper.engine.session import TORCH_DTYPE, Policy, find_device
from maxwhisper.network.blocks import BLOCKS, Block
from maxwhisper.network.log_mel import LOG_MEL, log_mel_weights

from . import activations, checkpoints, tf32
from .activations import FIXTURES, Activations, is_step
from .blocks import TWINS, pytorch_whisper
from .captures import CAPTURED, captured
from .formulas import in_float64
from .judge import UNIT_ROUNDOFF, Comparison, Explanation, Judgement, condition, dtype_name, explain, judge
from .verdicts import Memory, Verdicts, fingerprint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_DTYPE = {theirs: ours for ours, theirs in TORCH_DTYPE.items()}

FIXTURE, CHECKPOINT = "fixture", "checkpoint"
TRAINED = (FIXTURE, CHECKPOINT)
CHOSEN = "chosen"
"""The unit of the blocks of a selection."""


def dimensions(n_mels: int, n_vocab: int, n_state: int, n_audio_layer: int, n_text_layer: int) -> ModelDimensions:
    n_head = n_state // 64
    return ModelDimensions(
        n_mels, 1500, n_state, n_head, n_audio_layer, n_vocab, 448, n_state, n_head, n_text_layer
    )  # fmt: skip


SIZES: dict[str, ModelDimensions] = {
    "tiny": dimensions(80, 51865, 384, 4, 4),
    "tiny.en": dimensions(80, 51864, 384, 1, 1),
    "base": dimensions(80, 51865, 512, 1, 1),
    "small": dimensions(80, 51865, 768, 1, 1),
    "medium": dimensions(80, 51865, 1024, 1, 1),
    "large-v3": dimensions(128, 51866, 1280, 1, 1),
    "turbo": dimensions(128, 51866, 1280, 1, 4),
}
"""Models of random weights: tiny whole, of the others one layer each, for layers of one model differ only in weights;
of turbo its four decoder layers. Beside them there is "fixture", the trained model, and a user's "checkpoint"."""


@dataclass(frozen=True, eq=False)
class Model:
    """Weights, and the oracle with them.

    size: a key of SIZES, FIXTURE or CHECKPOINT. dims, tensors: as the subject's loader has them. source: the checkpoint
    that they are from; None where they are random, which no loader has had in its hands.
    """

    size: str
    dims: ModelDimensions
    tensors: Mapping[str, Tensor]
    source: str | Path | None = None
    known: dict[str, Activations] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Model({self.size})"

    @cached_property
    def fingerprint(self) -> str:
        """Returns a hash of the weights and dimensions of oracle and peer."""
        dims, tensors = self.weights
        return fingerprint(tensors, repr(dims))

    @cached_property
    def weights(self) -> tuple[ModelDimensions, Mapping[str, Tensor]]:
        """Dimensions and weights of oracle and peer, read by no code of maxwhisper's unless no other can read them."""
        try:
            model = self.source and checkpoints.read(self.source, self.dims.n_vocab)
        except checkpoints.UnreadableError:  # tests/parity/test_loading.py says so
            if self.size != CHECKPOINT:
                raise
            model = None
        return (model.dims, model.state_dict()) if model else (self.dims, self.tensors)

    @cached_property
    def misread(self) -> dict[str, str]:
        """Return what the subject's loader has got wrong, by dimension or tensor."""
        return checkpoints.differences(self.dims, self.tensors, *self.weights)

    @cached_property
    def oracle(self) -> Whisper:
        return pytorch_whisper(*self.weights, torch.float64)

    def activations(self, kind: str) -> Activations:
        """What the inputs of a kind are made from, recorded at the first call."""
        source = activations.source(kind)
        if source not in self.known:
            self.known[source] = activations.recorded(self.oracle, source)
        return self.known[source]


@dataclass(frozen=True, eq=False)
class Suite:
    """A model in one dtype on one device ("cpu" or "gpu"): oracle, peer and subject of every block.

    held: what was compiled ahead of time, if anything was.
    memory: of verdicts, on a CPU; without one they are all found anew.
    only: the blocks that will be asked for, where these are not all: they compile without the others, unless all were
        compiled earlier.
    """

    model: Model
    dtype: torch.dtype
    device: str = "cpu"
    held: Artifacts | None = None
    memory: Memory | None = None
    only: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"Suite({self.model.size}, {self.dtype}, {self.device})"

    @property
    def dims(self) -> ModelDimensions:
        return self.model.dims

    @cached_property
    def policy(self) -> Policy:
        ref = DeviceRef.from_device(find_device(self.device))
        compute = MAX_DTYPE[self.dtype]
        return Policy(ref, storage_dtype(self.model.tensors, self.device, compute), compute)

    @cached_property
    def torch_device(self) -> torch.device:
        return torch.device("cpu" if self.device == "cpu" else "cuda")

    @cached_property
    def peer(self) -> Whisper:
        return pytorch_whisper(*self.model.weights, self.dtype).to(self.torch_device)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's, and those of the log-mel spectrogram."""
        return {**self.model.tensors, **log_mel_weights(self.dims.n_mels)}

    # ---- the subject -----------------------------------------------------------------------------------------------

    @cached_property
    def artifacts(self) -> dict[str, Artifact]:
        return {}

    @cached_property
    def executables(self) -> dict[tuple[str, int], dict[str, Executable]]:
        return {}

    @cached_property
    def cache(self) -> Cache:
        """Where graphs are kept from run to run."""
        return Cache(cache_folder("graphs"))

    @property
    def units(self) -> list[str]:
        return sorted({self.whole(block) for block in BLOCKS.values()})

    def unit(self, block: Block) -> str:
        """What the block compiles together with."""
        whole = self.whole(block)
        alone = block.name in self.only and (whole == "parts" or block.name == LOG_MEL) and not self.held
        return CHOSEN if alone and not self.kept(whole) else whole

    def kept(self, unit: str) -> bool:
        """Whether a unit has been compiled already."""
        if unit not in self.found_kept:
            self.found_kept[unit] = self.cache.holds(unit, self.dims, self.policy, self.programs(unit))
        return self.found_kept[unit]

    @cached_property
    def found_kept(self) -> dict[str, bool]:
        return {}

    def whole(self, block: Block) -> str:
        """What compiles together where all blocks are asked for: all of the model, but where whole transcripts are
        made, the network alone, as `load_model` compiles it."""
        transcribes = self.dtype == torch.float32 and self.model.size in TRAINED
        unit = unit_of(block.name, self.device)
        return unit if unit in ON_CPU or unit == "network" and transcribes else "parts"

    @cached_property
    def captures(self) -> dict[str, tuple[Program, list[str]]]:
        """By captured block, its program, and the layers whose outputs stand behind its own once that is traced."""
        return {name: captured(BLOCKS[name], self.dims, self.policy) for name in CAPTURED}

    def captured_names(self, block: str) -> list[str]:
        """The layers whose outputs stand behind those of a captured block."""
        program, names = self.captures[block]
        if not names:  # its graph came compiled
            program.trace(GraphModule())
        return names

    def programs(self, unit: str) -> list[Program]:
        """The graphs of a unit; "parts" holds those with captures too."""
        policy = replace(self.policy, device=DeviceRef.CPU()) if unit in ON_CPU else self.policy
        of = self.unit if unit == CHOSEN else self.whole
        blocks = [block for block in BLOCKS.values() if of(block) == unit]
        programs = [block.program(self.dims, policy) for block in blocks]
        return [*programs, *(self.captures[name][0] for name in CAPTURED)] if unit == "parts" else programs

    def artifact(self, unit: str) -> Artifact:
        if unit not in self.artifacts:
            load = (self.held or self.cache).loader(unit, self.dims, self.policy)
            self.artifacts[unit] = Artifact(self.name(unit), self.programs(unit), self.device_of(unit), load)
        return self.artifacts[unit]

    def name(self, unit: str) -> str:
        """What a person calls the unit."""
        return f"{self.model.size}, {dtype_name(self.dtype)}, {unit}"

    def device_of(self, unit: str) -> str:
        return "cpu" if unit in ON_CPU else self.device

    def initialised(self, unit: str, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Executable]:
        """The unit's graphs with the weights of a layer; of a layer that only encoder or decoder has, the other is
        given its last."""
        return self.artifact(unit).init(
            tensors,
            audio_layer=min(layer, self.dims.n_audio_layer - 1),
            text_layer=min(layer, self.dims.n_text_layer - 1),
        )

    def executable(self, block: Block, layer: int) -> Executable:
        """The block on MAX with the weights of `layer`; its unit compiles at the first call for any of its blocks."""
        return self.right(self.unit(block), layer)[block.name]

    def right(self, unit: str, layer: int = 0) -> dict[str, Executable]:
        """The unit's graphs with the suite's own weights, those of one layer with that layer's."""
        if (unit, layer) not in self.executables:
            self.executables[unit, layer] = self.initialised(unit, layer, self.tensors)
        return self.executables[unit, layer]

    @property
    def own_graphs(self) -> dict[str, Executable]:
        """Every graph of every unit with the suite's own weights."""
        return {name: run for unit in self.units for name, run in self.right(unit).items()}

    def graphs(self, tensors: Mapping[str, Tensor], layer: int = 0) -> dict[str, Executable]:
        """Every graph of every unit with weights from `tensors`, those of one layer with that layer's."""
        return {name: run for unit in self.units for name, run in self.initialised(unit, layer, tensors).items()}

    # ---- comparisons -----------------------------------------------------------------------------------------------

    def comparisons(self, block: Block, kinds: Iterable[str], seed: int = 0) -> Iterator[Comparison]:
        """Every layer of the block on every kind of inputs that means something for it."""
        return comparisons(block, self.model.size, self.dims, self.dtype, kinds, self.device, seed)

    def inputs(self, block: Block, comparison: Comparison) -> dict[str, Tensor]:
        """The oracle's own inputs, rounded to the dtype under test."""
        types = block.inputs(self.dims, self.policy)
        kind, _, moment = comparison.inputs.partition(".")
        recorded = self.model.activations(kind)
        last = recorded.tokens.shape[1] - 1
        position = activations.N_PROMPT if moment == "first" else last
        given = recorded.of(block, list(types), comparison.layer, position)
        given = activations.changed(given, kind, self.dims.n_vocab, comparison.seed)
        return {name: x.to(TORCH_DTYPE[types[name].dtype]) for name, x in given.items()}

    @torch.no_grad()
    def subject(
        self, comparison: Comparison, given: dict[str, Tensor], executable: Callable[..., list[Tensor]] | None = None
    ) -> list[Tensor]:
        """What MAX makes of the inputs. executable: the block on MAX, if it is not to be the suite's own."""
        run = executable or self.executable(BLOCKS[comparison.block], comparison.layer)
        return [x.cpu() for x in run(*self.there(comparison, given).values())]

    @torch.no_grad()
    def references(self, comparison: Comparison, given: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What oracle and peer make of the inputs."""
        twin, layer = TWINS[comparison.block], comparison.layer
        oracle = twin(self.model.oracle, layer, **in_float64(given))
        peer = twin(self.peer, layer, **self.there(comparison, given))
        return [x.cpu() for x in oracle], [x.cpu() for x in peer]

    def there(self, comparison: Comparison, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs where peer and subject compute."""
        device = torch.device("cpu") if comparison.block == "log_mel" else self.torch_device
        return {name: x.to(device) if x.ndim else x for name, x in given.items()}

    def judge(self, comparison: Comparison, executable: Callable[..., list[Tensor]] | None = None) -> Judgement:
        """The isolated verdict: all three computations of the block are given the same inputs, the oracle's own.

        executable: as of `subject`; what is said of another than the suite's own is not kept.
        """
        if not executable and (misread := self.misread(comparison)):
            return Judgement(comparison, (), tuple(misread))
        given = self.inputs(BLOCKS[comparison.block], comparison)
        ours = self.subject(comparison, given, executable)
        if executable:
            return self.judged(comparison, given, ours)
        tensors = given | {f"output {index}": x for index, x in enumerate(ours)}
        (judgement,) = self.recalled(comparison, tensors, lambda: [self.judged(comparison, given, ours)])
        return judgement

    def misread(self, comparison: Comparison) -> list[str]:
        """What the subject's loader has got wrong of the block, in which case values say nothing of the graph."""
        block, layer = BLOCKS[comparison.block], comparison.layer
        path = block.path.format(audio_layer=layer, text_layer=layer) + "."
        without_layers = block.unit == "parts" and ".blocks." not in path
        return [
            f"the loaders of weights differ in {name}: {how}"
            for name, how in self.model.misread.items()
            if name.startswith(path) and not (without_layers and ".blocks." in name) or "." not in name
        ]

    def judged(self, comparison: Comparison, given: dict[str, Tensor], ours: list[Tensor]) -> Judgement:
        """The verdict on what MAX made of the inputs."""
        twin = TWINS[comparison.block]
        verdict = partial(
            judge,
            comparison,
            *self.references(comparison, given),
            ours,
            longest_reduction=twin.longest_reduction(self.dims),
            roundings=twin.roundings(self.dims),
            n_vocab=self.dims.n_vocab,
        )
        first = verdict()
        return first if first.passed or first.defects else verdict(condition=self.condition(comparison))

    def recalled(
        self, comparison: Comparison, tensors: Mapping[str, Tensor], judge: Callable[[], list[Judgement]]
    ) -> list[Judgement]:
        """What `judge` gives, or gave in an earlier run: see `reference.verdicts`."""
        if self.memory is None or self.device != "cpu":
            return judge()
        return Verdicts(self.memory, self.model.fingerprint).recalled(str(comparison), tensors, judge)

    @torch.no_grad()
    def condition(self, comparison: Comparison) -> float:
        """The condition of the block on the comparison's inputs, for roundings in the comparison's dtype."""
        exact = in_float64(self.inputs(BLOCKS[comparison.block], comparison))
        twin, unit = TWINS[comparison.block], UNIT_ROUNDOFF[comparison.dtype]
        return condition(lambda x: twin(self.model.oracle, comparison.layer, **x), exact, unit, comparison.seed)

    def explain(self, comparison: Comparison) -> tuple[Explanation, ...]:
        """Where and how MAX errs in the comparison."""
        given = self.inputs(BLOCKS[comparison.block], comparison)
        references, ours = self.references(comparison, given), self.subject(comparison, given)
        return explain(*references, ours, self.in_tf32(comparison, given))

    @torch.no_grad()
    def in_tf32(self, comparison: Comparison, given: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """What the oracle makes of the inputs with products in TF32, by what a failure of float32 then looks like."""
        found = {}
        for rounding in tf32.ROUNDINGS if comparison.dtype == torch.float32 else ():
            with tf32.TF32(rounding):
                outputs = TWINS[comparison.block](self.model.oracle, comparison.layer, **in_float64(given))
            found[tf32.name(rounding)] = outputs
        return found


def comparisons(
    block: Block,
    size: str,
    dims: ModelDimensions,
    dtype: torch.dtype,
    kinds: Iterable[str],
    device: str = "cpu",
    seed: int = 0,
) -> Iterator[Comparison]:
    """Every layer of a block on every one of `kinds` that means something for it.

    A decoder's step is judged at the end of the text, and on speech and random inputs at its first step too. The
    log-mel spectrogram is float32 whatever the dtype of the network, and on the CPU as openai-whisper's.
    """
    if block.name == "log_mel":
        dtype, device = torch.float32, "cpu"
    policy = Policy(DeviceRef.CPU(), DType.float32, DType.float32)
    meaningful = activations.kinds(block, list(block.inputs(dims, policy)))
    for layer in range(block.n_layer(dims)):
        for kind in kinds:
            if kind not in meaningful:
                continue
            moments = [".first", ".late"] if kind in ("speech", activations.RANDOM) else [".late"]
            for moment in moments if is_step(block) else [""]:
                yield Comparison(size, dtype, block.name, layer, kind + moment, device, seed)


def load(size: str, checkpoint: str | None = None) -> Model:
    """The model of a size; CHECKPOINT is that of a path or name."""
    if size == CHECKPOINT:
        assert checkpoint is not None
        return trained(checkpoint, CHECKPOINT)
    return trained() if size == FIXTURE else random_weights(size)


def trained(path: str | Path = FIXTURES / "nano.pt", size: str = FIXTURE) -> Model:
    """The model of a checkpoint, by default the trained one of the fixtures."""
    checkpoint = load_checkpoint(path)
    return Model(size, checkpoint.dims, checkpoint.tensors, path)


def random_weights(size: str) -> Model:
    """A model of random weights, in float16 as OpenAI stores its own."""
    torch.manual_seed(0)
    model = Whisper(replace(SIZES[size]))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=model.dims.n_text_state**-0.5)
    return Model(size, model.dims, {name: tensor.half() for name, tensor in model.state_dict().items()})
