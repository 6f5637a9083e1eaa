"""openai-whisper's logit filters in graphs: which tokens may follow a text, and the likeliest of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from max.dtype import DType
from max.graph import BufferType, DeviceRef, Dim, TensorType, TensorValue, ops
from max.nn.layer import Module
from torch import Tensor
from whisper import decoding

from ..engine.program import Program

TOKEN_RULES = "token_rules"
"""The graph of the rules alone."""

CPU = DeviceRef.CPU()

TIMESTAMP_BEGIN, END_OF_TEXT = 0, 1
"""Where in the limits that graphs take these two tokens are."""


def top_tokens(logits: TensorValue, given: Mapping[str, Any]) -> list[TensorValue]:
    """Selects the likeliest next tokens by `maxwhisper.select_tokens`, whose Mojo source says what goes in and out.

    logits: (batch, token, vocab). given: `texts_inputs` and `rules_inputs` by name, and maybe others.
    Returns the last tokens, totals, lengths, and how many more tokens the texts may have. Candidates and their
    log-probabilities are written into the buffers that are given for them.
    """
    batch, device = logits.shape[0], logits.device
    shapes = [(DType.int64, [batch, 1]), (DType.float32, [batch]), (DType.int64, [batch]), (DType.int64, [1])]
    types = [TensorType(dtype, shape, device) for dtype, shape in shapes]
    values = [logits, *(given[name] for name in (*texts_inputs(), *rules_inputs(logits.shape[2])))]
    return [value.tensor for value in ops.inplace_custom("maxwhisper.select_tokens", device, values, types)]


class NoWeights(Module):
    """A graph of operations alone."""

    def __call__(self) -> None:
        raise NotImplementedError


def rules_program() -> Program:
    """Returns the graph of the rules alone, for any vocabulary."""

    def select_tokens(_: Module, logits: TensorValue, **given: Any) -> Sequence[TensorValue]:
        return top_tokens(ops.unsqueeze(logits, 1), given)

    logits = TensorType(DType.float32, ["batch", "vocab"], CPU)
    inputs = {"logits": logits, **texts_inputs(), **rules_inputs("vocab")}
    return Program(TOKEN_RULES, "", NoWeights(), select_tokens, inputs)


def texts_inputs(device: DeviceRef = CPU) -> dict[str, TensorType | BufferType]:
    """Returns what `top_tokens` takes of texts, to which it adds, and how long they may get: all in the order in which
    the kernel takes it."""
    return {
        "texts": BufferType(DType.int64, ["batch", "capacity"], device),
        "lengths": TensorType(DType.int64, ["batch"], device),
        "ends": TensorType(DType.int64, ["batch"], device),
        "totals": TensorType(DType.float32, ["batch"], device),
    }


def rules_inputs(n_vocab: int | str | Dim, device: DeviceRef = CPU) -> dict[str, TensorType | BufferType]:
    """Returns what `top_tokens` takes beside logits and texts: the rules, and where it writes candidates."""
    return {
        "suppressed": TensorType(DType.bool, [n_vocab], device),
        "begins": TensorType(DType.int64, ["batch"], device),
        "limits": TensorType(DType.int64, [2], device),
        "candidates": BufferType(DType.int64, ["batch", "candidate"], device),
        "logprobs": BufferType(DType.float32, ["batch", "candidate"], device),
    }


class Rules(NamedTuple):
    """The rules of `rules_inputs`, and how many candidates are wanted for each text.

    wanted: of beam search that a stepper is to do by itself, (window,), how many texts of each window are to end.
    """

    suppressed: Tensor
    begins: Tensor
    limits: Tensor
    n_best: int
    wanted: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Returns the values of `rules_inputs`, room for candidates among them."""
        candidates = self.begins.new_empty((len(self.begins), self.n_best))
        logprobs = torch.empty_like(candidates, dtype=torch.float32)
        rules = {"suppressed": self.suppressed, "begins": self.begins, "limits": self.limits}
        return {**rules, "candidates": candidates, "logprobs": logprobs}

    @property
    def eot(self) -> int:
        """Returns the end of text."""
        return int(self.limits[END_OF_TEXT])

    @classmethod
    def joined(cls, rules: Sequence["Rules"]) -> "Rules":
        """Returns the rules of several tasks with the same filters, for all their texts."""
        first = rules[0]
        for each in rules:
            assert each.suppressed.equal(first.suppressed) and each.limits.equal(first.limits)
            assert each.n_best == first.n_best
        wanted = None if first.wanted is None else torch.cat([each.wanted for each in rules if each.wanted is not None])
        return first._replace(begins=torch.cat([each.begins for each in rules]), wanted=wanted)


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
        """Returns the rules by which to find the `n_best` likeliest tokens behind the tokens (batch, token)."""
        suppressed = self.suppressed if tokens.shape[1] > self.sample_begin else self.suppressed_first
        begins = torch.full((len(tokens),), self.sample_begin)
        limits = torch.tensor([self.timestamp_begin, self.eot])  # in the order of TIMESTAMP_BEGIN, END_OF_TEXT
        return Rules(suppressed, begins, limits, n_best)
