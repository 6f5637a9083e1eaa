"""The models whose blocks are compared: the trained one, a user's checkpoint, and random weights of every size."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from whisper.model import ModelDimensions, Whisper

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compare import material

from . import activations, checkpoints
from .activations import Activations
from .blocks import pytorch_whisper
from .fixtures import NANO
from .verdicts import fingerprint

FIXTURE, CHECKPOINT = "fixture", "checkpoint"
TRAINED = (FIXTURE, CHECKPOINT)

WHOLE = material.SIZES
ONE_LAYER = {size: replace(dims, n_audio_layer=1, n_text_layer=1) for size, dims in WHOLE.items()}
SIZES: dict[str, ModelDimensions] = {
    "tiny": WHOLE["tiny"],
    "tiny.en": replace(ONE_LAYER["tiny"], n_vocab=51864),
    **{size: ONE_LAYER[size] for size in ("base", "small", "medium", "large-v3")},
    "turbo": replace(WHOLE["turbo"], n_audio_layer=1),
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
        """Returns dimensions and weights of oracle and peer, read by none of maxwhisper's code where others can."""
        try:
            model = self.source and checkpoints.read(self.source, self.dims.n_vocab)
        except checkpoints.UnreadableError:  # tests/parity/test_loading.py says so
            if self.size != CHECKPOINT:
                raise
            model = None
        return (model.dims, model.state_dict()) if model else (self.dims, self.tensors)

    @cached_property
    def misread(self) -> dict[str, str]:
        """Returns what the subject's loader has got wrong, by dimension or tensor."""
        return checkpoints.differences(self.dims, self.tensors, *self.weights)

    @cached_property
    def oracle(self) -> Whisper:
        """Returns PyTorch's model in float64."""
        return pytorch_whisper(*self.weights, torch.float64)

    def activations(self, kind: str) -> Activations:
        """Returns what the inputs of a kind are made from, recorded at the first call."""
        source = activations.source(kind)
        if source not in self.known:
            self.known[source] = activations.recorded(self.oracle, source)
        return self.known[source]


def load(size: str, checkpoint: str | None = None) -> Model:
    """Returns the model of a size; CHECKPOINT is that of a path or name."""
    if size == CHECKPOINT:
        assert checkpoint is not None
        return trained(checkpoint, CHECKPOINT)
    return trained() if size == FIXTURE else Model(size, SIZES[size], material.random_weights(SIZES[size]))


def trained(path: str | Path = NANO, size: str = FIXTURE) -> Model:
    """Returns the model of a checkpoint, by default the trained one of the fixtures."""
    checkpoint = load_checkpoint(path)
    return Model(size, checkpoint.dims, checkpoint.tensors, path)
