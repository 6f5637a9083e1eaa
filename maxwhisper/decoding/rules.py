"""openai-whisper's logit filters in graphs: which tokens may follow a text, and the likeliest of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from max.dtype import DType
from max.graph import BufferType, BufferValue, DeviceRef, TensorType, TensorValue, ops
from max.nn.layer import Module
from torch import Tensor
from whisper import decoding

from ..engine.program import Program

TOKEN_RULES = "token_rules"
"""The graph of the rules alone."""

CPU = DeviceRef.CPU()


def top_tokens(
    logits: TensorValue,
    texts: BufferValue,
    lengths: TensorValue,
    ends: TensorValue,
    totals: TensorValue,
    suppressed: TensorValue,
    begins: TensorValue,
    limits: TensorValue,
    places: TensorValue,
) -> list[TensorValue]:
    """Calls `maxwhisper.pick`, whose Mojo source says what goes in and out: logits (batch, token, vocab) and the rest,
    to candidates, their log-probabilities, tokens, totals, lengths, and how many more tokens the texts may have.

    places: (candidate,), of which only the length counts.
    """
    batch, device = logits.shape[0], logits.device
    shapes: list[tuple[DType, list[Any]]] = [
        (DType.int64, [batch, places.shape[0]]),
        (DType.float32, [batch, places.shape[0]]),
        (DType.int64, [batch, 1]),
        (DType.float32, [batch]),
        (DType.int64, [batch]),
        (DType.int64, [1]),
    ]
    types = [TensorType(dtype, shape, device) for dtype, shape in shapes]
    values = [texts, logits, lengths, ends, begins, totals, suppressed, limits]
    return [value.tensor for value in ops.inplace_custom("maxwhisper.pick", device, values, types)]


class NoWeights(Module):
    """A graph of operations alone."""

    def __call__(self) -> None:
        raise NotImplementedError


def rules_program() -> Program:
    """Returns the graph of the rules alone, for any vocabulary."""

    def pick(_: Module, logits: TensorValue, *others: Any) -> Sequence[TensorValue]:
        return top_tokens(ops.unsqueeze(logits, 1), *others)

    logits = TensorType(DType.float32, ["batch", "vocab"], CPU)
    return Program(TOKEN_RULES, "", NoWeights(), pick, {"logits": logits, **texts_inputs(), **rules_inputs("vocab")})


def texts_inputs(device: DeviceRef = CPU) -> dict[str, TensorType | BufferType]:
    """Returns how graphs take texts, to which `top_tokens` adds, and how long these may get."""
    return {
        "texts": BufferType(DType.int64, ["batch", "text_place"], device),
        "lengths": TensorType(DType.int64, ["batch"], device),
        "ends": TensorType(DType.int64, ["batch"], device),
        "totals": TensorType(DType.float32, ["batch"], device),
    }


def rules_inputs(n_vocab: int | str, device: DeviceRef = CPU) -> dict[str, TensorType | BufferType]:
    """Returns how graphs take what `top_tokens` takes beside logits and texts."""
    return {
        "suppressed": TensorType(DType.bool, [n_vocab], device),
        "begins": TensorType(DType.int64, ["batch"], device),
        "limits": TensorType(DType.int64, [2], device),
        "places": TensorType(DType.int64, ["candidate"], device),
    }


class Rules(NamedTuple):
    """The values of `rules_inputs`."""

    suppressed: Tensor
    begins: Tensor
    limits: Tensor
    places: Tensor

    @property
    def eot(self) -> int:
        """Returns the end of text."""
        return int(self.limits[1])

    @classmethod
    def joined(cls, rules: Sequence["Rules"]) -> "Rules":
        """Returns the rules of several tasks with the same filters, for all their texts."""
        first = rules[0]
        for each in rules:
            assert each.suppressed.equal(first.suppressed) and each.limits.equal(first.limits)
            assert len(each.places) == len(first.places)
        return first._replace(begins=torch.cat([each.begins for each in rules]))


class TokenRules:
    """openai-whisper's logit filters of one decoding task, in the form that the graph takes."""

    def __init__(self, n_vocab: int, sample_begin: int, eot: int):
        self.sample_begin = sample_begin
        self.eot = eot
        self.n_vocab = n_vocab
        self.timestamp_begin = n_vocab
        self.suppressed = torch.zeros(n_vocab, dtype=torch.bool)
        self.suppressed_first = torch.zeros(n_vocab, dtype=torch.bool)  # of the first token, beside the above

    @classmethod
    def of(cls, filters: Sequence[Any], n_vocab: int, sample_begin: int, eot: int) -> "TokenRules | None":
        """Returns the rules of some filters; None if there is one among them that is not openai-whisper's."""
        rules = cls(n_vocab, sample_begin, eot)
        for each in filters:
            if type(each) is decoding.SuppressBlank:
                rules.suppressed_first[[*each.tokenizer.encode(" "), each.tokenizer.eot]] = True
            elif type(each) is decoding.SuppressTokens:
                rules.suppressed[list(each.suppress_tokens)] = True
            elif type(each) is decoding.ApplyTimestampRules:
                rules._take_timestamps(each)
            else:
                return None
        rules.suppressed_first |= rules.suppressed
        return rules

    def _take_timestamps(self, rule: decoding.ApplyTimestampRules) -> None:
        self.timestamp_begin = rule.tokenizer.timestamp_begin
        if rule.tokenizer.no_timestamps is not None:
            self.suppressed[rule.tokenizer.no_timestamps] = True
        self.suppressed_first[: self.timestamp_begin] = True
        if rule.max_initial_timestamp_index is not None:
            self.suppressed_first[self.timestamp_begin + rule.max_initial_timestamp_index + 1 :] = True

    def inputs(self, tokens: Tensor, n_best: int) -> Rules:
        """Returns what graphs take beside logits and texts to find the `n_best` likeliest tokens behind the tokens
        (batch, token)."""
        suppressed = self.suppressed if tokens.shape[1] > self.sample_begin else self.suppressed_first
        begins = torch.full((len(tokens),), self.sample_begin)
        limits = torch.tensor([self.timestamp_begin, self.eot])
        return Rules(suppressed, begins, limits, torch.zeros(n_best, dtype=torch.int64))
