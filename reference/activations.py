"""What to feed a block: its true inputs, recorded from the oracle while it transcribes speech; random ones; and ones
made to go wrong."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_SAMPLES, pad_or_trim
from whisper.model import ModelDimensions, Whisper

from maxwhisper.compare.tokens import tokenizer_of
from maxwhisper.network.blocks import Block

from . import waveforms
from .blocks import TWINS, log_mel, split_heads
from .fixtures import FIXTURES

CLIPS: list[dict[str, Any]] = json.loads((FIXTURES / "clips.json").read_text())["clips"]
"""What is said in every clip, and in which language; see fixtures/README.md."""
N_PROMPT = 4
"""Tokens before the first one that is decoded: start, language, task, no timestamps."""

OFFSET = 3
"""Position of the first token of an embedding."""

LOUD, QUIET = 2.0**6, 2.0**-12

AUDIO: dict[str, Callable[[Tensor], Tensor]] = {
    "speech": lambda speech: speech,
    "silence": torch.zeros_like,
    "clipping": lambda speech: (speech * 1000).clamp(-1, 1),
    "constant": lambda speech: torch.full_like(speech, 0.5),
    "click": lambda speech: with_click(speech),
}
"""Waveforms that run through the whole oracle, so that every block gets its true inputs for them.

speech: an English clip. silence: digital. clipping: speech far beyond full scale. constant: an offset and nothing else.
click: speech in which one frame in the middle is full-scale noise.
"""
WINDOWS = ("speech", "clipping", "click")
BATCH = "three windows"
"""WINDOWS side by side, each with three texts, which share their window's keys and values."""
END = "to the end"
"""Speech with a text up to the last position that a model has."""
VOCABULARY = "every token"
"""Every token of the vocabulary, once."""
RANDOM = "random"
"""Normal numbers of the recorded inputs' RMS; random tokens. Another set for every seed."""
SCALED = {"loud": LOUD, "quiet": QUIET}
"""The inputs for speech, times a power of two."""

KINDS = (*AUDIO, BATCH, END, VOCABULARY, RANDOM, *SCALED)


def with_click(speech: Tensor) -> Tensor:
    clicked, middle = speech.clone(), N_SAMPLES // 2
    clicked[middle : middle + HOP_LENGTH] = torch.rand(HOP_LENGTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return clicked


@dataclass(frozen=True)
class Activations:
    """Every submodule's input over windows of audio and their texts, and the keys and values of every attention.

    audio: (samples,), of the first window; mel: (audio, n_mels, 2 * n_audio_ctx); tokens: (batch, token).
    inputs: by submodule, its input. keys, values: by attention, (batch or audio, head, token, channel).
    """

    audio: Tensor
    mel: Tensor
    tokens: Tensor
    inputs: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    audio_features: Tensor

    def of(self, block: Block, names: list[str], layer: int, position: int) -> dict[str, Tensor]:
        """Returns the block's inputs by name. A decoder block sees the first `position` tokens at prefill, or at a step
        the token at `position` behind a cache of all before it: the decoder is causal, so one recording holds both."""
        path = block.path.format(audio_layer=layer, text_layer=layer)
        # Where a block is told the first token's position, it is not 0, which would not show that it was ignored.
        first = OFFSET if "offset" in names else 0
        tokens = slice(position, position + 1) if is_step(block) else slice(first, position)
        return {name: self.one(name, path, tokens) for name in names}

    def one(self, name: str, path: str, tokens: slice) -> Tensor:
        if name in ("audio", "mel", "audio_features"):
            return getattr(self, name)
        if name == "offset":
            return torch.tensor(tokens.start)
        if name == "positions":
            return torch.tensor([tokens.start + 1, tokens.stop - 1])
        if name == "tokens":
            return self.tokens[:, tokens]
        if name == "x":
            x = self.inputs["decoder.ln" if path == "decoder" else path]
            return x[:, tokens] if path.startswith("decoder") else x
        return self.key_value(name, path)

    def key_value(self, name: str, path: str) -> Tensor:
        """Returns what an input such as k_cache or v_cross names, or in a whole decoder k_cache.0, v_cross.1 and so on:
        (batch or audio, head, token, channel)."""
        kind, _, layer = name.partition(".")
        block = f"decoder.blocks.{layer}" if layer else path.removesuffix(".attn").removesuffix(".cross_attn")
        table = self.keys if kind.startswith("k") else self.values
        if kind.endswith("cross"):
            return table[f"{block}.cross_attn"]
        # Behind the cached tokens there are those still to come, which must not be heard.
        return table[f"{block}.attn"]


def is_step(block: Block) -> bool:
    """Tells whether the block takes one token behind a cache."""
    return TWINS[block.name].step


def speech(dims: ModelDimensions) -> tuple[Tensor, Tensor]:
    """Returns the first window of an English clip, (samples,), and its text with the prompt before it, (1, token)."""
    return window_of(next(clip for clip in CLIPS if "english-2" in clip["file"]), dims)


def window_of(clip: dict[str, Any], dims: ModelDimensions) -> tuple[Tensor, Tensor]:
    """Returns the first 30 s of a clip, (samples,), and prompt and text as the decoder sees them, (1, token)."""
    audio = torch.from_numpy(pad_or_trim(waveforms.read(FIXTURES / clip["file"])))
    tokenizer = tokenizer_of(dims, clip["language"])
    text = tokenizer.encode(" " + clip["text"])[: dims.n_text_ctx - N_PROMPT - 1]
    return audio, torch.tensor([[*tokenizer.sot_sequence_including_notimestamps, *text, tokenizer.eot]])


@contextmanager
def hooked(model: Whisper, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Puts every submodule's input and output into the dictionaries while this is open, in the order of computing."""

    def hook(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, given: tuple, output: object) -> None:
            inputs[name] = given[0]
            value = output[0] if isinstance(output, tuple) else output
            assert isinstance(value, Tensor)
            outputs[name] = value

        return keep

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield


@torch.no_grad()
def record(oracle: Whisper, audio: Tensor, tokens: Tensor) -> Activations:
    """Runs the oracle over windows of `audio` (audio, samples) and as many or a multiple of texts (batch, token)."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with hooked(oracle, inputs, outputs):
        mel = torch.stack([log_mel(oracle, 0, row.double())[0] for row in audio]).to(oracle.device)
        features = oracle.encoder(mel)
        shared = len(tokens) // len(audio)
        oracle.decoder(tokens.to(oracle.device), features.repeat_interleave(shared, 0))

    def heads(kind: str) -> dict[str, Tensor]:
        found = {name.removesuffix(f".{kind}"): x for name, x in outputs.items() if name.endswith(f"attn.{kind}")}
        return {
            name: split_heads(x[::shared] if "cross" in name else x, oracle.get_submodule(name).n_head)
            for name, x in found.items()
        }

    return Activations(audio[0], mel, tokens, inputs, heads("key"), heads("value"), features)


def recorded(oracle: Whisper, kind: str) -> Activations:
    """Records what a kind of inputs is taken from: activations of its audio, or for changed ones those of speech."""
    audio, tokens = speech(oracle.dims)
    prompt, text, end = tokens[:, :N_PROMPT], tokens[:, N_PROMPT:-1], tokens[:, -1:]
    if kind == BATCH:
        windows = torch.stack([AUDIO[kind](audio) for kind in WINDOWS])
        turned = [torch.cat([prompt, text.roll(by, 1), end], 1) for by in range(len(windows) * 3)]
        return record(oracle, windows, torch.cat(turned))
    if kind == END:
        room = oracle.dims.n_text_ctx - N_PROMPT - 1
        return record(oracle, audio[None], torch.cat([prompt, text.repeat(1, room)[:, :room], end], 1))
    return record(oracle, AUDIO[kind](audio)[None], tokens)


def source(kind: str) -> str:
    """Returns the kind whose recording the inputs of a kind are made from."""
    return "speech" if kind in (RANDOM, VOCABULARY, *SCALED) else kind


def changed(inputs: dict[str, Tensor], kind: str, n_vocab: int, seed: int) -> dict[str, Tensor]:
    """Returns recorded inputs as the kind has them: scaled, random, or as they are."""
    if kind in SCALED:
        return {name: x * SCALED[kind] if x.is_floating_point() else x for name, x in inputs.items()}
    if kind == VOCABULARY:
        n_token = inputs["tokens"].shape[1]
        tokens = torch.arange(math.ceil(n_vocab / n_token) * n_token) % n_vocab
        return {**inputs, "tokens": tokens.reshape(-1, n_token)}
    if kind != RANDOM:
        return inputs
    generator = torch.Generator().manual_seed(seed)
    return {
        name: x if name in ("offset", "positions") else random_like(x, n_vocab, generator) for name, x in inputs.items()
    }


def random_like(x: Tensor, n_vocab: int, generator: torch.Generator) -> Tensor:
    """Returns normal numbers of the RMS of x; where x holds tokens, tokens."""
    if x.is_floating_point():
        normal = torch.randn(x.shape, generator=generator)  # of float32, which costs a fifth of float64
        return normal.to(x) * x.square().mean().sqrt()
    return torch.randint(0, n_vocab, x.shape, generator=generator).to(x.device)


def kinds(block: Block, names: list[str]) -> tuple[str, ...]:
    """Returns the kinds of inputs that mean something for a block with inputs of these names."""
    if set(names) <= {"tokens", "offset"}:
        return ("speech", BATCH, END, VOCABULARY, RANDOM)
    others = {VOCABULARY, *([BATCH] if "audio" in names else []), *([] if TWINS[block.name].long_text else [END])}
    return tuple(kind for kind in KINDS if kind not in others)
