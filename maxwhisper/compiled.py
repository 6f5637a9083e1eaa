"""What a checkpoint's network compiles to: which graphs, in which units, on which device, in which precision."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from max.dtype import DType
from max.graph import DeviceRef
from whisper.model import ModelDimensions

from . import names
from .checkpoint import Checkpoint
from .decoding.cpu import select_tokens_program
from .decoding.gpu import search_program, step_program
from .decoding.rules import TOKEN_RULES, rules_program
from .decoding.speculative import Draft, draft_of, quantize_keys_program, speculate_program
from .engine.artifacts import Artifacts, Cache
from .engine.precompile import Job, Precompiler
from .engine.process import compiler
from .engine.program import Artifact, Executable, Program, buffer
from .engine.session import TORCH_DTYPE, Policy, find_device
from .errors import OptionError
from .network.blocks import BLOCKS
from .network.log_mel import LOG_MEL, N_MELS, log_mel_weights

STORAGE = {torch.float16: DType.float16, torch.bfloat16: DType.bfloat16}

ON_CPU = (LOG_MEL, TOKEN_RULES)
"""What runs on the CPU beside a GPU: the spectrogram, as openai-whisper's, and the choice of a first token."""

DECODING = "decoding"
"""The unit of what decodes tokens behind the first one, and selects them."""


def units_on(device: str) -> tuple[str, ...]:
    """Returns what transcribes on a device, by the unit that compiles together: on a CPU network and spectrogram."""
    units = ("network", DECODING, "alignment")
    return units if device == "cpu" else (*ON_CPU, *units)


DTYPES = {name: DType[name] for name in names.DTYPES}
"""What can be computed in."""


def arithmetic(dtype: str) -> DType:
    """Returns the dtype of a name; raises OptionError if it is none of DTYPES."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise OptionError(f"dtype '{dtype}' is not known: expected {' or '.join(DTYPES)}")
    return DTYPES[dtype]


def policy_of(tensors: Mapping[str, torch.Tensor], device: str, dtype: str) -> Policy:
    """Decides how a checkpoint is computed on a device."""
    compute = arithmetic(dtype)
    return Policy(DeviceRef.from_device(find_device(device)), storage_dtype(tensors, device, compute), compute)


def programs_of(unit: str, dims: ModelDimensions, policy: Policy) -> list[Program]:
    """Returns the graphs of one of `units_on`, with a spectrogram if openai-whisper has one for the number of bands."""
    if unit == TOKEN_RULES:
        return [rules_program()]
    if unit == LOG_MEL:
        return [BLOCKS[LOG_MEL].program(dims, policy)]
    blocks = [block for block in BLOCKS.values() if block.unit == unit]
    if not policy.device.is_cpu() or dims.n_mels not in N_MELS:
        blocks = [block for block in blocks if block.name != LOG_MEL]
    programs = [block.program(dims, policy) for block in blocks]
    return [*programs, *stepper_programs(dims, policy)] if unit == DECODING else programs


def stepper_programs(dims: ModelDimensions, policy: Policy) -> list[Program]:
    """Returns the graphs of a device's stepper; tokens are proposed on a CPU alone."""
    if policy.device.is_cpu():
        makers = (select_tokens_program, speculate_program, quantize_keys_program)
        return [rules_program(), *(program(dims, policy) for program in makers)]
    return [step_program(dims, policy), search_program(dims, policy)]


def unit_of(name: str, device: str) -> str:
    """Returns what the graph of this name compiles together with on a device."""
    if name in ON_CPU and device != "cpu":
        return name
    return BLOCKS[name].unit if name in BLOCKS else DECODING


class Network:
    """The graphs of a checkpoint on a device, by name; those for word timestamps and for
    selecting tokens compile when first asked for."""

    def __init__(self, checkpoint: Checkpoint, device: str, artifacts: Artifacts | Cache | None, dtype: str):
        self.checkpoint = checkpoint
        self.device = device
        self.artifacts = artifacts
        self.policy = policy_of(checkpoint.tensors, device, dtype)
        self.dtype = TORCH_DTYPE[self.policy.compute]
        self.precompiler = Precompiler("maxwhisper.precompile", self._jobs())
        self.executables = self._load("network")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Network":
        """Returns the same network, since nobody changes it: compiled graphs and weights have no copies."""
        return self

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        """Returns the tensors that MAX has read of "encoder" or "decoder", in its memory on the CPU, by name."""
        weights = self.executables["encoder"].weights.items()
        return {name.removeprefix(f"{part}."): tensor for name, tensor in weights if name.startswith(f"{part}.")}

    def __getitem__(self, name: str) -> Executable:
        if name not in self.executables:
            with compiler():
                if name not in self.executables:  # another thread may have been there meanwhile
                    self.executables |= self._load(unit_of(name, self.device))
        return self.executables[name]

    @cached_property
    def draft(self) -> Draft:
        """Returns what proposes the next tokens, as graphs take it."""
        return Draft(*map(buffer, draft_of(self.checkpoint.tensors, self.checkpoint.dims)))

    def _load(self, unit: str) -> dict[str, Executable]:
        dims, name, device, policy = self.checkpoint.dims, self.checkpoint.name, self.device, self.policy
        if unit in ON_CPU:
            device, policy = "cpu", replace(policy, device=DeviceRef.CPU())
        load = self.artifacts.loader(unit, dims, policy) if self.artifacts else None
        if unit == DECODING:
            for job in self.precompiler.jobs:
                self.precompiler.wait(job, f"{unit} of {name}")
        slow = self.precompiler.start if unit == "network" else None
        programs = programs_of(unit, dims, policy)
        mel = log_mel_weights(dims.n_mels) if LOG_MEL in (program.name for program in programs) else {}
        artifact, tensors = Artifact(f"{unit} of {name}", programs, device, load, slow), self.checkpoint.tensors
        return artifact.init({**tensors, **mel, **joined_weights(tensors, artifact.stored.weights)})

    def _jobs(self) -> list[str]:
        """Returns what another process compiles while this one compiles the network, where it can be kept."""
        if self.device != "cpu" or not isinstance(self.artifacts, Cache):
            return []
        dims, policy, folder = vars(self.checkpoint.dims), self.policy, str(self.artifacts.folder)
        return [str(Job(DECODING, dims, policy.storage.name, policy.compute.name, folder))]


QKV = ("query", "key", "value")


def joined_weights(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors of `MultiHeadAttention.qkv` that are among the names, made of those of a checkpoint."""
    found = {}
    for name in names:
        path, is_joined, kind = name.rpartition(".qkv.")
        if is_joined:
            query, key, value = (tensors.get(f"{path}.{each}.{kind}") for each in QKV)
            assert query is not None and value is not None, "a checkpoint has them all"
            found[name] = torch.cat([query, torch.zeros_like(query) if key is None else key, value])
    return found


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is stored in the dtype of `Policy.storage`; a spectrogram's are not."""
    return tensor.ndim > 1 and "positional_embedding" not in name and not name.startswith(f"{LOG_MEL}.")


def rounded(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Rounds the checkpoint for arithmetic in a dtype."""
    return replace(checkpoint, tensors=rounded_tensors(checkpoint.tensors, dtype))


def rounded_tensors(tensors: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Returns weights for arithmetic in a dtype: matrices that each use would round to it are rounded once."""
    if dtype == "float32":
        return dict(tensors)
    half = TORCH_DTYPE[arithmetic(dtype)]
    return {name: tensor.to(half) if is_matrix(name, tensor) else tensor for name, tensor in tensors.items()}


def storage_dtype(tensors: Mapping[str, torch.Tensor], device: str, compute: DType) -> DType:
    """Returns the dtype that matrices are stored in: that of arithmetic, where they are rounded to it, and on a GPU,
    which would widen them at every use; else float16 or bfloat16, if that is the dtype of all, or float32."""
    if device != "cpu" or compute != DType.float32:
        return compute
    dtypes = {tensor.dtype for name, tensor in tensors.items() if is_matrix(name, tensor)}
    return STORAGE.get(dtypes.pop(), DType.float32) if len(dtypes) == 1 else DType.float32
