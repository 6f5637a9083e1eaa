"""OpenVINO, by graphs converted from PyTorch."""

import json
from pathlib import Path

import numpy as np
import openvino
import torch
from whisper.model import ModelDimensions

from ..stepwise import Backend, HostedWhisper
from .openai_like import OpenAILike


class Adapter(OpenAILike):
    def load(self, folder: Path) -> None:
        torch.set_num_threads(self.task.threads)
        dims = ModelDimensions(**json.loads((folder / "dims.json").read_text()))
        self.model = HostedWhisper(dims, Graphs(folder, dims, self.task.threads, self.variant))


class Graphs(Backend):
    def __init__(self, folder: Path, dims: ModelDimensions, threads: int, precision: str):
        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = {
            name: core.compile_model(folder / f"{name}.xml", "CPU", settings) for name in ("encoder", "cross", "step")
        }
        self.encoder, self.cross = (compiled[name].create_infer_request() for name in ("encoder", "cross"))
        # Two requests in turn: the outputs of one are inputs of the other, and no cache is copied in between.
        self.steps = [compiled["step"].create_infer_request() for _ in range(2)]
        self.dims = dims
        self.n_own = 2 * dims.n_text_layer

    def encode(self, mel: np.ndarray) -> np.ndarray:
        self.encoder.infer([mel])
        return self.encoder.get_output_tensor(0).data.copy()

    def start(self, features: np.ndarray, batch: int) -> None:
        self.cross.infer([np.ascontiguousarray(features[:1])])
        for request in self.steps:
            for i in range(self.n_own):
                request.set_input_tensor(1 + self.n_own + i, self.cross.get_output_tensor(i))
        self.own = [openvino.Tensor(self.empty(self.dims, batch)) for _ in range(self.n_own)]

    def step(self, tokens: np.ndarray) -> np.ndarray:
        request = self.steps[0]
        request.set_input_tensor(0, openvino.Tensor(np.ascontiguousarray(tokens)))
        for i, tensor in enumerate(self.own):
            request.set_input_tensor(1 + i, tensor)
        request.infer()
        self.own = [request.get_output_tensor(1 + i) for i in range(self.n_own)]
        self.steps.reverse()
        return request.get_output_tensor(0).data.copy()

    def rearrange(self, source_indices: list[int]) -> None:
        self.own = [openvino.Tensor(tensor.data[source_indices]) for tensor in self.own]
