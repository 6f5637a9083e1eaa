"""The drop-in: openai-whisper's `Whisper` object with its network on MAX.

Transcription, beam search, sampling, language identification and word timestamps are openai-whisper's own code. What
that code calls is replaced: the encoder, the decoder, its cache, the log-mel spectrogram, and greedy decoding.
"""

import copy
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from whisper.audio import FRAMES_PER_SECOND
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.model import ModelDimensions
from whisper.model import Whisper as OpenAIWhisper
from whisper.tokenizer import Tokenizer
from whisper.transcribe import transcribe

from .alignment import add_word_timestamps, keep_alignment_compiled
from .audio import as_waveform, load_audio, spectrogram
from .checkpoint import Checkpoint, StrPath, load_checkpoint
from .compiled import ON_CPU, Network, arithmetic, policy_of, programs_of, rounded, units_on
from .decoding.cache import KeyValueCache
from .decoding.gpu import GPUStepper
from .decoding.module_cache import ModuleCache
from .decoding.openai_loop import decode
from .decoding.speculative import SpeculativeStepper
from .decoding.stepper import Stepper
from .engine.artifacts import PORTABLE, Artifacts, Cache, Identity, aim_at, writing
from .engine.built_from import built_from
from .engine.folders import cache_folder
from .engine.instructions import warn_of_slow_dtype
from .engine.program import Artifact
from .engine.session import device_named, find_device
from .engine.surroundings import cpu_by_default, one_torch_thread
from .errors import DeviceError
from .frozen import Frozen
from .hooks import has_hooks
from .modules import AudioEncoder, TextDecoder, check_floats
from .network.log_mel import N_MELS
from .options import check_calls, decoding, no_texts, options_of_windows, refused, transcribing, within
from .rebind import Segments, enumerate_and_tell, rebind
from .scheduling import Audio, Decode, Result, transcribe_many
from .speech import transcribe_speech


@cpu_by_default()
def load_model(
    name: StrPath,
    device: str | torch.device | None = None,
    download_root: StrPath | None = None,
    artifacts: StrPath | None = None,
    or_compile: bool = False,
    dtype: str = "float32",
) -> "Whisper":
    """Loads a checkpoint as `maxwhisper.checkpoint.load_checkpoint` does, and compiles its network for a device.

    device: "cpu", which it is unless given, "gpu", "cuda" or "cuda:0".
    artifacts: a folder written by `compile_model`, from which the network comes compiled. Without it, what is compiled
        is kept in `$XDG_CACHE_HOME/maxwhisper/artifacts`, or the same under `~/.cache`, and comes from there next time.
    or_compile: compile, with a warning, what those artifacts do not fit; else they raise ArtifactError.
    dtype: of arithmetic, "float32", or "float16" or "bfloat16", which are less accurate; on some CPUs bfloat16 encodes
        faster.

    Raises CheckpointError, DeviceError if there is no such device, OptionError if it or dtype has another name.
    """
    device = "cpu" if device is None else str(device)
    find_device(device)  # before minutes go into reading and compiling
    device = device_named(device)
    arithmetic(dtype)
    no_texts({"or_compile": or_compile}, ["or_compile"])
    if device == "cpu":
        warn_of_slow_dtype(dtype)
    kept = Cache(cache_folder("artifacts"), PORTABLE)
    held = kept if artifacts is None else Artifacts(artifacts, device, or_compile)
    return Whisper(rounded(load_checkpoint(name, download_root), dtype), device, held, dtype)


@cpu_by_default()
def compile_model(
    name_or_path: StrPath, target: str, out: StrPath, download_root: StrPath | None = None, dtype: str = "float32"
) -> None:
    """Compiles what transcribes with a checkpoint, and writes it into the folder `out` for `load_model(artifacts=out)`.

    target: "host", this machine's CPU, or a GPU's architecture, as in `names.TARGETS`. After compiling for a
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


def as_python(value: Any) -> Any:
    """Returns a result with Python's numbers in the place of NumPy's, which not all that writes results takes."""
    if isinstance(value, dict):
        return {name: as_python(each) for name, each in value.items()}
    if isinstance(value, list):
        return [as_python(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


class Frames:
    """What openai-whisper's loop takes for its progress bar."""

    def __init__(self, progress: Callable[[float], None], total: int, **_: Any):
        self.progress, self.left = progress, total

    def __enter__(self) -> "Frames":
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is None:
            self.update(self.left)  # of windows without speech it is not told

    def update(self, n: int) -> None:
        """Takes n frames of the spectrogram as done."""
        self.left -= n
        self.progress(n / FRAMES_PER_SECOND)


class Whisper(Frozen, OpenAIWhisper):
    """A checkpoint on a device, used as openai-whisper's object of this name is.

    What is not here is inherited: embed_audio, logits, the call on (mel, tokens), is_multilingual, num_languages, and
    what PyTorch's modules have. Its parameters are the checkpoint's tensors, in the dtype that MAX reads them in and on
    the CPU. They stay as they are: what would change or move them raises OptionError or DeviceError, at once or when
    the model is next used. `copy.deepcopy` gives a model with hooks, heads and caches of its own, and the same weights
    and graphs; a pickle holds the weights, and comes with graphs from the cache.
    """

    is_multilingual: bool
    stepper: Stepper

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
        if artifacts and self.dims.n_mels in N_MELS:  # for others there is no spectrogram
            network["log_mel"]  # with what it takes from there, or the error
        self.encoder = AudioEncoder(self.dims, network, self._device)
        self.decoder = TextDecoder(self.dims, network, self._device)
        self.stepper = stepper_of(network, self.dims)
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Whisper":
        memo[id(self.stepper)] = stepper_of(self.network, self.dims)
        copied: Whisper = super().__deepcopy__(memo)
        return copied

    def stepping_by(self, stepper: Stepper, decode: Decode | None = None) -> "Whisper":
        """Returns this model with another stepper, and another `decode` for `transcribe`; the rest is shared."""
        model = copy.copy(self)
        model.stepper = stepper
        if decode:
            model.decode = decode  # type: ignore[assignment, method-assign]
        return model

    def check_unchanged(self) -> None:
        """Raises OptionError as encoder and decoder do."""
        self.encoder.check_unchanged()
        self.decoder.check_unchanged()

    def set_alignment_heads(self, dump: bytes) -> None:
        """Sets the alignment heads as openai-whisper does: dump is their mask, in gzip and base85.

        Raises OptionError for what is none, or that of another model.
        """
        try:
            super().set_alignment_heads(dump)
        except (EOFError, OSError, RuntimeError, TypeError, ValueError, zlib.error) as error:
            mask = f"a mask of {self.dims.n_text_layer} layers with {self.dims.n_text_head} heads, in gzip and base85"
            raise refused("dump", dump, mask) from error

    @cpu_by_default()
    @one_torch_thread()
    def decode(
        self, mel: torch.Tensor, options: DecodingOptions | None = None, **kwargs: Any
    ) -> DecodingResult | list[DecodingResult]:
        """Decodes a window, mel (n_mels, 3000) or its audio features, or a batch, as openai-whisper's `decode` does.

        Raises AudioError for another shape, OptionError for what is no tensor of floats and for options that cannot be
        used, and DecodingError, besides what openai-whisper raises.
        """
        check_floats("mel", mel)
        options = DecodingOptions(**kwargs) if options is None else replace(options, **kwargs) if kwargs else options
        return decode(self, mel, decoding(options, self))

    @cpu_by_default()
    def detect_language(self, mel: torch.Tensor, tokenizer: Tokenizer | None = None) -> tuple[torch.Tensor, Any]:
        """Finds a window's language as openai-whisper's `detect_language` does: its token, and the probability of each.

        Raises AudioError and OptionError as `decode` does.
        """
        check_floats("mel", mel)
        if not isinstance(tokenizer, Tokenizer | None):
            raise refused("tokenizer", tokenizer, "one that whisper.tokenizer.get_tokenizer returns")
        return super().detect_language(mel, tokenizer)

    @cpu_by_default()
    @one_torch_thread()
    def transcribe(
        self,
        audio: StrPath | np.ndarray | torch.Tensor,
        progress: Callable[[float], None] | None = None,
        on_segments: Callable[[Segments], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Transcribes as openai-whisper's `transcribe` does, with its options and its result.

        fp16 is False unless given: arithmetic is that of `load_model`, and float16 would only round the audio features.
        progress: called with the seconds of audio done since the last call; takes the place of OpenAI's bar.
        on_segments: called with the segments of each window, as they are in the result but for their numbers.
        hotwords: text that every window is given before its prompt. vad_filter: whether to leave out silence from 2 s
        on, by a detector of speech. Both are as faster-whisper has them.

        Numbers in the result are Python's. Raises AudioError and OptionError besides what openai-whisper raises.
        """
        check_calls({"progress": progress, "on_segments": on_segments})
        clip_timestamps = options.pop("clip_timestamps", "0")
        options = transcribing(options, self)
        if isinstance(audio, str | os.PathLike):
            audio = load_audio(audio)
        if options.pop("vad_filter", False):
            options |= {"progress": progress, "on_segments": on_segments, "clip_timestamps": clip_timestamps}
            return transcribe_speech(self, audio, **options)
        audio = as_waveform(audio)
        if options.get("word_timestamps"):
            keep_alignment_compiled()
        clips = within(clip_timestamps, len(audio))
        names: dict[str, Any] = {
            "log_mel_spectrogram": lambda audio, _, padding: spectrogram(self.network["log_mel"], audio, padding),
            "add_word_timestamps": add_word_timestamps,
            "DecodingOptions": options_of_windows(options, options.pop("hotwords", None), self),
        }
        if progress:
            names["tqdm"] = SimpleNamespace(tqdm=partial(Frames, progress))
        if on_segments:
            names["enumerate"] = partial(enumerate_and_tell, lambda segments: on_segments(as_python(segments)))
        result = rebind(transcribe, **names)(self, audio, clip_timestamps=clips, **{"fp16": False, **options})
        return as_python(result)

    def transcribe_many(
        self, audio: Sequence[Audio], batch_size: int = 1, **options: Any
    ) -> Iterator[tuple[int, Result]]:
        """Yields the number of each recording, and what `transcribe` returns or raises for it, in the order in which
        they are done: the same as one at a time.

        batch_size: how many recordings to decode together.

        Raises OptionError if that is no whole number above 0, or for what is not several recordings.
        """
        return transcribe_many(self, audio, batch_size, **options)

    def install_kv_cache_hooks(self, cache: Mapping[torch.nn.Module, torch.Tensor] | None = None) -> Any:
        """Returns a cache for `decoder`, a copy of `cache` if given, and the hooks to remove afterwards: none are
        needed, unless modules inside the decoder have hooks already. Raises OptionError for another cache."""
        if not isinstance(cache, Mapping | KeyValueCache | None):
            raise refused("cache", cache, "one that install_kv_cache_hooks returns")
        if self.decoder.hooked():
            return super().install_kv_cache_hooks(cache)
        if isinstance(cache, KeyValueCache):
            return ModuleCache(self.decoder, cache.copy()), []
        own = ModuleCache(self.decoder)
        for module, kv in (cache or {}).items():
            own[module] = kv
        return own, []


def stepper_of(network: Network, dims: ModelDimensions) -> Stepper:
    """Returns what decodes texts where the network is."""
    if network.device == "cpu":
        return SpeculativeStepper(network, dims.n_text_ctx)
    return GPUStepper(network, dims, network.policy.device.to_device())


def restored(
    checkpoint: Checkpoint,
    device: str,
    artifacts: Artifacts | Cache | None,
    dtype: str,
    alignment_heads: torch.Tensor,
    training: bool,
) -> Whisper:
    model = Whisper(checkpoint, device, artifacts, dtype)
    model.register_buffer("alignment_heads", alignment_heads, persistent=False)
    return model.train(training)


def by_value(model: Whisper) -> Any:
    """Returns what multiprocessing makes a model of: its pickle. PyTorch would have the tensors that MAX reads moved to
    memory that the child shares."""
    return pickle.loads, (pickle.dumps(model),)


ForkingPickler.register(Whisper, by_value)
