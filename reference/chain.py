"""All blocks in a row: how the error grows along the network, and where the first divergence starts.

The subject is one chain of MAX graphs from the waveform to the logits: log-mel, encoder, cross-attention's keys and
values, decoder over a text, one step behind it; each is fed what the one before it made. Oracle and peer run the same
way. Every submodule's output is judged under its name in the PyTorch model, in the order of computing. The first one
outside its budget is the first divergence: all that was fed to it was within.

To see inside a graph, every layer's output is made an output of the graph as well, which can change how the compiler
fuses. So the chain also runs on graphs without intermediates, as they transcribe: what comes out at their ends is what
is judged there, and it is said whether intermediates changed it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from whisper.model import Whisper

from maxwhisper.engine.program import Executable

from .activations import AUDIO, hooked, speech, window_of
from .blocks import TWINS, decoder_keys_values, log_mel
from .blocks import decoder as decoder_twin
from .intermediates import SUMS
from .judge import Comparison, Judgement, judge
from .suite import Suite

Outputs = dict[str, Tensor]
STEP = "step "
"""Stands before the names of what was computed at the step."""
ENDS = ("encoder", "decoder", STEP + "decoder")
"""What comes out at the end of the network's graphs."""


@dataclass(frozen=True)
class IntermediatesEffect:
    """What putting out intermediates did to an output of a graph. relative_l2: of the change, to the output without."""

    output: str
    identical: bool
    relative_l2: float


@dataclass(frozen=True)
class Chain:
    """The verdict on a whole network, submodule by submodule in the order of computing."""

    comparison: Comparison
    judgements: Mapping[str, Judgement]
    effects: tuple[IntermediatesEffect, ...]

    @property
    def passed(self) -> bool:
        return bool(self.judgements) and self.first_divergence is None

    @property
    def first_divergence(self) -> str | None:
        """Returns the first submodule whose inputs were within budget and whose output is not."""
        return next((name for name, judgement in self.judgements.items() if not judgement.passed), None)

    def __str__(self) -> str:
        lines = [f"{self.comparison}: {len(self.judgements)} submodules"]
        if self.first_divergence:
            lines += [f"first divergence: {self.first_divergence}", str(self.judgements[self.first_divergence])]
        lines += [
            f"intermediates changed {effect.output} by {effect.relative_l2:.1e} (relative L2)"
            for effect in self.effects
            if not effect.identical
        ]
        return "\n".join(lines)


def run_chain(suite: Suite, kind: str = "speech") -> Chain:
    """Judges the chain over one of the waveforms AUDIO and the text of "speech", the last token as the step."""
    audio, tokens = speech(suite.dims)
    graphs, waveform = suite.subject.graphs, AUDIO[kind](audio)
    inside = max_chain(suite, graphs, waveform, tokens)
    plain = max_chain(suite, graphs, waveform, tokens, intermediates=False)
    ours = inside | plain
    comparison = Comparison(suite.model.size, suite.dtype, "chain", 0, kind, suite.device)
    tensors = {"audio": waveform, "tokens": tokens, **ours}
    judgements = suite.recalled(comparison, tensors, lambda: [each for _, each in judge_chain(suite, kind, ours)])
    effects = tuple(effect(name, plain[name], inside[name]) for name in ENDS)
    return Chain(comparison, {each.comparison.block: each for each in judgements}, effects)


def first_divergence(suite: Suite, graphs: Mapping[str, Executable]) -> str | None:
    """Returns where the chain over speech first leaves its budget, with other graphs than the suite's own."""
    ours = max_chain(suite, graphs, *speech(suite.dims))
    return next((name for name, judgement in judge_chain(suite, "speech", ours) if not judgement.passed), None)


def judge_chain(suite: Suite, kind: str, ours: Outputs) -> Iterator[tuple[str, Judgement]]:
    """Yields name and verdict of every submodule, in the order of computing."""
    oracle, peer = references(suite, kind)
    for name, right in oracle.items():
        dtype = torch.float32 if name == "log_mel" else suite.dtype
        comparison = Comparison(suite.model.size, dtype, name, 0, f"chained, {kind}", suite.device)
        yield name, judge_chained(suite, comparison, right, peer[name], ours.get(name))


def teacher_forced(suite: Suite, clip: dict[str, Any]) -> Judgement:
    """Judges the chain over a clip's first window with its own text given: the logits of every next token."""
    audio, tokens = window_of(clip, suite.dims)
    ours = max_chain(suite, suite.subject.graphs, audio, tokens, intermediates=False)["decoder"]
    comparison = Comparison(suite.model.size, suite.dtype, "decoder.prefill", 0, clip["file"], suite.device)

    def judged() -> list[Judgement]:
        oracle = pytorch_logits(suite.model.oracle, audio, tokens, torch.float64)
        peer = pytorch_logits(suite.peer, audio, tokens, suite.dtype)
        return [judge_chained(suite, comparison, oracle, peer, ours)]

    (judgement,) = suite.recalled(comparison, {"audio": audio, "tokens": tokens, "logits": ours}, judged)
    return judgement


def judge_chained(suite: Suite, comparison: Comparison, oracle: Tensor, peer: Tensor, ours: Tensor | None) -> Judgement:
    unit = comparison.block.partition(".")[0]
    return judge(
        comparison,
        [oracle],
        [peer],
        [] if ours is None else [ours],
        longest_reduction=TWINS["decoder.prefill"].longest_reduction(suite.dims),
        roundings=TWINS[unit if unit in TWINS else "decoder.prefill"].roundings(suite.dims),
        n_vocab=suite.dims.n_vocab,
        chained=True,
    )


def references(suite: Suite, kind: str) -> tuple[Outputs, Outputs]:
    """Returns what oracle and peer make of a waveform, computed once: a fault changes only the subject."""
    if kind not in suite.chains:
        waveform, tokens = speech(suite.dims)
        audio = AUDIO[kind](waveform)
        oracle = pytorch_chain(suite.model.oracle, audio, tokens, torch.float64)
        suite.chains[kind] = oracle, pytorch_chain(suite.peer, audio, tokens, suite.dtype)
    return suite.chains[kind]


def effect(output: str, plain: Tensor, ours: Tensor) -> IntermediatesEffect:
    change = (ours.double() - plain.double()).norm() / plain.double().norm()
    return IntermediatesEffect(output, torch.equal(plain, ours), float(change))


@torch.no_grad()
def pytorch_chain(model: Whisper, audio: Tensor, tokens: Tensor, dtype: torch.dtype) -> Outputs:
    """Computes every submodule's output, under its name, with STEP before it for what the step computes."""
    mel = pytorch_mel(model, audio, dtype)
    values: Outputs = {"log_mel": mel}

    def part(prefix: str, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        inputs: Outputs = {}
        outputs: Outputs = {}
        with hooked(model, inputs, outputs):
            results = run()
        values.update(named(prefix, inputs, outputs))
        return results

    tokens = tokens.to(model.device)
    features = part("", lambda: [model.encoder(mel[None].to(model.device, dtype))])[0]
    cross = decoder_keys_values(model, 0, features)
    logits, *cache = part("", lambda: decoder_twin(model, 0, tokens[:, :-1], **layers("cross", cross)))
    values["decoder"] = logits
    kv = {"offset": length_of(cache)} | layers("cache", cache) | layers("cross", cross)
    values[STEP + "decoder"] = part(STEP, lambda: decoder_twin(model, 0, tokens[:, -1:], **kv))[0]
    return {name: value.cpu() for name, value in values.items()}


def pytorch_logits(model: Whisper, audio: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the logits (batch, token, vocab) behind all tokens but the last."""
    return logits_of(model, pytorch_mel(model, audio, dtype), tokens, dtype)


@torch.no_grad()
def logits_of(model: Whisper, mel: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the logits (batch, token, vocab) behind all tokens but the last, of a window's mel (n_mels, frame)."""
    features = model.encoder(mel[None].to(model.device, dtype))
    cross = layers("cross", decoder_keys_values(model, 0, features))
    return decoder_twin(model, 0, tokens[:, :-1].to(model.device), **cross)[0].cpu()


def pytorch_mel(model: Whisper, audio: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the log-mel spectrogram (n_mels, frame), in float32 at least."""
    return log_mel(model, 0, audio.to(torch.promote_types(dtype, torch.float32)))[0]


def length_of(cache: list[Tensor]) -> Tensor:
    """Returns how many tokens a full cache holds."""
    return torch.tensor(cache[0].shape[2])


def layers(kind: str, values: list[Tensor]) -> dict[str, Tensor]:
    """Returns keys and values of every layer in turn, by the names that BLOCKS gives them."""
    return {f"{'kv'[i % 2]}_{kind}.{i // 2}": value for i, value in enumerate(values)}


def named(prefix: str, inputs: Outputs, outputs: Outputs) -> Outputs:
    """Returns the outputs in order, each sum before the first submodule inside the one that it goes into."""
    values: Outputs = {}
    for name, value in outputs.items():
        for module, total in SUMS.items():
            if name.startswith(module + ".") and prefix + total not in values:
                values[prefix + total] = inputs[module]
        # PyTorch convolves (batch, channel, time), MAX (batch, time, channel).
        values[prefix + name] = value.transpose(1, 2) if name.startswith("encoder.conv") else value
    return values


def max_chain(
    suite: Suite, graphs: Mapping[str, Executable], audio: Tensor, tokens: Tensor, intermediates: bool = True
) -> Outputs:
    """Returns what MAX computes, as `pytorch_chain` names it: every layer's output, or without intermediates the
    log-mel spectrogram and ENDS."""
    values: Outputs = {}

    def part(block: str, prefix: str, **inputs: Tensor) -> list[Tensor]:
        names = suite.subject.intermediate_names(block) if intermediates else []
        results = graphs[f"{block} with intermediates" if intermediates else block](**inputs)
        n_output = len(results) - len(names)
        values.update({prefix + name: value.cpu() for name, value in zip(names, results[n_output:], strict=True)})
        values[prefix + block.partition(".")[0]] = results[0].cpu()
        return results[:n_output]

    values["log_mel"] = mel = graphs["log_mel"](audio=audio)[0]
    tokens = tokens.to(suite.torch_device)
    (features,) = part("encoder", "", mel=mel[None].to(suite.torch_device, suite.dtype))
    cross = layers("cross", graphs["decoder.keys_values"](audio_features=features))
    _, *cache = part("decoder.prefill", "", tokens=tokens[:, :-1], **cross)
    part("decoder.step", STEP, tokens=tokens[:, -1:], offset=length_of(cache), **layers("cache", cache), **cross)
    return values
