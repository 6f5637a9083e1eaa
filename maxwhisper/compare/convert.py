"""One checkpoint in the formats of all engines, each converted once and kept in a cache folder.

The folder of a checkpoint is named by a hash of its tensors, the folder in it by the format and the version of the
package that wrote it. A folder appears when it is complete.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.folders import cache_folder
from ..errors import OptionError
from ..files import replacing

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

# PyTorch and the packages of the engines are imported where they are used: workers read this file too, and what an
# engine does not need itself would count as its memory.


def store(checkpoint: "Checkpoint") -> Path:
    """Returns the checkpoint's folder in the cache, with the checkpoint in OpenAI's format in it, as `openai/model.pt`.

    Raises OptionError if the cache cannot be written to.
    """
    folder = cache_folder("compare") / digest(checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        complete(folder / "openai", lambda unfinished: write_openai(checkpoint, unfinished))
    except OSError as error:
        raise OptionError(f"{folder}: converted checkpoints cannot be kept there: {error.strerror or error}") from error
    return folder


def digest(checkpoint: "Checkpoint") -> str:
    """Returns a hash of everything that makes the checkpoint, whatever file it came from."""
    import torch

    hashed = hashlib.sha256(json.dumps(asdict(checkpoint.dims)).encode())
    for name, tensor in checkpoint.tensors.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]


def complete(folder: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a folder that gets its name afterwards; does nothing if there is one of this name, and leaves it
    as it is if another process has completed it meanwhile."""
    if not folder.exists():
        with replacing(folder, or_keeping=True) as unfinished:
            unfinished.mkdir()
            write(unfinished)


def write_openai(checkpoint: "Checkpoint", folder: Path) -> None:
    import torch

    content = {"dims": asdict(checkpoint.dims), "model_state_dict": dict(checkpoint.tensors)}
    torch.save(content, folder / "model.pt")


# ---- from openai/model.pt to the others ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """A format to write a checkpoint in: write(checkpoint, folder) fills a folder; package: the one whose version the
    result depends on."""

    write: Callable[["Checkpoint", Path], None]
    package: str


def converted(kind: str, checkpoint_folder: Path) -> Path:
    """Returns the folder with the checkpoint in a format, a key of CONVERSIONS; raises KeyError for another."""
    if kind == "openai":
        return checkpoint_folder / "openai"
    return checkpoint_folder / f"{kind}-{version(CONVERSIONS[kind].package)}"


def convert(kind: str, checkpoint_folder: Path) -> Path:
    """Converts, if that was not done before; raises what the engine's own converter raises."""
    folder = converted(kind, checkpoint_folder)
    if not folder.exists():
        from ..checkpoint import load_checkpoint

        checkpoint = load_checkpoint(checkpoint_folder / "openai" / "model.pt")
        complete(folder, lambda unfinished: CONVERSIONS[kind].write(checkpoint, unfinished))
    return folder


def write_hugging_face(checkpoint: "Checkpoint", folder: Path) -> None:
    from .hugging_face import write

    write(checkpoint, folder)


def write_ctranslate2(checkpoint: "Checkpoint", folder: Path) -> None:
    """Converts as the published models of faster-whisper are made: from a Hugging Face folder, in float16."""
    from ctranslate2.converters import TransformersConverter

    source = convert("hugging-face", checkpoint.path.parents[1])
    files = ["tokenizer.json", "preprocessor_config.json"]
    converter = TransformersConverter(str(source), copy_files=files, load_as_float16=True)
    converter.convert(str(folder), quantization="float16", force=True)


def write_ggml(checkpoint: "Checkpoint", folder: Path) -> None:
    from .ggml import write

    write(checkpoint, folder / "model.bin")


def write_openvino(checkpoint: "Checkpoint", folder: Path) -> None:
    import openvino

    from .stepwise import graphs

    write_dims(checkpoint, folder)
    for name, graph in graphs(checkpoint).items():
        model = openvino.convert_model(graph.module, example_input=graph.example)
        for port, tensor, (name_of_input, dynamic) in zip(
            model.inputs, graph.example, graph.inputs.items(), strict=True
        ):
            sizes = [-1 if axis in dynamic else size for axis, size in enumerate(tensor.shape)]
            port.get_tensor().set_names({name_of_input})
            port.get_node().set_partial_shape(openvino.PartialShape(sizes))
        model.validate_nodes_and_infer_types()
        openvino.save_model(model, folder / f"{name}.xml", compress_to_fp16=False)


def write_onnx(checkpoint: "Checkpoint", folder: Path) -> None:
    import torch

    from .stepwise import graphs

    write_dims(checkpoint, folder)
    for name, graph in graphs(checkpoint).items():
        axes = {
            each: {axis: f"{each}.{axis}" for axis in axes} for each, axes in {**graph.inputs, **graph.outputs}.items()
        }
        torch.onnx.export(
            graph.module,
            graph.example,
            str(folder / f"{name}.onnx"),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,  # the other exporter needs one more package
        )


def write_dims(checkpoint: "Checkpoint", folder: Path) -> None:
    (folder / "dims.json").write_text(json.dumps(asdict(checkpoint.dims)))


CONVERSIONS = {
    "hugging-face": Conversion(write_hugging_face, "transformers"),
    "ctranslate2": Conversion(write_ctranslate2, "ctranslate2"),
    "ggml": Conversion(write_ggml, "maxwhisper"),
    "openvino": Conversion(write_openvino, "openvino"),
    "onnx": Conversion(write_onnx, "onnx"),
}
