"""The drop-in: openai-whisper's `Whisper` object with its network on MAX.

Transcription, beam search, sampling, language identification and word timestamps are openai-whisper's own code. What
that code calls is replaced: the encoder, the decoder, its cache, the log-mel spectrogram, and greedy decoding.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef
from whisper.audio import FRAMES_PER_SECOND
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.model import ModelDimensions
from whisper.model import Whisper as OpenAIWhisper
from whisper.tokenizer import Tokenizer
from whisper.transcribe import transcribe

from .alignment import add_word_timestamps, keep_alignment_compiled
from .audio import as_waveform, compiled_spectrogram, load_audio, log_mel_spectrogram
from .checkpoint import Checkpoint, StrPath, load_checkpoint
from .decoding.gpu import candidates_program, step_program
from .decoding.module_cache import ModuleCache
from .decoding.openai_loop import (
    TOKEN_RULES,
    KeyValueCache,
    decode,
    pick_program,
    rules_program,
)
from .decoding.speculative import draft_of, rough_keys_program, speculation_program
from .engine.artifacts import Artifacts, Cache, Identity, aim_at, writing
from .engine.built_from import built_from
from .engine.folders import cache_folder
from .engine.instructions import warn_of_slow_dtype
from .engine.precompile import Ahead, Job
from .engine.process import compiler
from .engine.program import Artifact, Executable, Program, buffer
from .engine.session import TORCH_DTYPE, Policy, find_device
from .engine.surroundings import cpu_by_default, one_torch_thread
from .errors import DeviceError, OptionError
from .frozen import Frozen, has_hooks
from .modules import AudioEncoder, TextDecoder, check_floats
from .network.blocks import BLOCKS
from .network.log_mel import N_MELS
from .options import carried, decoding, transcribing, within
from .rebind import rebind
from .scheduling import Audio, Result, transcribe_many

STORAGE = {torch.float16: DType.float16, torch.bfloat16: DType.bfloat16}


@cpu_by_default()
def load_model(
    name_or_path: StrPath,
    device: str | torch.device = "cpu",
    download_root: StrPath | None = None,
    artifacts: StrPath | None = None,
    or_compile: bool = False,
    dtype: str = "float32",
) -> "Whisper":
    """Loads a checkpoint as `maxwhisper.checkpoint.load_checkpoint` does, and compiles its network for a device.

    device: "cpu", "gpu" or "cuda".
    artifacts: a folder written by `compile_model`, from which the network comes compiled. Without it, what is compiled
        is kept in `$XDG_CACHE_HOME/maxwhisper/artifacts`, or the same under `~/.cache`, and comes from there next time.
    or_compile: compile, with a warning, what those artifacts do not fit; else they raise ArtifactError.
    dtype: of arithmetic, "float32", or "float16" or "bfloat16", which are less accurate; on some CPUs bfloat16 encodes
        faster.

    Raises CheckpointError, DeviceError if there is no such device, OptionError if it or dtype has another name.
    """
    find_device(str(device))  # before minutes go into reading and compiling
    arithmetic(dtype)
    if str(device) == "cpu":
        warn_of_slow_dtype(dtype)
    kept = Cache(cache_folder("artifacts"))
    held = kept if artifacts is None else Artifacts(artifacts, str(device), or_compile)
    return Whisper(rounded(load_checkpoint(name_or_path, download_root), dtype), str(device), held, dtype)


@cpu_by_default()
def compile_model(
    name_or_path: StrPath,
    target: str,
    out: StrPath,
    download_root: StrPath | None = None,
    dtype: str = "float32",
) -> None:
    """Compiles what transcribes with a checkpoint, and writes it into the folder `out` for `load_model(artifacts=out)`.

    target: "host", this machine's CPU, or a GPU's architecture, as in `engine.artifacts.TARGETS`. After compiling for a
    GPU, this process cannot use one. dtype: as of `load_model`.

    Raises CheckpointError, and OptionError for another target or dtype, or for a folder that cannot be written.
    """
    arithmetic(dtype)
    with writing(out, target) as writer:
        device = aim_at(target)
        checkpoint = rounded(load_checkpoint(name_or_path, download_root), dtype)
        for unit in units_on(device):
            policy = policy_of(checkpoint.tensors, "cpu" if unit in ON_CPU else device, dtype)
            programs = programs_of(unit, checkpoint.dims, policy)
            artifact = Artifact(f"{unit} of {checkpoint.name}", programs, policy.device.device_type.value)
            writer.add(Identity.of(unit, checkpoint.dims, policy, programs), artifact.stored, built_from(programs))


ON_CPU = ("log_mel", TOKEN_RULES)
"""What runs on the CPU whatever the device: the spectrogram, as openai-whisper's, and the pick of a first token."""


DECODING = "decoding"
"""The unit of what decodes tokens behind the first one, and picks them."""


def units_on(device: str) -> tuple[str, ...]:
    """What transcribes on a device, by the unit that compiles together."""
    units = ("log_mel", "network", DECODING, "alignment")
    return units if device == "cpu" else (*units, TOKEN_RULES)


DTYPES = {dtype.name: dtype for dtype in (DType.float32, DType.float16, DType.bfloat16)}
"""What can be computed in."""


def arithmetic(dtype: str) -> DType:
    """The dtype of a name; raises OptionError if it is none of DTYPES."""
    if dtype not in DTYPES:
        raise OptionError(f"dtype '{dtype}' is not known: expected {' or '.join(DTYPES)}")
    return DTYPES[dtype]


def policy_of(tensors: Mapping[str, torch.Tensor], device: str, dtype: str) -> Policy:
    """How a checkpoint is computed on a device."""
    compute = arithmetic(dtype)
    return Policy(DeviceRef.from_device(find_device(device)), storage_dtype(tensors, device, compute), compute)


def programs_of(unit: str, dims: ModelDimensions, policy: Policy) -> list[Program]:
    """The graphs of one of `units_on`."""
    if unit == TOKEN_RULES:
        return [rules_program()]
    blocks = [block.program(dims, policy) for block in BLOCKS.values() if block.unit == unit]
    return [*blocks, *picking_programs(dims, policy)] if unit == DECODING else blocks


def picking_programs(dims: ModelDimensions, policy: Policy) -> list[Program]:
    """The graphs that pick tokens; they are guessed on a CPU alone."""
    if policy.device.is_cpu():
        makers = (pick_program, speculation_program, rough_keys_program)
        return [rules_program(), *(program(dims, policy) for program in makers)]
    return [step_program(dims, policy), candidates_program(dims, policy)]


def unit_of(name: str, device: str) -> str:
    """What the graph of this name compiles together with on a device."""
    if name in BLOCKS:
        return BLOCKS[name].unit
    return TOKEN_RULES if name == TOKEN_RULES and device != "cpu" else DECODING


class Network:
    """The graphs of a checkpoint on a device, by name; those for word timestamps and for
    picking tokens compile when first asked for."""

    def __init__(self, checkpoint: Checkpoint, device: str, artifacts: Artifacts | Cache | None, dtype: str):
        self.checkpoint = checkpoint
        self.device = device
        self.artifacts = artifacts
        self.policy = policy_of(checkpoint.tensors, device, dtype)
        self.dtype = TORCH_DTYPE[self.policy.compute]
        self.ahead = Ahead("maxwhisper.engine.precompile", self._jobs())
        self.executables = self._load("network")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Network":
        """The same one, since nobody changes it: compiled graphs and weights have no copies."""
        return self

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors that MAX has read of "encoder" or "decoder", in its memory on the CPU, by their names there."""
        weights = self.executables["encoder"].weights.items()
        return {name.removeprefix(f"{part}."): tensor for name, tensor in weights if name.startswith(f"{part}.")}

    def __getitem__(self, name: str) -> Executable:
        if name not in self.executables:
            with compiler():
                if name not in self.executables:  # another thread may have been there meanwhile
                    self.executables |= self._load(unit_of(name, self.device))
        return self.executables[name]

    @cached_property
    def draft(self) -> Sequence[Buffer]:
        """What guesses the next tokens, as graphs take it."""
        return [buffer(x) for x in draft_of(self.checkpoint.tensors, self.checkpoint.dims)]

    def _load(self, unit: str) -> dict[str, Executable]:
        dims, tensors, name = self.checkpoint.dims, self.checkpoint.tensors, self.checkpoint.name
        device = "cpu" if unit in ON_CPU else self.device
        policy = policy_of(tensors, device, self.policy.compute.name)
        load = self.artifacts.loader(unit, dims, policy) if self.artifacts else None
        if unit == DECODING:
            for job in self.ahead.jobs:
                self.ahead.wait(job, f"{unit} of {name}")
        slow = self.ahead.start if unit == "network" else None
        return Artifact(f"{unit} of {name}", programs_of(unit, dims, policy), device, load, slow).init(tensors)

    def _jobs(self) -> list[str]:
        """What another process compiles while this one compiles the network, where it can be kept."""
        if self.device != "cpu" or not isinstance(self.artifacts, Cache):
            return []
        dims, policy, folder = vars(self.checkpoint.dims), self.policy, str(self.artifacts.folder)
        return [str(Job(DECODING, dims, policy.storage.name, policy.compute.name, folder))]


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is stored in the dtype of `Policy.storage`."""
    return tensor.ndim > 1 and "positional_embedding" not in name


def rounded(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The checkpoint for arithmetic in a dtype: matrices that each use would round to it are rounded once."""
    if dtype == "float32":
        return checkpoint
    half = TORCH_DTYPE[arithmetic(dtype)]
    tensors = {
        name: tensor.to(half) if is_matrix(name, tensor) else tensor for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def storage_dtype(tensors: Mapping[str, torch.Tensor], device: str, compute: DType) -> DType:
    """The dtype that all matrices are stored in where that is float16 or bfloat16, float32 otherwise: and in it on a
    GPU, for arithmetic in float32, which would widen all weights at every use."""
    if device != "cpu" and compute == DType.float32:
        return compute
    dtypes = {tensor.dtype for name, tensor in tensors.items() if is_matrix(name, tensor)}
    return STORAGE.get(dtypes.pop(), DType.float32) if len(dtypes) == 1 else DType.float32


def plain(value: Any) -> Any:
    """A result with Python's numbers in the place of NumPy's, which not everything that writes results takes."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


class Frames:
    """What openai-whisper's loop takes for its progress bar."""

    def __init__(self, progress: Callable[[float], None], total: int, **_: Any):
        self.progress, self.left = progress, total

    def __enter__(self) -> "Frames":
        return self

    def __exit__(self, *_: object) -> None:
        self.update(self.left)  # of windows without speech it is not told

    def update(self, n: int) -> None:
        """n: in frames of the spectrogram."""
        self.left -= n
        self.progress(n / FRAMES_PER_SECOND)


class Whisper(Frozen, OpenAIWhisper):
    """A checkpoint on a device, used as openai-whisper's object of this name is.

    What is not here is inherited: embed_audio, logits, the call on (mel, tokens), set_alignment_heads, is_multilingual,
    num_languages, and what PyTorch's modules have. Its parameters are the checkpoint's tensors, in the dtype that MAX
    reads them in and on the CPU. They stay as they are: what would change or move them raises OptionError or
    DeviceError, at once or when the model is next used. `copy.deepcopy` gives a model with hooks, heads and caches of
    its own, and the same weights and graphs; a pickle holds the weights, and comes with graphs from the cache.
    """

    is_multilingual: bool

    @cpu_by_default()
    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        artifacts: Artifacts | Cache | None = None,
        dtype: str = "float32",
    ):
        torch.nn.Module.__init__(self)  # not OpenAI's, which would build the network in PyTorch
        self.dims = checkpoint.dims
        self._device = torch.device("cpu" if device == "cpu" else "cuda")
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(f"device '{device}' needs a PyTorch that finds the GPU too; this one does not")
        self.network = network = Network(checkpoint, device, artifacts, dtype)
        if artifacts:
            policy = policy_of(checkpoint.tensors, "cpu", dtype)
            if self.dims.n_mels in N_MELS:  # for others there is no spectrogram
                compiled_spectrogram(self.dims.n_mels, artifacts.loader("log_mel", self.dims, policy))
        self.encoder = AudioEncoder(self.dims, network, self._device)
        self.decoder = TextDecoder(self.dims, network, self._device)
        heads = torch.zeros(self.dims.n_text_layer, self.dims.n_text_head, dtype=torch.bool)
        heads[self.dims.n_text_layer // 2 :] = checkpoint.alignment_heads is None
        for layer, head in checkpoint.alignment_heads or ():
            heads[layer, head] = True
        self.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)

    def __reduce__(self) -> Any:
        self.check_unchanged()
        if any(has_hooks(module) for module in self.modules()):
            raise TypeError("a model with hooks cannot be pickled: remove them, and register them where it is read")
        dtype = self.network.policy.compute.name
        made = self.network.checkpoint, self.network.device, self.network.artifacts, dtype
        return restored, (*made, self.alignment_heads, self.training)

    def check_unchanged(self) -> None:
        """As of encoder and decoder."""
        self.encoder.check_unchanged()
        self.decoder.check_unchanged()

    @cpu_by_default()
    @one_torch_thread()
    def decode(
        self, mel: torch.Tensor, options: DecodingOptions | None = None, **kwargs: Any
    ) -> DecodingResult | list[DecodingResult]:
        """openai-whisper's `decode`: the text of a window, mel (n_mels, 3000) or its audio features, or of a batch.

        Raises AudioError for another shape, OptionError for what is no tensor of floats and for options that cannot be
        used, and DecodingError, besides what openai-whisper raises.
        """
        check_floats("mel", mel)
        options = DecodingOptions(**kwargs) if options is None else replace(options, **kwargs) if kwargs else options
        return decode(self, mel, decoding(options, self))

    @cpu_by_default()
    def detect_language(self, mel: torch.Tensor, tokenizer: Tokenizer | None = None) -> tuple[torch.Tensor, Any]:
        """openai-whisper's `detect_language`: the token of a window's language, and the probability of each.

        Raises AudioError and OptionError as `decode`.
        """
        check_floats("mel", mel)
        return super().detect_language(mel, tokenizer)

    @cpu_by_default()
    @one_torch_thread()
    def transcribe(
        self,
        audio: StrPath | np.ndarray | torch.Tensor,
        progress: Callable[[float], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """openai-whisper's `transcribe`, with its options and its result.

        fp16 is False unless given: arithmetic is that of `load_model`, and float16 would only round the audio features.
        progress: called with the seconds of audio done since the last call; takes the place of OpenAI's bar.

        Numbers in the result are Python's. Raises AudioError and OptionError besides what openai-whisper raises.
        """
        clip_timestamps = options.pop("clip_timestamps", "0")
        options = transcribing(options, self)
        if isinstance(audio, str | os.PathLike):
            audio = load_audio(audio)
        audio = as_waveform(audio)
        if options.get("word_timestamps"):
            keep_alignment_compiled()
        clips = within(clip_timestamps, len(audio))
        names: dict[str, Any] = {
            "log_mel_spectrogram": log_mel_spectrogram,
            "add_word_timestamps": add_word_timestamps,
        }
        if progress:
            names["tqdm"] = SimpleNamespace(tqdm=partial(Frames, progress))
        prompt = options.get("initial_prompt")
        if options.get("carry_initial_prompt") and prompt and (options_of_window := carried(prompt, self)):
            names["DecodingOptions"] = options_of_window
        result = rebind(transcribe, **names)(self, audio, clip_timestamps=clips, **{"fp16": False, **options})
        return plain(result)

    def transcribe_many(
        self, audio: Sequence[Audio], batch_size: int = 1, **options: Any
    ) -> Iterator[tuple[int, Result]]:
        """The number of each recording, and what `transcribe` returns or raises for it, in the order in which they are
        done: the same as one at a time.

        batch_size: how many recordings to decode together. Raises OptionError if that is not above 0.
        """
        return transcribe_many(self, audio, batch_size, **options)

    def install_kv_cache_hooks(self, cache: Mapping[torch.nn.Module, torch.Tensor] | None = None) -> Any:
        """A cache for `decoder`, a copy of `cache` if given, and the hooks to remove afterwards: none are needed,
        unless modules inside the decoder have hooks already."""
        if self.decoder.hooked():
            return super().install_kv_cache_hooks(cache)
        if isinstance(cache, KeyValueCache):
            return ModuleCache(self.decoder, cache.copy()), []
        own = ModuleCache(self.decoder)
        for module, kv in (cache or {}).items():
            own[module] = kv
        return own, []


def restored(
    checkpoint: Checkpoint,
    device: str,
    artifacts: Artifacts | Cache | None,
    dtype: str,
    alignment_heads: torch.Tensor,
    training: bool,
) -> Whisper:
    """A model that was pickled."""
    model = Whisper(checkpoint, device, artifacts, dtype)
    model.register_buffer("alignment_heads", alignment_heads, persistent=False)
    return model.train(training)
