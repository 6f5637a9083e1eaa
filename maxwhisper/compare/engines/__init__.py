"""The engines that can be compared, one line of the table each.

An adapter is a module of this package with a class `Adapter`, an `Engine`, and one called `Batched` where windows can
be decoded several at a time. Adapters import their package when they are imported, which only a worker process does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ...errors import OptionError
from ...names import DTYPES
from .base import Engine as Engine
from .base import Task as Task

SUBJECT, REFERENCE = "maxwhisper", "openai-whisper"


@dataclass(frozen=True)
class Needs:
    """What the rows of an engine need.

    conversion: a key of CONVERSIONS. packages: distributions, beside what maxwhisper itself needs; if_batched: those
    that a row of batches needs too.
    """

    conversion: str
    packages: tuple[str, ...]
    if_batched: tuple[str, ...] = ()


NEEDS = {
    SUBJECT: Needs("openai", ("max",), ("silero-vad", "onnxruntime")),
    REFERENCE: Needs("openai", ("openai-whisper", "torch")),
    "faster-whisper": Needs("ctranslate2", ("faster-whisper", "ctranslate2", "transformers"), ("onnxruntime",)),
    "transformers": Needs("hugging-face", ("transformers",)),
    "whisper.cpp": Needs("ggml", ("pywhispercpp",)),
    "openvino": Needs("openvino", ("openvino",)),
    "onnxruntime": Needs("onnx", ("onnxruntime", "onnx")),
}


@dataclass(frozen=True)
class Spec:
    """A row of the table.

    engine: its name in --against, a key of NEEDS. variant: the precision or the mode, where an engine has several.
    note: what it was given and what it does differently. batched: it decodes several windows at a time, so that the
    time of one window or of one token says nothing about it. devices: what it is compared on.
    """

    engine: str
    variant: str
    note: str
    batched: bool = False
    devices: tuple[str, ...] = ("cpu",)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.variant}".strip()

    @property
    def module(self) -> str:
        """Returns the name of its adapter's module in this package."""
        return re.sub(r"\W", "_", self.engine)

    @property
    def adapter(self) -> str:
        """Returns the name of its class in that module."""
        return "Batched" if self.batched else "Adapter"

    @property
    def packages(self) -> tuple[str, ...]:
        """Returns the distributions that it needs."""
        needs = NEEDS[self.engine]
        return (*needs.packages, *(needs.if_batched if self.batched else ()))

    @property
    def conversion(self) -> str:
        """Returns the key of CONVERSIONS of what it reads."""
        return NEEDS[self.engine].conversion


OPENAI_LOOP = "the loop over windows and tokens, and its rules, are openai-whisper's own Python code"
STEPS = "encoder and decoder step exported from PyTorch, one graph of the step for any number of tokens"

SPECULATION = "without beams, on a CPU, a draft, the decoder quantized, proposes tokens, which the decoder verifies"

BOTH, GPU = ("cpu", "gpu"), ("gpu",)

SPECS = (
    Spec(
        SUBJECT,
        "",
        "weights as stored, float32 arithmetic, in an encoder on a CPU with AMX by three bfloat16 parts of a number;"
        f" graphs compiled before; {SPECULATION}",
        devices=BOTH,
    ),
    Spec(
        SUBJECT,
        "bfloat16",
        "--dtype bfloat16: weights and activations rounded to bfloat16, added up in float32: not the same arithmetic;"
        f" {SPECULATION}",
        devices=BOTH,
    ),
    Spec(SUBJECT, "float16", "--dtype float16: activations rounded to float16: not the same arithmetic", devices=GPU),
    Spec(
        SUBJECT,
        "batched",
        "transcribe --batched: audio cut at silences by a voice-activity detector (Silero's), several pieces decoded"
        " together, none given the text before it; with --tokens, several windows by one decode(), which takes those of"
        " beam search one at a time",
        batched=True,
    ),
    Spec(SUBJECT, "float16 batched", "--dtype float16, else as maxwhisper batched on a CPU", batched=True, devices=GPU),
    Spec(REFERENCE, "", "float32 (fp16=False), eager PyTorch", devices=BOTH),
    Spec(
        REFERENCE,
        "float16",
        "its default on a GPU (fp16=True), eager PyTorch: weights in float32, rounded to float16 in every call",
        devices=GPU,
    ),
    Spec(
        "faster-whisper",
        "float32",
        "WhisperModel.transcribe, compute_type float32, vad_filter False; its own loop over windows",
    ),
    Spec("faster-whisper", "int8", "as float32, but matrices rounded to int8: not the same arithmetic"),
    Spec(
        "faster-whisper",
        "batched",
        "BatchedInferencePipeline.transcribe, compute_type float32, without_timestamps False: audio cut"
        " and silence within pieces dropped by its own copy of Silero's detector, no piece given the text before it, no"
        " thresholds; with --tokens, several windows in one batch",
        batched=True,
    ),
    Spec(
        "faster-whisper",
        "float16",
        "WhisperModel.transcribe, compute_type float16, vad_filter False; its own loop over windows; no time on the"
        " device, as CTranslate2 does not tell it",
        devices=GPU,
    ),
    Spec(
        "faster-whisper",
        "float16 batched",
        "BatchedInferencePipeline.transcribe, compute_type float16, else as faster-whisper batched on a CPU",
        batched=True,
        devices=GPU,
    ),
    Spec(
        "transformers",
        "",
        "float32, generate() with condition_on_prev_tokens; its own loop over windows, which cuts audio"
        " differently; per token and with --tokens, the plain loop below it (GenerationMixin.generate), not Whisper's",
    ),
    Spec(
        "transformers",
        "float16",
        "float16, static cache, the step of the decoder compiled by torch.compile (reduce-overhead) when it is first"
        " used, which no time counts but its peak memory; else as transformers on a CPU",
        devices=GPU,
    ),
    Spec(
        "whisper.cpp",
        "",
        "pywhispercpp, matrices and cache in float16, no temperature fallback; its own loop over windows and its own"
        " rules of ending one; encoder and per token by its C functions, the token selected by NumPy, greedy only; with"
        " --tokens its memory counts the model twice",
    ),
    Spec("openvino", "float32", f"float32 (INFERENCE_PRECISION_HINT); {STEPS}; {OPENAI_LOOP}"),
    Spec(
        "openvino", "bfloat16", "as float32, but bfloat16 where OpenVINO takes it on this CPU: not the same arithmetic"
    ),
    Spec("onnxruntime", "", f"float32; {STEPS}; {OPENAI_LOOP}"),
)

ENGINES = tuple(dict.fromkeys(spec.engine for spec in SPECS if spec.engine != SUBJECT))
"""What --against accepts."""


def rows(against: Sequence[str] | None, device: str) -> list[Spec]:
    """Returns the subject's rows and some engines', None for all; raises OptionError for an engine without any."""
    there = [spec for spec in SPECS if device in spec.devices]
    known = dict.fromkeys(spec.engine for spec in there)
    if without := [engine for engine in against or () if engine not in known]:
        raise OptionError(f"--against {without[0]}: it is not compared on a {device}, as {', '.join(known)} are")
    return [spec for spec in there if spec.engine in (SUBJECT, *(against or known))]


def precision(variant: str) -> str:
    """Returns what maxwhisper computes in, in one of its rows."""
    first = variant.split(" ")[0]
    return first if first in DTYPES else "float32"


def versions(spec: Spec) -> dict[str, str | None]:
    """Returns the installed version of each package that an engine needs; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in spec.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def missing(spec: Spec) -> list[str]:
    """Returns the packages to install before the engine can run."""
    return [package for package, found in versions(spec).items() if found is None]
