"""Greedy decoding by speculation: a rough copy of the decoder guesses the next tokens one by one, and the decoder
checks them all at once.

A step of the decoder waits for memory: for its weights, and for the keys and values of the audio. Several tokens in one
step read these once, but all except the first have to be guessed. The rough copy reads a third as much, and guesses
right nearly always. A text gets nothing but what the decoder itself finds likeliest behind the tokens before, bit for
bit: behind the first wrong guess the others are dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from max.dtype import DType
from max.graph import BufferType, BufferValue, Dim, Shape, TensorType, TensorValue, Weight, ops
from max.nn.layer import Module
from torch import Tensor
from whisper.model import ModelDimensions

from .decoding import NoWeights, append, likeliest, picking_inputs, rules_inputs
from .model import TextDecoder
from .runtime import Policy, Program

SPECULATE, ROUGH_KEYS = "decoder.speculate", "decoder.rough_keys"
"""Graphs that compile together with `maxwhisper.decoding.PICK`."""

N_GUESS = 7
"""Tokens that are guessed and then checked together with the one before: eight rows of a product in all, four of which
wait no longer for memory than one does."""

UNIT_SIZE = DType.float32.size_in_bytes
ROWS = 4096
"""Of a matrix that are made rough at a time, so that little more memory is needed than for the outcome."""


class Draft(TextDecoder):
    """The rough copy of a decoder: matrices of int8, and logits by a matrix of four bits a number, which the decoder's
    own makes exact where they are highest."""

    def __init__(self, dims: ModelDimensions, policy: Policy):
        super().__init__(dims, replace(policy, storage=DType.int8))
        shape = [dims.n_vocab, dims.n_text_state // 2 + UNIT_SIZE]
        self.token_embedding.weight = Weight("weight", DType.uint8, shape, policy.device)

    def rough_logits(self, x: TensorValue, token_embedding: Weight) -> TensorValue:
        """(batch, 1, state) to float32 logits (batch, 1, n_vocab)."""
        y = TensorType(DType.float32, [*x.shape[:2], token_embedding.shape[0]], x.device)
        inputs = [self.ln(x).cast(DType.float32), self.token_embedding.weight, token_embedding]
        return ops.custom("maxwhisper.rough_logits", x.device, inputs, [y])[0].tensor


class SpeculativeDecoder(Module):
    """The decoder and its rough copy."""

    def __init__(self, dims: ModelDimensions, policy: Policy):
        super().__init__()
        self.decoder = TextDecoder(dims, policy)
        self.draft = Draft(dims, policy)

    def __call__(self) -> None:
        raise NotImplementedError


def rough(matrix: Tensor, bits: int) -> Tensor:
    """A matrix (n_out, n_in) in 8 or 4 bits a number, as int8 or uint8; behind each row stands the float32 that its
    numbers are multiples of. In 4 bits a byte holds a number of the first half of the row, and above it one of the
    second half, both 8 too high."""
    n_out, n_in = matrix.shape
    greatest = 2 ** (bits - 1) - 1
    width = n_in * bits // 8
    packed = torch.empty(n_out, width + UNIT_SIZE, dtype=torch.int8 if bits == 8 else torch.uint8)
    for into, rows in zip(packed.split(ROWS), matrix.split(ROWS), strict=True):
        exact = rows.float()
        unit = exact.abs().amax(1, True).clamp_min(torch.finfo(torch.float32).tiny) / greatest
        whole = exact.div_(unit).round_()
        if bits == 4:
            first, second = whole.add_(8).to(torch.uint8).split(width, dim=1)
            whole = first + 16 * second
        into[:, :width] = whole
        into[:, width:] = unit.view(packed.dtype)
    return packed


def drafted(tensors: Mapping[str, Tensor], matrices: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a decoder, and those of its rough copy."""
    every = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("decoder."):
            bits = 4 if "token_embedding" in name else 8
            every[f"draft.{name.removeprefix('decoder.')}"] = rough(tensor, bits) if name in matrices else tensor
    return every


def rough_keys_program(dims: ModelDimensions, policy: Policy) -> Program:
    """The keys and values of the audio in int8, as the draft takes them."""

    def round_them(_: Module, *cross: TensorValue) -> list[TensorValue]:
        types = [TensorType(DType.int8, rough_shape(kv.shape), kv.device) for kv in cross]
        return [
            ops.custom("maxwhisper.rough_keys", kv.device, [kv], [type])[0].tensor
            for kv, type in zip(cross, types, strict=True)
        ]

    inputs = {name: type for name, type in picking_inputs(dims, policy).items() if "cross" in name}
    return Program(ROUGH_KEYS, "", NoWeights(), round_them, inputs)


def rough_shape(shape: Shape) -> list[Dim]:
    return [*shape[:-1], shape[-1] + UNIT_SIZE]


def speculation_program(dims: ModelDimensions, policy: Policy) -> Program:
    """As `maxwhisper.decoding.pick_program`, for the likeliest token of each step alone: as many times as there is
    room for them `N_GUESS` guesses, and what the decoder puts in their place, which is one token more if all are right.

    Takes the keys and values of the audio once more, as `rough_keys_program` gives them.
    """
    n_own, n_rule = 2 * dims.n_text_layer, len(rules_inputs(dims.n_vocab))

    def speculate(
        both: SpeculativeDecoder,
        tokens: TensorValue,
        n_step: TensorValue,
        texts: BufferValue,
        lengths: TensorValue,
        totals: TensorValue,
        *others: Any,
    ) -> Sequence[TensorValue]:
        rules, sources, others = others[:n_rule], others[n_rule], others[n_rule + 1 :]
        kv, caches, rough_cross = others[: 2 * n_own], others[2 * n_own : 3 * n_own], others[3 * n_own :]
        rough_kv = [*kv[:n_own], *rough_cross]
        none_left, n_row = (ops.constant(value, DType.int64, tokens.device) for value in (0, N_GUESS + 1))

        def guess_and_check(
            left: TensorValue, tokens: TensorValue, lengths: TensorValue, totals: TensorValue, *_: TensorValue
        ) -> list[TensorValue]:
            rows, ends = [tokens], lengths
            for _ in range(N_GUESS):
                x = both.decoder.embed(rows[-1], ends - 1)
                x, *new = both.draft.behind(x, ends - 1, rough_kv, sources)
                logits = both.draft.rough_logits(x, both.decoder.token_embedding.weight)
                append(caches, new, ends - 1)
                _, _, guess, _, ends, _ = likeliest(logits, texts, ends, totals, *rules)
                rows.append(guess)
            x = both.decoder.embed(ops.concat(rows, axis=1), lengths - 1)
            logits, *new = both.decoder.steps(x, lengths - 1, kv, sources)
            append(caches, new, lengths - 1)
            candidates, logprobs, tokens, totals, ends, stopped = likeliest(logits, texts, lengths, totals, *rules)
            left = ops.where(stopped.reshape(()), none_left, left - ops.max(ends - lengths, axis=0).reshape(()))
            return [left, tokens, ends, totals, candidates, logprobs]

        shape = (tokens.shape[0], rules[-1].shape[0])
        nothing = [ops.constant(0, dtype, tokens.device).broadcast_to(shape) for dtype in (DType.int64, DType.float32)]
        start = [n_step, tokens, lengths, totals, *nothing]
        _, _, lengths, totals, *found = ops.while_loop(start, lambda left, *_: left >= n_row, guess_and_check)
        return [*found, totals, lengths]

    inputs: dict[str, TensorType | BufferType] = picking_inputs(dims, policy)
    cross = {name: type for name, type in inputs.items() if "cross" in name}
    rough_inputs = {
        f"{name} rough": TensorType(DType.int8, rough_shape(type.shape), type.device) for name, type in cross.items()
    }
    return Program(SPECULATE, "", SpeculativeDecoder(dims, policy), speculate, inputs | rough_inputs)
