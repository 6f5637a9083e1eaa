"""ONNX Runtime, by graphs exported from PyTorch."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime import OrtValue
from whisper.model import ModelDimensions

from ..stepwise import Backend, HostedWhisper
from .openai_like import OpenAILike


class Adapter(OpenAILike):
    def load(self, folder: Path) -> None:
        torch.set_num_threads(self.task.threads)
        dims = ModelDimensions(**json.loads((folder / "dims.json").read_text()))
        self.model = HostedWhisper(dims, Graphs(folder, dims, self.task.threads))


class Graphs(Backend):
    def __init__(self, folder: Path, dims: ModelDimensions, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.encoder, self.cross, self.decoder = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", options, ["CPUExecutionProvider"])
            for name in ("encoder", "cross", "step")
        )
        self.dims = dims
        self.names = [each.name for each in self.decoder.get_inputs()]
        self.outputs = [each.name for each in self.decoder.get_outputs()]

    def encode(self, mel: np.ndarray) -> np.ndarray:
        return self.encoder.run(None, {"mel": mel})[0]

    def start(self, features: np.ndarray, batch: int) -> None:
        features = np.ascontiguousarray(features[:1])
        self.audio = [OrtValue.ortvalue_from_numpy(each) for each in self.cross.run(None, {"features": features})]
        self.own = [OrtValue.ortvalue_from_numpy(self.empty(self.dims, batch)) for _ in self.audio]

    def step(self, tokens: np.ndarray) -> np.ndarray:
        tokens = np.ascontiguousarray(tokens)
        values = [OrtValue.ortvalue_from_numpy(tokens), *self.own, *self.audio]
        inputs = dict(zip(self.names, values, strict=True))
        logits, *self.own = self.decoder.run_with_ort_values(self.outputs, inputs)
        return logits.numpy()

    def rearrange(self, source_indices: list[int]) -> None:
        self.own = [OrtValue.ortvalue_from_numpy(each.numpy()[source_indices]) for each in self.own]
