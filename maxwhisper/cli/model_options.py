"""The options of the commands that load a model, and the model of these options."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..names import DTYPES, GPU
from .option_types import str2bool

if TYPE_CHECKING:
    from ..whisper import Whisper


MODEL_OPTIONS = ("model", "model_dir", "device", "dtype", "artifacts", "or_compile")
CHECKPOINT = "name of an OpenAI model, or path of a .pt or .safetensors file or of a Hugging Face folder"


def add_model(add: Callable[..., Any]) -> None:
    """Adds what says which model to load, and for which device."""
    add("--model", default="turbo", help=CHECKPOINT)
    add("--model_dir", help="where named models are kept; ~/.cache/whisper unless given")
    device = "what to compute on; cuda and cuda:0 mean gpu, auto a GPU where there is one"
    add("--device", default="cpu", choices=["cpu", *GPU, "auto"], help=device)
    dtype = "of arithmetic; the others are less accurate, and bfloat16 encodes faster on CPUs with AVX-512 BF16"
    add("--dtype", default="float32", choices=DTYPES, help=dtype)
    add("--artifacts", metavar="DIR", help="use what `maxwhisper compile` wrote, or fail, naming what does not fit")
    add("--or_compile", type=str2bool, default=False, help="compile what does not fit in --artifacts, do not fail")


def leave_cores_to_max() -> None:
    """Has PyTorch's threads, once it is imported, not wait for more at full load, on the cores that MAX computes on."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def load(model: str, model_dir: str | None, device: str, **how: Any) -> "Whisper":
    """Loads the model of MODEL_OPTIONS; raises MaxWhisperError if there can be none."""
    from ..engine.session import device_named
    from ..whisper import load_model

    return load_model(model, device_named(device), model_dir, **how)
