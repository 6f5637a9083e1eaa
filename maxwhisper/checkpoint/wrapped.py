"""Checkpoints as training leaves them: wrapped models, state dicts of trainers, adapters, quantized weights.

What can be undone in one way alone is undone. Of the rest it is said what it is, with the lines of Python that make a
checkpoint of it.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from maxwhisper.checkpoint.stored import as_lines, is_safetensors, read_json, some
from maxwhisper.errors import CheckpointError

OUTPUT = "proj_out.weight"
"""Hugging Face's output projection: beside the model in its module, not inside it as the other tensors."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""The attributes in which data parallelism, torch.compile, FSDP and activation checkpointing keep what they wrap."""
_PART = re.compile(
    r"((?:.*?\.)?)(?:encoder|decoder)\.(?:conv[12]|blocks|layers|ln_post|ln|layer_norm|token_embedding|embed_tokens"
    r"|positional_embedding|embed_positions)(?:\.|$)"
)
_OF_ADAPTERS = re.compile(r"(^|[._])(lora_\w+|ia3_l|base_layer|modules_to_save)(\.|_|$)")
_OF_QUANTIZATION = re.compile(
    r"\.(SCB|weight_format|absmax|quant_map|quant_state\..*|qweight|qzeros|weight_scale|weight_packed|_packed_params.*)$"
)


@dataclass(frozen=True)
class Named:
    """The tensors of a file by plain name, without what wrappers add.

    `prefix` stands before all names of the model in the file; `names` gives the name in the file for each plain one.
    """

    prefix: str
    names: dict[str, Any]
    tensors: dict[str, Any]


def named(path: Path, stored: object) -> Named:
    """Returns the tensors of the state dict `stored` by plain name.

    Raises CheckpointError for adapters, quantized weights, and more than one model.
    """
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: the state dict is a {type(stored).__name__}, expected a dict")
    if any(_OF_ADAPTERS.search(str(name)) for name in stored):
        refuse_adapter(path)
    if any(_OF_QUANTIZATION.search(str(name)) for name in stored):
        refuse_quantized(path)
    prefix = _common_prefix(path, stored)
    names: dict[str, Any] = {}
    for name in stored:
        plain = _plain(name, prefix)
        if plain in names:
            raise CheckpointError(f"{path}: both {names[plain]!r} and {name!r} stand for tensor {plain!r}")
        names[plain] = name
    return Named(prefix, names, {plain: stored[name] for plain, name in names.items()})


def model_in(path: Path, content: dict[Any, Any]) -> tuple[object, object]:
    """Returns the dimensions and the state dict in what a `.pt` file holds.

    Raises CheckpointError, with what the file is and what to do, if it does not hold both, or several state dicts.
    """
    if "dims" in content and "model_state_dict" in content:
        return content["dims"], content["model_state_dict"]
    found = [key for key, value in content.items() if _is_state_dict(value)]
    if "dims" in content and len(found) == 1:
        return content["dims"], content[found[0]]
    if not found and not _is_state_dict(content):
        raise CheckpointError(
            f"{path}: not an OpenAI checkpoint, which holds 'dims' and 'model_state_dict';"
            " for a Hugging Face model give the folder that holds its config.json"
        )
    kind = "of PyTorch Lightning" if "pytorch-lightning_version" in content else "of a training run"
    what = f"a checkpoint {kind}, with tensors under {some(found)}" if found else "a bare state dict"
    lacks = "" if "dims" in content else ", without the dimensions of its model"
    raise CheckpointError(f"{path}: {what}{lacks}; {rewriting(path, content, found[0] if found else None)}")


def rewriting(path: Path, content: dict[Any, Any], key: Any = None) -> str:
    """Says what makes a checkpoint of the state dict under `key` of what a file holds, or of all of it if that is None.

    Raises CheckpointError as `named` does.
    """
    stored, source = (content, "content") if key is None else (content[key], f"content[{key!r}]")
    named(path, stored)
    if not _is_state_dict(stored):
        return "give an OpenAI checkpoint, or the folder of a Hugging Face model"
    # As in the file: before the first tensor, with what wrappers add.
    inner = next((match[1] for match in map(_PART.match, map(str, stored)) if match), "")
    is_hugging_face = any(re.search(r"(encoder|decoder)\.(layers|embed_)", str(name)) for name in stored)
    prefix = inner.removesuffix("model.") if is_hugging_face else inner
    if prefix:
        source = f"{{n.removeprefix({prefix!r}): t for n, t in {source}.items() if n.startswith({prefix!r})}}"
    read = f"import torch; content = torch.load({str(path)!r}, map_location='cpu')"
    if is_safetensors(path):
        read = f"import torch, safetensors.torch; content = safetensors.torch.load_file({str(path)!r})"
    if is_hugging_face:
        module = "model" if inner.endswith("model.") else "model.model"
        lines = as_lines(
            read,
            "import transformers",
            "model = transformers.WhisperForConditionalGeneration.from_pretrained('NAME')",
            f"{module}.load_state_dict({source}); model.save_pretrained('whisper')",
        )
        return f"give the folder that holds its config.json, or, with NAME the model that was trained, {lines}"
    if "dims" in content:
        return as_lines(read, f"torch.save({{'dims': content['dims'], 'model_state_dict': {source}}}, 'whisper.pt')")
    dims = "vars(whisper.load_model('NAME').dims)"
    saved = f"import whisper; torch.save({{'dims': {dims}, 'model_state_dict': {source}}}, 'whisper.pt')"
    return f"with NAME the model that was trained, {as_lines(read, saved)}"


def refuse_adapter(path: Path) -> NoReturn:
    """Raises CheckpointError for a PEFT folder, or a file with tensors of an adapter."""
    folder = path if os.path.isdir(path) else path.parent
    described = folder / "adapter_config.json"
    if not os.path.isfile(described):
        lines = as_lines("model.merge_and_unload().save_pretrained('merged')")
        raise CheckpointError(
            f"{path}: holds a PEFT adapter, which must be merged into its model: where it was trained, {lines}"
        )
    config = read_json(described)
    base = config.get("base_model_name_or_path") or "NAME"
    lines = as_lines(
        "import peft, transformers",
        f"model = transformers.WhisperForConditionalGeneration.from_pretrained({base!r})",
        f"peft.PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload().save_pretrained('merged')",
    )
    whole = folder / "model.safetensors"
    alone = f", or give {whole} for the model beside it alone" if path == folder and os.path.isfile(whole) else ""
    raise CheckpointError(
        f"{path}: holds a PEFT adapter ({config.get('peft_type')}) of {base}, which must be merged into its model:"
        f" {lines}{alone}"
    )


def refuse_quantized(path: Path) -> NoReturn:
    """Raises CheckpointError for a file, or a Hugging Face folder, with quantized weights."""
    folder = path if os.path.isdir(path) else path.parent
    advice = "use the model that was quantized"
    if os.path.isfile(folder / "config.json"):
        advice += ", or " + as_lines(
            "import transformers",
            f"model = transformers.WhisperForConditionalGeneration.from_pretrained({str(folder)!r})",
            "model.dequantize().save_pretrained('dequantized')",
        )
    raise CheckpointError(f"{path}: the weights are quantized, expected float16, bfloat16 or float32: {advice}")


def _plain(name: Any, prefix: str) -> str:
    inner = _unwrapped(name)
    if inner == prefix.removesuffix("model.") + OUTPUT:
        return OUTPUT
    return inner.removeprefix(prefix)


def _unwrapped(name: Any) -> str:
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


def _prefixes(stored: Iterable[Any]) -> list[str]:
    """Returns what stands before the names of encoder and decoder in a state dict, each once."""
    matches = (_PART.match(_unwrapped(name)) for name in stored)
    return sorted({match[1] for match in matches if match})


def _common_prefix(path: Path, stored: Iterable[Any]) -> str:
    prefixes = _prefixes(stored)
    if len(prefixes) > 1:
        one = f"{{n: t for n, t in state.items() if n.startswith({prefixes[-1]!r})}}"
        raise CheckpointError(
            f"{path}: holds tensors of {len(prefixes)} models, under {some(prefixes)}: keep one's, as `{one}` does"
        )
    return prefixes[0] if prefixes else ""


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and any(
        isinstance(tensor, torch.Tensor) and _PART.match(_unwrapped(name)) for name, tensor in value.items()
    )
