"""What the files of a checkpoint store: read without running code, and refused in one line where it cannot be read."""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from whisper.model import ModelDimensions

from maxwhisper.errors import CheckpointError

FOREIGN = {
    b"lmgg": "a ggml file, as whisper.cpp reads it",
    b"GGUF": "a GGUF file",
    b"WhisperSpec": "a model converted for CTranslate2",
    b"version https://git-lfs": "a pointer of Git LFS in the place of the file, which `git lfs pull` fetches",
}
"""What is found in the first bytes of other files, and what they are."""


def read_tensors(path: Path) -> dict[Any, Any]:
    """Returns the tensors of a file, by the names they have there; raises CheckpointError if it cannot be read."""
    return read_safetensors(path)[0] if is_safetensors(path) else unpickle(path)


def first_bytes(path: Path) -> bytes:
    """Returns the first bytes of a file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(32)
    except OSError:
        return b""


def is_safetensors(path: Path) -> bool:
    """Returns whether a file is to be read as safetensors: by its name, or whatever its name, as of the files that the
    hub's cache links to, by the object of JSON that begins behind eight bytes."""
    return path.suffix == ".safetensors" or first_bytes(path)[8:10] in (b'{"', b"{}", b"{ ")


def refuse_foreign(path: Path) -> None:
    """Raises CheckpointError for a file of another library's, or of none."""
    start = first_bytes(path)
    of_json = "a file of JSON, whose folder is to be given" if start.lstrip().startswith(b"{") else None
    if kind := next((kind for mark, kind in FOREIGN.items() if mark in start), of_json):
        raise CheckpointError(f"{path}: {kind}, expected a checkpoint of PyTorch or safetensors")


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors of a file and its metadata; raises CheckpointError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # besides its own error, the reader lets those of the file system and of torch through
        refuse_foreign(path)
        raise CheckpointError(f"{path}: cannot be read as safetensors: {reason(error)}") from error


def unpickle(path: Path) -> dict[Any, Any]:
    """Returns the dict that a file of PyTorch's holds; raises CheckpointError for another one, or for code in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on damaged bytes before it gives up on them
            torch.serialization.add_safe_globals([ModelDimensions])  # a dataclass of numbers, which runs nothing
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
    except Exception as error:  # on damaged bytes torch raises nearly every built-in exception
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            refused = f"{path}: refused, since reading it would run or build {foreign[1]}"
            raise CheckpointError(f"{refused}{_without(path, foreign[1])}") from error
        refuse_foreign(path)
        raise CheckpointError(f"{path}: damaged, or not a PyTorch checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return content


def _without(path: Path, foreign: str) -> str:
    """Says how to store the tensors of a whole model that was pickled, where `foreign` shows it to be one."""
    model = f"model = torch.load({str(path)!r}, weights_only=False)"
    if foreign == "whisper.model.Whisper":
        saved = "torch.save({'dims': vars(model.dims), 'model_state_dict': model.state_dict()}, 'whisper.pt')"
        return f": a whole model, pickled with its class; if you trust it, {as_lines(f'import torch; {model}', saved)}"
    if foreign.startswith("transformers.models.whisper."):
        saved = "model.save_pretrained('whisper')"
        return f": a whole model, pickled with its class; if you trust it, {as_lines(f'import torch; {model}', saved)}"
    return "; where it comes from, save 'dims' and 'model_state_dict' alone, of numbers and tensors"


def can_be_mapped(path: Path) -> bool:
    """Returns whether torch can map the tensors in this file; raises BadZipFile if a checksum in it does not hold."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False  # the format before torch 1.6
    with zipfile.ZipFile(path) as archive:
        # torch verifies neither the checksums nor the table that locates the tensors
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not hold")
        # and would map compressed entries as if they were plain
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file; raises CheckpointError if it holds none."""
    try:
        content = parse_json(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def parse_json(path: Path, text: str | bytes) -> Any:
    """Returns what a text from a file says; raises CheckpointError for broken JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON: {reason(error)}") from error


def as_lines(*lines: str) -> str:
    """Returns lines of Python within a message of one line."""
    return f"run `{'; '.join(lines)}`"


def some(names: Any) -> str:
    """Returns up to three names, and how many more there are."""
    listed = sorted(map(repr, names))
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def reason(error: Exception) -> str:
    """Returns an exception as one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
