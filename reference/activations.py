"""What to feed a block: the true inputs of every block, recorded from the oracle while it transcribes speech."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from whisper.model import Whisper

from maxwhisper.blocks import Block

from .blocks import log_mel, split_heads

PROMPT, STEP = "prompt", "step"


@dataclass(frozen=True)
class Activations:
    """Every submodule's input over one window of audio and one text, and the keys and values of every attention.

    audio: (samples,); mel: (1, n_mels, 2 * n_audio_ctx); tokens: (1, token).
    inputs: by submodule, its input. keys, values: by attention, (1, head, token, channel).
    """

    audio: Tensor
    mel: Tensor
    tokens: Tensor
    inputs: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    audio_features: Tensor

    def of(self, block: Block, names: list[str], layer: int, position: int) -> dict[str, Tensor]:
        """The block's inputs. A decoder block sees the first `position` tokens at prefill, or at a step the one token
        at `position` behind a cache of all before it: the decoder is causal, so one recording holds both."""
        path = block.path.format(audio_layer=layer, text_layer=layer)
        step = block.name.endswith((".step", ".cached"))
        return {name: self.one(name, path, step, position) for name in names}

    def one(self, name: str, path: str, step: bool, position: int) -> Tensor:
        tokens = slice(position, position + 1) if step else slice(0, position)
        if name in ("audio", "mel", "audio_features"):
            return getattr(self, name)
        if name == "offset":
            return torch.tensor(position if step else 0)
        if name == "tokens":
            return self.tokens[:, tokens]
        if name == "x":
            x = self.inputs["decoder.ln" if path == "decoder" else path]
            return x[:, tokens] if path.startswith("decoder") else x
        return self.key_value(name, path, position)

    def key_value(self, name: str, path: str, position: int) -> Tensor:
        """k_cache, v_cross, and in a whole decoder k_cache.0, v_cross.1 and so on."""
        kind, _, layer = name.partition(".")
        block = f"decoder.blocks.{layer}" if layer else path.removesuffix(".attn").removesuffix(".cross_attn")
        table = self.keys if kind.startswith("k") else self.values
        if kind.endswith("cross"):
            return table[f"{block}.cross_attn"]
        return table[f"{block}.attn"][:, :, :position]


@torch.no_grad()
def record(oracle: Whisper, audio: Tensor, tokens: Tensor) -> Activations:
    """Runs the oracle over 30 s of `audio` and `tokens`, keeping what goes into and comes out of its submodules."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str):  # noqa: ANN202
        def keep(module: torch.nn.Module, given: tuple, output: object) -> None:
            inputs[name] = given[0]
            if isinstance(output, Tensor):
                outputs[name] = output

        return keep

    with ExitStack() as stack:
        for name, module in oracle.named_modules():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        mel = log_mel(oracle, 0, audio.double())[0].unsqueeze(0)
        features = oracle.encoder(mel)
        oracle.decoder(tokens, features)

    def heads(kind: str) -> dict[str, Tensor]:
        found = {name.removesuffix(f".{kind}"): x for name, x in outputs.items() if name.endswith(f"attn.{kind}")}
        return {name: split_heads(x, oracle.get_submodule(name).n_head) for name, x in found.items()}

    return Activations(audio, mel, tokens, inputs, heads("key"), heads("value"), features)
