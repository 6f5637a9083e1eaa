"""Greedy decoding by speculation: a rough copy of the decoder, the draft, guesses the next tokens of texts one by one,
and the decoder checks them all at once.

A step of the decoder waits for memory: for its weights, and for the keys and values of the audio. Several tokens in one
step read these once, but all except the first have to be guessed. The draft reads less than half as much, and guesses
right nearly always. A text gets nothing but what the decoder itself finds likeliest behind the tokens before, bit for
bit: behind the first wrong guess the others are dropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from max.dtype import DType
from max.graph import BufferType, BufferValue, TensorType, TensorValue, ops
from max.nn.layer import Module
from torch import Tensor
from whisper.model import ModelDimensions

from ..engine.program import Program
from ..engine.session import Policy
from ..network.model import TextDecoder
from .loop import append, embed_next, goes_on, nothing_found, rounds
from .openai_loop import NoWeights, likeliest, picking_inputs, rules_inputs

SPECULATE, ROUGH_KEYS = "decoder.speculate", "decoder.rough_keys"

N_GUESS = 7
"""Tokens that are guessed and then checked together with the one before: eight rows of a product for each text."""

WORTH_GUESSING = 4
"""Tokens of every text for which a round of guesses takes less time than as many steps: if fewer are wanted, or come of
rounds, steps are better."""

MATRICES = ("attn.query", "attn.key", "attn.value", "attn.out", "cross_attn.query", "cross_attn.out", "mlp.0", "mlp.2")
VECTORS = (
    *("attn_ln.weight", "attn_ln.bias", "attn.query.bias", "attn.value.bias", "attn.out.bias"),
    *("cross_attn_ln.weight", "cross_attn_ln.bias", "cross_attn.query.bias", "cross_attn.out.bias"),
    *("mlp_ln.weight", "mlp_ln.bias", "mlp.0.bias", "mlp.2.bias"),
)
"""Of a layer, as `maxwhisper.guess` takes them one behind the other."""

UNIT_SIZE = DType.float32.size_in_bytes
ROWS = 4096
"""Of a matrix that are made rough at a time, so that little more memory is needed than for the outcome."""


# ---- the draft -----------------------------------------------------------------------------------------------------


def matrices_size(n_state: int) -> int:
    """Of a layer in int8, in bytes: six from state to state, and both of the MLP."""
    return 10 * n_state * (n_state + UNIT_SIZE) + n_state * (4 * n_state + UNIT_SIZE)


class Draft(NamedTuple):
    """A decoder's rough copy: what of it a CPU has beside the decoder, once guesses are asked for.

    matrices: int8 (layer, number), vectors: float32 (layer, number), those of a layer one behind the other.
    token_embedding: uint8 (vocab, number), of four bits a number; the decoder's own computes the highest logits.
    """

    matrices: Any
    vectors: Any
    token_embedding: Any


def draft_types(dims: ModelDimensions, policy: Policy) -> Draft:
    """How graphs take a draft: with each execution, so that it need not be there where nobody guesses."""
    n_layer, n_state = dims.n_text_layer, dims.n_text_state
    return Draft(
        TensorType(DType.int8, [n_layer, matrices_size(n_state)], policy.device),
        TensorType(DType.float32, [n_layer, 16 * n_state], policy.device),
        TensorType(DType.uint8, [dims.n_vocab, n_state // 2 + UNIT_SIZE], policy.device),
    )


def guess(
    decoder: TextDecoder,
    draft: Draft,
    texts: BufferValue,
    lengths: TensorValue,
    rules: Sequence[TensorValue],
    sources: TensorValue,
    cache: TensorValue,
    rough_cross: TensorValue,
) -> TensorValue:
    """The last token of each text and `N_GUESS` guesses, (batch, 1 + N_GUESS), which stand behind the text then."""
    suppressed, begins, limits, _ = rules
    values = [texts, lengths, begins, suppressed, limits, sources, cache, rough_cross, *draft]
    values += [decoder.token_embedding.weight, decoder.positional_embedding, decoder.ln.weight, decoder.ln.bias]
    tokens = TensorType(DType.int64, [lengths.shape[0], 1 + N_GUESS], lengths.device)
    parameters = {"n_channel": int(cache.shape[-1])}
    return ops.inplace_custom("maxwhisper.guess", lengths.device, values, [tokens], parameters=parameters)[0].tensor


def make_rough(matrix: Tensor, bits: int, into: Tensor) -> None:
    """Writes a matrix (n_out, n_in) in 8 or 4 bits a number into int8 or uint8 (n_out, n_in * bits / 8 + UNIT_SIZE):
    behind each row stands the float32 that its numbers are multiples of. In 4 bits a byte holds a number of the first
    half of the row, and above it one of the second half, both 8 too high."""
    width = into.shape[1] - UNIT_SIZE
    for packed, rows in zip(into.split(ROWS), matrix.split(ROWS), strict=True):
        exact = rows.float()
        unit = exact.abs().amax(1, True).clamp_min(torch.finfo(torch.float32).tiny) / (2 ** (bits - 1) - 1)
        whole = exact.div(unit).round_()
        if bits == 4:
            first, second = whole.add_(8).to(torch.uint8).split(width, dim=1)
            whole = first + 16 * second
        packed[:, :width] = whole
        packed[:, width:] = unit.view(into.dtype)


def draft_of(tensors: Mapping[str, Tensor], dims: ModelDimensions) -> Draft:
    """The draft of a checkpoint's decoder."""
    matrices = torch.empty(dims.n_text_layer, matrices_size(dims.n_text_state), dtype=torch.int8)
    layers = [f"decoder.blocks.{layer}." for layer in range(dims.n_text_layer)]
    for layer, row in zip(layers, matrices, strict=True):
        end = 0
        for name in MATRICES:
            matrix = tensors[f"{layer}{name}.weight"]
            n_out, width = len(matrix), matrix.shape[1] + UNIT_SIZE
            start, end = end, end + n_out * width
            make_rough(matrix, 8, row[start:end].view(n_out, width))
    token_embedding = torch.empty(dims.n_vocab, dims.n_text_state // 2 + UNIT_SIZE, dtype=torch.uint8)
    make_rough(tensors["decoder.token_embedding.weight"], 4, token_embedding)
    vectors = [torch.cat([tensors[layer + name].float() for name in VECTORS]) for layer in layers]
    return Draft(matrices, torch.stack(vectors), token_embedding)


# ---- its graphs ----------------------------------------------------------------------------------------------------


def draft_inputs(dims: ModelDimensions, policy: Policy) -> tuple[TensorType, TensorType]:
    """The caches of texts, all in one, and the keys and values of their audio in int8; there may be more rows than
    texts."""
    n_channel = dims.n_text_state // dims.n_text_head
    n_kv = 2 * dims.n_text_layer
    cache = TensorType(policy.compute, [n_kv, "row", dims.n_text_head, "place", n_channel], policy.device)
    shape: list[int | str] = [n_kv, "rough_row", dims.n_text_head, dims.n_audio_ctx, n_channel + UNIT_SIZE]
    return cache, TensorType(DType.int8, shape, policy.device)


def rough_room(cross: Sequence[Tensor], n_row: int) -> Tensor:
    """For as many windows' keys and values in int8."""
    _, n_head, n_key, n_channel = cross[0].shape
    return torch.empty((len(cross), n_row, n_head, n_key, n_channel + UNIT_SIZE), dtype=torch.int8)


def rough_keys_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Puts the keys and values of the audio into memory in int8, as the draft takes them, from a row on."""

    def round_them(_: Module, into: BufferValue, row: TensorValue, *cross: TensorValue) -> list[TensorValue]:
        for number, kv in enumerate(cross):
            values = [into, kv, row, ops.constant([number], DType.int64, kv.device)]
            ops.inplace_custom("maxwhisper.rough_keys", kv.device, values, [])
        return []

    inputs: dict[str, TensorType | BufferType] = {"into": draft_inputs(dims, policy)[1].as_buffer()}
    inputs["row"] = TensorType(DType.int64, [1], policy.device)
    inputs |= {name: each for name, each in picking_inputs(dims, policy).items() if "cross" in name}
    return Program(ROUGH_KEYS, "", NoWeights(), round_them, inputs)


def speculation_program(dims: ModelDimensions, policy: Policy) -> Program:
    """As `pick_program`, for the likeliest token of each step alone: `N_GUESS` guesses behind every text, and what the
    decoder puts in their place, which is one token more if all are right. It goes on as long as every text may have
    `WORTH_GUESSING` more, and rounds are worth it: credit begins with as many tokens, and a round adds what it
    gives and takes as many for each text that goes on.

    Takes `draft_inputs` besides, the same caches once more, and the draft, and not the texts' last tokens. Every
    text has audio of its own, and all have places for `N_GUESS` tokens more than they may have.
    """
    n_own, n_rule = 2 * dims.n_text_layer, len(rules_inputs(dims.n_vocab))
    types = draft_types(dims, policy)

    def speculate(
        decoder: TextDecoder,
        texts: BufferValue,
        lengths: TensorValue,
        ends: TensorValue,
        totals: TensorValue,
        *others: Any,
    ) -> Sequence[TensorValue]:
        others, draft = others[: -len(types)], Draft(*others[-len(types) :])
        rules, (sources, *kv), caches = others[:n_rule], others[n_rule : -n_own - 2], others[-n_own - 2 : -2]

        def guess_and_check(
            credit: TensorValue, before: TensorValue, totals: TensorValue, *_: Any
        ) -> list[TensorValue]:
            tokens = guess(decoder, draft, texts, before, rules, sources, *others[-2:])
            x, offsets = embed_next(decoder, tokens, before)
            logits, *new = decoder.steps(x, offsets, kv, sources)
            append(caches, new, offsets)
            candidates, logprobs, _, *after = likeliest(logits, texts, before, ends, totals, *rules)
            totals, lengths, left = after
            return [*goes_on(left, credit, before, lengths, WORTH_GUESSING), lengths, totals, candidates, logprobs]

        start = [lengths, totals, *nothing_found(lengths, rules[-1])]
        lengths, totals, *found = rounds(WORTH_GUESSING, start, guess_and_check)
        return [*found, totals, lengths]

    inputs = picking_inputs(dims, policy)
    del inputs["tokens"]
    inputs |= dict(zip(("cache", "rough cross"), draft_inputs(dims, policy), strict=True))
    inputs |= {f"draft {name}": type for name, type in types._asdict().items()}
    return Program(SPECULATE, "decoder", TextDecoder(dims, policy), speculate, inputs)
