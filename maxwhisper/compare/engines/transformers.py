"""Hugging Face transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from .on_pytorch import OnPyTorch

SAMPLE_RATE = 16000
WINDOW = 30 * SAMPLE_RATE


class Adapter(OnPyTorch):
    def load(self, folder: Path) -> None:
        torch.set_num_threads(self.task.threads)
        dtype = torch.float16 if self.variant == "float16" else torch.float32
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        if self.task.device == "gpu":
            # With this one generate() compiles the step of the decoder, in the mode "reduce-overhead".
            self.model.generation_config.cache_implementation = "static"
        self.features = WhisperFeatureExtractor.from_pretrained(folder)

    def encode(self, mel: np.ndarray) -> Any:
        with torch.inference_mode():
            return self.model.get_encoder()(torch.from_numpy(mel)[None].to(self.device, self.model.dtype))

    def generate(self, features: Any, n_tokens: int) -> list[int]:
        # The loop below Whisper's own, which would cut the text at timestamps, as random weights write them.
        generated = GenerationMixin.generate(
            self.model,
            encoder_outputs=BaseModelOutput(last_hidden_state=features.last_hidden_state),
            decoder_input_ids=torch.tensor([self.task.prompt], device=self.device),
            min_new_tokens=n_tokens,
            max_new_tokens=n_tokens,
            num_beams=self.task.beam_size or 1,
            do_sample=False,
        )
        return generated[0].tolist()[-n_tokens:]

    def transcribe(self, audio: np.ndarray, language: str, tell: Callable[[list[int]], None]) -> None:
        long = len(audio) > WINDOW
        inputs = self.features(
            audio,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            return_attention_mask=True,
            truncation=False,
            padding="longest" if long else "max_length",
        ).to(self.device, self.model.dtype)
        multilingual = (
            {"language": language, "task": "transcribe"} if self.model.generation_config.is_multilingual else {}
        )
        generated = self.model.generate(
            **inputs,
            **multilingual,
            return_timestamps=True,
            return_segments=True,
            temperature=0.0,
            do_sample=False,
            num_beams=self.task.beam_size or 1,
            condition_on_prev_tokens=long,
            logprob_threshold=-1.0,
            compression_ratio_threshold=2.4,
            no_speech_threshold=0.6,
        )
        tell([int(token) for segment in generated["segments"][0] for token in segment["tokens"]])
