"""One model under test: its weights, its blocks on MAX, their PyTorch twins, and the judgement of each."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from max.dtype import DType
from max.graph import DeviceRef
from torch import Tensor
from whisper.audio import N_FFT, pad_or_trim
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from maxwhisper.audio import load_audio, log_mel_weights
from maxwhisper.blocks import BLOCKS, Block
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.runtime import TORCH_DTYPE, Artifact, Executable, Policy

from .activations import Activations, record
from .blocks import TWINS, pytorch_whisper
from .judge import Judgement, judge

FIXTURES = Path(__file__).parent.parent / "fixtures"
POLICY = Policy(DeviceRef.CPU(), storage=DType.float16, compute=DType.float32)

SIZES: dict[str, ModelDimensions] = {
    "tiny": ModelDimensions(80, 1500, 384, 6, 4, 51865, 448, 384, 6, 4),
    # One layer of large-v3: its width, its 128 mels and its vocabulary are what differs, not its 32 layers.
    "large-v3": ModelDimensions(128, 1500, 1280, 20, 1, 51866, 448, 1280, 20, 1),
}
"""Models of random weights; beside them "fixture" is the trained one."""


@dataclass(frozen=True)
class Suite:
    """A model under test. `size` is a key of SIZES or "fixture"."""

    size: str
    dims: ModelDimensions
    tensors: dict[str, Tensor]

    @cached_property
    def oracle(self) -> Whisper:
        return pytorch_whisper(self.dims, self.tensors, torch.float64)

    @cached_property
    def peer(self) -> Whisper:
        return pytorch_whisper(self.dims, self.tensors, TORCH_DTYPE[POLICY.compute])

    @cached_property
    def activations(self) -> Activations:
        """Recorded over the first window of an English clip and its text."""
        clip = next(c for c in json.loads((FIXTURES / "clips.json").read_text())["clips"] if c["language"] == "en")
        audio = torch.from_numpy(pad_or_trim(load_audio(FIXTURES / clip["file"])))
        tokenizer = get_tokenizer(multilingual=True, language="en", task="transcribe")
        text = [*tokenizer.sot_sequence_including_notimestamps, *tokenizer.encode(" " + clip["text"]), tokenizer.eot]
        return record(self.oracle, audio, torch.tensor([text]))

    @cached_property
    def log_mel_tensors(self) -> dict[str, Tensor]:
        return {f"log_mel.{name}": tensor for name, tensor in log_mel_weights(self.dims.n_mels).items()}

    @cached_property
    def artifacts(self) -> dict[str, Artifact]:
        return {}

    @cached_property
    def executables(self) -> dict[tuple[str, int], dict[str, Executable]]:
        return {}

    def executable(self, block: Block, layer: int) -> Executable:
        """The block on MAX with the weights of `layer`; its unit compiles at the first call for any of its blocks."""
        unit = block.unit
        if unit not in self.artifacts:
            programs = [b.program(self.dims, POLICY) for b in BLOCKS.values() if b.unit == unit]
            self.artifacts[unit] = Artifact(f"{self.size}, {unit}", programs, "cpu")
        if (unit, layer) not in self.executables:
            # The graphs of one artifact are initialised together, those for audio and those for text; of a layer that
            # only one of the two has, the other is given its last.
            self.executables[unit, layer] = self.artifacts[unit].init(
                self.tensors | self.log_mel_tensors,
                audio_layer=min(layer, self.dims.n_audio_layer - 1),
                text_layer=min(layer, self.dims.n_text_layer - 1),
            )
        return self.executables[unit, layer][block.name]

    def moments(self, block: Block) -> dict[str, int]:
        """Where in the text a block is judged, by name: the number of tokens before."""
        if not block.path.startswith("decoder"):
            return {"speech": 0}
        last = self.activations.tokens.shape[1] - 1
        return (
            {"first step": 4, "late step": last} if "step" in block.name or "cached" in block.name else {"text": last}
        )

    @torch.no_grad()
    def judge(self, block: Block, layer: int, moment: str) -> Judgement:
        """Isolated: oracle, peer and subject are all given the oracle's own inputs, rounded to the dtype under test."""
        types = block.inputs(self.dims, POLICY)
        recorded = self.activations.of(block, list(types), layer, self.moments(block)[moment])
        given = {name: x.to(TORCH_DTYPE[types[name].dtype]) for name, x in recorded.items()}
        twin = TWINS[block.name]
        exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
        return judge(
            twin(self.oracle, layer, **exact),
            twin(self.peer, layer, **given),
            self.executable(block, layer)(*given.values()),
            block=block.name,
            size=self.size,
            layer=layer,
            dtype=TORCH_DTYPE[POLICY.compute],
            inputs=moment,
            longest_reduction=longest_reduction(block, self.dims),
        )

    def judgements(self, block: Block) -> Iterator[Judgement]:
        """Every layer, at every moment."""
        for layer in range(block.n_layer(self.dims)):
            for moment in self.moments(block):
                yield self.judge(block, layer, moment)


def longest_reduction(block: Block, dims: ModelDimensions) -> int:
    """The most terms that any one value inside the block is summed from."""
    n_state = dims.n_audio_state if block.path.startswith("encoder") else dims.n_text_state
    if "layer_norm" in block.name or "logits" in block.name or "keys_values" in block.name:
        return n_state
    if "embedding" in block.name:
        return 1
    if block.name == "log_mel":
        return N_FFT
    if "stem" in block.name:
        return 3 * n_state
    if "mlp" in block.name:
        return 4 * n_state
    if "attention" in block.name:
        return max(n_state, dims.n_audio_ctx)
    return max(4 * n_state, dims.n_audio_ctx)


def fixture(path: str | Path = FIXTURES / "nano.pt") -> Suite:
    """The suite of a checkpoint, by default the trained one."""
    checkpoint = load_checkpoint(path)
    return Suite("fixture", checkpoint.dims, checkpoint.tensors)


def random_weights(size: str) -> Suite:
    """The suite of a model of random weights, in float16 as OpenAI stores its own."""
    torch.manual_seed(0)
    model = Whisper(replace(SIZES[size]))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=model.dims.n_text_state**-0.5)
    return Suite(size, model.dims, {name: tensor.half() for name, tensor in model.state_dict().items()})


def load_suite(size: str) -> Suite:
    """The suite called `size`: "fixture" or a key of SIZES."""
    return fixture() if size == "fixture" else random_weights(size)
