"""The drop-in: openai-whisper's `Whisper` object with its network on MAX.

Transcription, beam search, sampling, language identification and word timestamps are openai-whisper's own code. What
that code calls is replaced: the encoder, the decoder, its cache, the log-mel spectrogram, and greedy decoding.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from max.driver import CPU, Buffer
from max.dtype import DType
from max.graph import DeviceRef
from whisper import timing
from whisper.audio import FRAMES_PER_SECOND
from whisper.model import ModelDimensions
from whisper.model import Whisper as OpenAIWhisper
from whisper.transcribe import transcribe

from .artifacts import Artifacts, Cache, Identity, aim_at, writing
from .audio import HOP_LENGTH, N_MELS, compiled_spectrogram, load_audio, log_mel_spectrogram
from .blocks import BLOCKS
from .cache import cache_folder
from .checkpoint import Checkpoint, StrPath, load_checkpoint
from .decoding import (
    PICK,
    TOKEN_RULES,
    Candidates,
    KeyValueCache,
    Picked,
    Rules,
    Texts,
    compiled_rules,
    decode,
    pick_program,
    rebind,
    rules_program,
)
from .errors import AudioError, DeviceError, OptionError
from .on_device import CANDIDATES, STEPS_AT_ONCE, candidates_program, step_program
from .process import compiler
from .runtime import TORCH_DTYPE, Artifact, Executable, Policy, Program, buffer, find_device, one_torch_thread
from .speculation import (
    N_GUESS,
    ROUGH_KEYS,
    SPECULATE,
    WORTH_GUESSING,
    draft_of,
    rough_keys_program,
    rough_room,
    speculation_program,
)
from .together import Audio, Result, Seats, Together, transcribe_many

STORAGE = {torch.float16: DType.float16, torch.bfloat16: DType.bfloat16}


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
    kept = Cache(cache_folder("artifacts"))
    held = kept if artifacts is None else Artifacts(artifacts, str(device), or_compile)
    return Whisper(rounded(load_checkpoint(name_or_path, download_root), dtype), str(device), held, dtype)


def compile_model(
    name_or_path: StrPath,
    target: str,
    out: StrPath,
    download_root: StrPath | None = None,
    dtype: str = "float32",
) -> None:
    """Compiles what transcribes with a checkpoint, and writes it into the folder `out` for `load_model(artifacts=out)`.

    target: "host", this machine's CPU, or a GPU's architecture, as in `maxwhisper.artifacts.TARGETS`. After compiling
    for a GPU, this process cannot use one. dtype: as of `load_model`.

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
            writer.add(Identity.of(unit, checkpoint.dims, policy, programs), artifact.stored)


ON_CPU = ("log_mel", TOKEN_RULES)
"""What runs on the CPU whatever the device: the spectrogram, as openai-whisper's, and the pick of a first token."""


def units_on(device: str) -> tuple[str, ...]:
    """What transcribes on a device, by the unit that compiles together: tokens are guessed on a CPU alone."""
    units = (*ON_CPU, "network", "alignment", PICK)
    return (*units, SPECULATE) if device == "cpu" else units


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
    if unit == PICK:
        return picking_programs(dims, policy)
    if unit == SPECULATE:
        return [speculation_program(dims, policy), rough_keys_program(dims, policy)]
    return [block.program(dims, policy) for block in BLOCKS.values() if block.unit == unit]


def picking_programs(dims: ModelDimensions, policy: Policy) -> list[Program]:
    """The graphs that pick tokens, and do not guess them."""
    if policy.device.is_cpu():
        return [pick_program(dims, policy)]
    return [step_program(dims, policy), candidates_program(dims, policy)]


def unit_of(name: str) -> str:
    """What the graph of this name compiles together with."""
    if name in BLOCKS:
        return BLOCKS[name].unit
    return {ROUGH_KEYS: SPECULATE, CANDIDATES: PICK}.get(name, name)


class Network:
    """The graphs of a checkpoint on a device, by name; those for word timestamps and for
    picking tokens compile when first asked for."""

    def __init__(self, checkpoint: Checkpoint, device: str, artifacts: Artifacts | Cache | None, dtype: str):
        self.checkpoint = checkpoint
        self.device = device
        self.artifacts = artifacts
        self.policy = policy_of(checkpoint.tensors, device, dtype)
        self.dtype = TORCH_DTYPE[self.policy.compute]
        self.executables = self._load("network")

    def __getitem__(self, name: str) -> Executable:
        if name not in self.executables:
            with compiler():
                if name not in self.executables:  # another thread may have been there meanwhile
                    self.executables |= self._load(unit_of(name))
        return self.executables[name]

    def _load(self, unit: str) -> dict[str, Executable]:
        dims, tensors, name = self.checkpoint.dims, self.checkpoint.tensors, self.checkpoint.name
        load = self.artifacts.loader(unit, dims, self.policy) if self.artifacts else None
        programs = programs_of(unit, dims, self.policy)
        if unit == SPECULATE:
            tensors = {**tensors, **draft_of(tensors, dims)}
        return Artifact(f"{unit} of {name}", programs, self.device, load).init(tensors)


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


class AudioEncoder(torch.nn.Module):
    """Log-mel to audio features."""

    def __init__(self, dims: ModelDimensions, network: Network, device: torch.device):
        super().__init__()
        self.dims, self.network, self.device = dims, network, device

    @one_torch_thread()
    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """([batch,] n_mels, 2 * n_audio_ctx) to ([batch,] n_audio_ctx, state), in the dtype of mel.

        Raises AudioError for another shape, or for values that are not finite.
        """
        expected = (self.dims.n_mels, 2 * self.dims.n_audio_ctx)
        if mel.ndim not in (2, 3) or mel.shape[-2:] != expected:
            raise AudioError(f"mel is {tuple(mel.shape)}, expected {expected} or a batch of these")
        if not all(extreme.isfinite() for extreme in mel.aminmax()):
            raise AudioError("mel holds values that are not finite")
        if mel.ndim == 2:
            return self(mel[None])[0]
        return self.network["encoder"](mel.to(self.device, self.network.dtype))[0].to(mel.dtype)


class CrossAttention(torch.nn.Module):
    """A place for forward hooks, which receive the scores that the graph computed."""

    def forward(self, scores: torch.Tensor) -> tuple[None, torch.Tensor]:
        """scores before softmax, (batch, head, token, n_audio_ctx)."""
        return None, scores


class TextBlock(torch.nn.Module):
    """A layer of the decoder, as far as openai-whisper's code looks into it."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = CrossAttention()


class TextDecoder(torch.nn.Module):
    """Tokens and audio features to logits."""

    def __init__(self, dims: ModelDimensions, network: Network, device: torch.device):
        super().__init__()
        self.dims, self.network, self.device = dims, network, device
        self.blocks = torch.nn.ModuleList([TextBlock() for _ in range(dims.n_text_layer)])
        self.on_device = device.type != "cpu"
        self.seats = Seats(1, self.on_device)
        self.together: Together | None = None  # where the texts of several recordings advance together

    @one_torch_thread()
    def forward(
        self,
        x: torch.Tensor,
        xa: torch.Tensor,
        kv_cache: KeyValueCache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of tokens x (batch, token) given audio features xa (audio, n_audio_ctx, state), as float32
        (batch, token, n_vocab).

        positions: (position,) int64, with an empty cache; the logits are then of the tokens there alone.

        xa may have fewer rows than x: consecutive texts then share one. With a cache, the first call takes a text from
        its start and fills the cache; each later one takes one more token and needs xa no longer.

        While a block's `cross_attn` has forward hooks and no cache is given, all hooks receive that layer's scores.

        Raises OptionError for tokens or features that the model has no place for.
        """
        cache = KeyValueCache() if kv_cache is None else kv_cache
        self._check(x, xa, cache)
        if positions is not None and (cache or not 0 <= positions.min() <= positions.max() < x.shape[1]):
            raise OptionError(
                f"positions {positions.tolist()} are not all in the {x.shape[1]} tokens of a text's start"
            )
        x = x.to(self.device, torch.int64)
        if cache:
            cache.settle()
            logits, *new = self.network["decoder.step"](x, torch.tensor(cache.n_token), *cache.inputs())
            cache.append(new, self.dims.n_text_ctx)
            return logits
        cross = self.network["decoder.keys_values"](xa.to(self.device, self.network.dtype))
        if kv_cache is None and any(module._forward_hooks for module in self._cross_attentions()):
            return self._aligned(x, cross)
        if positions is not None:
            logits, *new = self.network["decoder.start"](x, positions.to(self.device), *cross)
        else:
            logits, *new = self.network["decoder.prefill"](x, *cross)
        cache.cross = cross
        cache.append(new, self.dims.n_text_ctx)
        return logits

    def pick(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: torch.Tensor) -> Picked:
        """What follows texts, all but the last tokens of which are in the cache: of each at most as many tokens as
        `n_token` (batch,) says, until one ends, has as many, or, where others decode together with these, one of theirs
        does; or until so few are left that steps of another kind take less time, or, off the CPU, STEPS_AT_ONCE.

        A text that gets none stays as it is, but its cache is lost. Raises OptionError where the cache has no room.
        """
        self._check_room(int((texts.lengths + n_token).max()) - 1)
        if self.on_device:
            cache.settle()
        if self.together is not None:
            return self.together.pick(texts, cache, rules, n_token)

        def draft() -> list[Buffer]:
            assert cache.memory is not None
            if cache.rough_cross is None:
                cache.rough_cross = rough_room(cache.cross, len(texts.tokens))
                self.make_rough(cache.cross, cache.rough_cross, 0)
            return [buffer(cache.memory), buffer(cache.rough_cross)]

        sources, kv = self._seated(cache).inputs(1) if self.on_device else (cache.sources, cache.inputs())
        picked = self.steps(texts, rules, n_token, sources, kv, draft)
        cache.n_token = int(picked.texts.lengths.max()) - 1
        return picked

    def steps(
        self,
        texts: Texts,
        rules: Rules,
        n_token: torch.Tensor,
        sources: torch.Tensor,
        kv: Sequence[Buffer],
        draft: Callable[[], Sequence[Buffer]],
    ) -> Picked:
        """As `pick`; sources and kv: as of a `KeyValueCache`. draft: gives what guesses take besides, where tokens are
        guessed first: if only the likeliest are wanted, of texts with room for guesses and audio of their own."""
        if self.on_device:
            return self._steps_on_device(texts, rules, n_token, kv)
        eot, idle = int(rules.limits[1]), n_token == 0
        tokens = torch.nn.functional.pad(texts.tokens, (0, int(n_token.max()) + N_GUESS), value=eot)
        # An idle text takes part as the end of text alone, to which nothing is added.
        now = Texts(tokens.masked_fill(idle[:, None], eot), texts.lengths.masked_fill(idle, 1), texts.totals)
        ends, most = now.lengths + n_token, self.dims.n_text_ctx + 1 - N_GUESS
        ends_of_guesses = torch.where(idle, ends + WORTH_GUESSING, ends.clamp(max=most))
        others = *rules, sources, *kv, *kv[: 2 * self.dims.n_text_layer]

        def worth_guessing() -> bool:
            return int((ends_of_guesses - now.lengths).min()) >= WORTH_GUESSING

        guess = len(rules.places) == 1 and kv[-1].shape[0] == len(tokens) and worth_guessing()
        if guess:
            given = *now[:2], ends_of_guesses, now.totals, *others, *draft()
            *found, totals, lengths = self.network[SPECULATE](*given)
            now = Texts(now.tokens, lengths, totals)
        stopped = (now.last()[~idle] == eot).any() or not now.totals.isfinite().all()
        if not guess or worth_guessing() and not stopped:
            *found, totals, lengths = self.network[PICK](now.last(), *now[:2], ends, now.totals, *others)
            now = Texts(now.tokens, lengths, totals)
        lengths = torch.where(idle, texts.lengths, now.lengths)
        tokens = torch.where(idle[:, None], tokens, now.tokens)[:, : int(lengths.max())]
        tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = eot  # where guesses were
        return Picked(Texts(tokens, lengths, now.totals), Candidates(*found))

    def _seated(self, cache: KeyValueCache) -> Seats:
        """Where a cache is in memory as `_steps_on_device` takes it: in that of the one before, if it fits."""
        room, wanted = ([kv.shape for kv in (*each.own, *each.cross)] for each in (self.seats, cache))
        if room not in ([], wanted):
            self.seats = Seats(1, on_device=True)
        self.seats.place([cache])
        return self.seats

    def _steps_on_device(self, texts: Texts, rules: Rules, n_token: torch.Tensor, kv: Sequence[Buffer]) -> Picked:
        """As `steps`: at most STEPS_AT_ONCE with the likeliest token alone, or one with several."""
        device, n_best = self.network.policy.device.to_device(), len(rules.places)

        def there(*tensors: torch.Tensor) -> list[Buffer]:
            return [buffer(x).to(device) for x in tensors]

        def back(buffers: Sequence[Buffer]) -> list[torch.Tensor]:
            return [torch.from_dlpack(x.to(CPU())) for x in buffers]

        eot, n_free = int(rules.limits[1]), self.dims.n_text_ctx + 1 - texts.tokens.shape[1]
        tokens = torch.nn.functional.pad(texts.tokens, (0, n_free), value=eot)
        given = [*there(rules.suppressed, rules.begins, rules.limits), *kv, *kv[: len(kv) // 2]]
        if n_best > 1:
            found = back(self.network[CANDIDATES].execute(*there(tokens, texts.lengths), *given))
            best, logprobs = (each[:, :n_best] for each in found)
            tokens = tokens.scatter(1, texts.lengths[:, None], best[:, :1])
            lengths, totals = texts.lengths + 1, texts.totals + logprobs[:, 0]
        else:
            state = there(tokens, texts.lengths, texts.totals, torch.zeros(len(tokens)))
            (ends,) = there(texts.lengths + n_token)
            for _ in range(min(int(n_token.max()), STEPS_AT_ONCE)):
                state = self.network[PICK].execute(*state, ends, *given)
            tokens, lengths, totals, latest = back(state)
            best, logprobs = tokens.gather(1, lengths[:, None] - 1), latest[:, None]
        return Picked(Texts(tokens[:, : int(lengths.max())], lengths, totals), Candidates(best, logprobs))

    def make_rough(self, cross: Sequence[torch.Tensor], into: torch.Tensor, row: int) -> None:
        """Puts keys and values of audio into some of `rough_room`, from a row on."""
        self.network[ROUGH_KEYS](into, torch.tensor([row]), *cross)

    def _aligned(self, x: torch.Tensor, cross: list[torch.Tensor]) -> torch.Tensor:
        logits, *scores = self.network["decoder.alignment"](x, *cross)
        for cross_attn, qk in zip(self._cross_attentions(), scores, strict=True):
            cross_attn(qk.float())
        return logits

    def _cross_attentions(self) -> list[CrossAttention]:
        return [module for module in self.modules() if isinstance(module, CrossAttention)]

    def _check_room(self, n_token: int) -> None:
        if n_token > self.dims.n_text_ctx:
            raise OptionError(f"the text has {n_token} tokens, the model has places for {self.dims.n_text_ctx}")

    def _check(self, x: torch.Tensor, xa: torch.Tensor, cache: KeyValueCache) -> None:
        dims = self.dims
        if x.ndim != 2 or 0 in x.shape:
            raise OptionError(f"tokens are {tuple(x.shape)}, expected (batch, token)")
        if not 0 <= x.min() <= x.max() < dims.n_vocab:
            raise OptionError(f"tokens reach from {x.min()} to {x.max()}, the vocabulary from 0 to {dims.n_vocab - 1}")
        self._check_room(cache.n_token + x.shape[1])
        if cache:
            if x.shape != (len(cache.own[0]), 1):
                raise OptionError(f"tokens are {tuple(x.shape)}, expected {(len(cache.own[0]), 1)} behind this cache")
            return
        if xa.ndim != 3 or xa.shape[1:] != (dims.n_audio_ctx, dims.n_audio_state):
            expected = f"(audio, {dims.n_audio_ctx}, {dims.n_audio_state})"
            raise OptionError(f"audio features are {tuple(xa.shape)}, expected {expected}")
        if not len(xa) or len(x) % len(xa):
            raise OptionError(f"{len(x)} texts cannot share {len(xa)} rows of audio features evenly")


def within(timestamps: str | Sequence[float], n_samples: int) -> list[float]:
    """The `clip_timestamps` of `transcribe`, moved to the end of the audio where they lie behind it: openai-whisper's
    loop would never end there. Raises OptionError for what is no time in seconds."""
    parts = timestamps.split(",") if isinstance(timestamps, str) and timestamps else timestamps
    try:
        clips = [float(each) for each in parts]
    except ValueError:
        clips = [math.nan]
    if not all(each >= 0 for each in clips):
        raise OptionError(f"clip_timestamps must be seconds from 0 on, with commas between them, not '{timestamps}'")
    end = n_samples // HOP_LENGTH / FRAMES_PER_SECOND
    return [min(each, end) for each in clips]


@cache
def keep_alignment_compiled() -> None:
    """Has numba keep the search for word timestamps, which openai-whisper has it compile in every process, in seconds;
    in its own folder of caches, if there is one that can be written to."""
    for function in (timing.dtw_cpu, timing.backtrace):
        with suppress(RuntimeError):
            function.enable_caching()


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


class Whisper(OpenAIWhisper):
    """A checkpoint on a device, used as openai-whisper's object of this name is.

    What is not here is inherited: embed_audio, logits, the call on (mel, tokens), detect_language, set_alignment_heads,
    is_multilingual, num_languages.
    """

    decode = one_torch_thread()(decode)

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
        network = Network(checkpoint, device, artifacts, dtype)
        if artifacts:
            policy = policy_of(checkpoint.tensors, "cpu", dtype)
            if self.dims.n_mels in N_MELS:  # for others there is no spectrogram
                compiled_spectrogram(self.dims.n_mels, artifacts.loader("log_mel", self.dims, policy))
            compiled_rules(artifacts.loader(TOKEN_RULES, self.dims, policy))
        self.encoder = AudioEncoder(self.dims, network, self._device)
        self.decoder = TextDecoder(self.dims, network, self._device)
        heads = torch.zeros(self.dims.n_text_layer, self.dims.n_text_head, dtype=torch.bool)
        heads[self.dims.n_text_layer // 2 :] = checkpoint.alignment_heads is None
        for layer, head in checkpoint.alignment_heads or ():
            heads[layer, head] = True
        self.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where its inputs and outputs are."""
        return self._device

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

        Raises AudioError and OptionError besides what openai-whisper raises.
        """
        if isinstance(audio, str | os.PathLike):
            audio = load_audio(audio)
        if options.get("word_timestamps"):
            keep_alignment_compiled()
        clips = within(options.pop("clip_timestamps", "0"), len(audio))
        names: dict[str, Any] = {"log_mel_spectrogram": log_mel_spectrogram}
        if progress:
            names["tqdm"] = SimpleNamespace(tqdm=partial(Frames, progress))
        return rebind(transcribe, **names)(self, audio, clip_timestamps=clips, **{"fp16": False, **options})

    def transcribe_many(
        self, audio: Sequence[Audio], batch_size: int = 1, **options: Any
    ) -> Iterator[tuple[int, Result]]:
        """The number of each recording, and what `transcribe` returns or raises for it, in the order in which they are
        done: the same as one at a time.

        batch_size: how many recordings to decode together. Raises OptionError if that is not above 0.
        """
        return transcribe_many(self, audio, batch_size, **options)

    def install_kv_cache_hooks(self, cache: KeyValueCache | None = None) -> tuple[KeyValueCache, list[Any]]:
        """A cache for `decoder`, a copy of `cache` if given, and the hooks to remove afterwards: none are needed."""
        return KeyValueCache() if cache is None else cache.copy(), []
