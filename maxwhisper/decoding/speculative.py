"""Greedy decoding by speculation: a draft, the decoder quantized, proposes the next tokens of texts one by one, and the
decoder verifies them all at once.

A step of the decoder waits for memory: for its weights, and for the keys and values of the audio. Several tokens in one
step read these once, but all except the first have to be proposed. The draft reads less than half as much, and is right
nearly always. A text gets nothing but what the decoder itself finds likeliest behind the tokens before, bit for bit:
behind the first wrong proposal the others are dropped.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from max.dtype import DType
from max.graph import BufferType, BufferValue, TensorType, TensorValue, ops
from max.nn.layer import Module
from torch import Tensor
from whisper.model import ModelDimensions

from ..engine.program import Program
from ..engine.session import Policy
from ..network.blocks import every_cross
from ..network.keys_values import by_layer
from ..network.model import TextDecoder
from ..network.products import DECODER_LAYERS
from .cache import SCALE_SIZE, KeyValueCache, named
from .cpu import CPUStepper, begun, finished, goes_on, inputs_of, next_tokens, rounds, state, steps_inputs
from .rules import NoWeights, Rules
from .stepper import Advanced, Graphs, Texts, check_room

SPECULATE, QUANTIZE_KEYS = "decoder.speculate", "decoder.quantize_keys"

N_PROPOSED = 7
"""Tokens that are proposed and then verified together with the one before: eight rows of a product for each text."""

WORTH_PROPOSING = 4
"""Tokens of every text for which a round of proposals takes less time than as many steps: if fewer are wanted, or come
of rounds, steps are better."""

WEIGHTS = tuple(f"{layer}.{kind}" for layer in DECODER_LAYERS for kind in ("weight", "bias"))
MATRICES = tuple(name for name in WEIGHTS if name.endswith(".weight") and "_ln" not in name)
VECTORS = tuple(name for name in WEIGHTS if name not in (*MATRICES, "attn.key.bias"))  # of which there is none
"""The weights of a layer as `maxwhisper.propose` takes them one behind the other."""

ZERO_POINT = 8
"""What stands for zero in four bits."""

ROWS = 4096
"""Rows of a matrix that are quantized at a time, so that little more memory is needed than for the outcome."""


# ---- the draft -----------------------------------------------------------------------------------------------------


def matrices_size(n_state: int) -> int:
    """Returns the size of a layer in int8, in bytes: six from state to state, and both of the MLP."""
    return 10 * n_state * (n_state + SCALE_SIZE) + n_state * (4 * n_state + SCALE_SIZE)


class Draft(NamedTuple):
    """A decoder's quantized copy: what of it a CPU has beside the decoder, once proposals are asked for.

    matrices: int8 (layer, number), vectors: float32 (layer, number), those of a layer one behind the other.
    token_embedding: uint8 (vocab, number), of four bits a number; the decoder's own computes the highest logits.
    """

    matrices: Any
    vectors: Any
    token_embedding: Any


def draft_types(dims: ModelDimensions, policy: Policy) -> Draft:
    """Returns how graphs take a draft: with each execution, so that it need not be there where nobody proposes."""
    n_layer, n_state = dims.n_text_layer, dims.n_text_state
    return Draft(
        TensorType(DType.int8, [n_layer, matrices_size(n_state)], policy.device),
        TensorType(DType.float32, [n_layer, 16 * n_state], policy.device),
        TensorType(DType.uint8, [dims.n_vocab, n_state // 2 + SCALE_SIZE], policy.device),
    )


def quantize(matrix: Tensor, bits: int, into: Tensor) -> None:
    """Writes a matrix (n_out, n_in) in 8 or 4 bits a number into int8 or uint8 (n_out, n_in * bits / 8 + SCALE_SIZE):
    behind each row stands the float32 that its numbers are multiples of. In 4 bits a byte holds a number of the first
    half of the row, and above it one of the second half, both ZERO_POINT too high."""
    width = into.shape[1] - SCALE_SIZE
    for packed, rows in zip(into.split(ROWS), matrix.split(ROWS), strict=True):
        exact = rows.float()
        scale = exact.abs().amax(1, True).clamp_min(torch.finfo(torch.float32).tiny) / (2 ** (bits - 1) - 1)
        whole = exact.div(scale).round_()
        if bits == 4:
            first, second = whole.add_(ZERO_POINT).to(torch.uint8).split(width, dim=1)
            whole = first + 16 * second
        packed[:, :width] = whole
        packed[:, width:] = scale.view(into.dtype)


def draft_of(tensors: Mapping[str, Tensor], dims: ModelDimensions) -> Draft:
    """Returns the draft of a checkpoint's decoder."""
    matrices = torch.empty(dims.n_text_layer, matrices_size(dims.n_text_state), dtype=torch.int8)
    layers = [f"decoder.blocks.{layer}." for layer in range(dims.n_text_layer)]
    for layer, row in zip(layers, matrices, strict=True):
        end = 0
        for name in MATRICES:
            matrix = tensors[layer + name]
            n_out, width = len(matrix), matrix.shape[1] + SCALE_SIZE
            start, end = end, end + n_out * width
            quantize(matrix, 8, row[start:end].view(n_out, width))
    token_embedding = torch.empty(dims.n_vocab, dims.n_text_state // 2 + SCALE_SIZE, dtype=torch.uint8)
    quantize(tensors["decoder.token_embedding.weight"], 4, token_embedding)
    vectors = [torch.cat([tensors[layer + name].float() for name in VECTORS]) for layer in layers]
    return Draft(matrices, torch.stack(vectors), token_embedding)


# ---- graphs --------------------------------------------------------------------------------------------------------


def propose(decoder: TextDecoder, draft: Draft, given: Mapping[str, Any]) -> TensorValue:
    """Returns the last token of each text and `N_PROPOSED` of the draft's, (batch, 1 + N_PROPOSED), which stand behind
    the text then. given: what the graph is given."""
    names = ("texts", "lengths", "begins", "suppressed", "limits", "rows", "cache", "quantized cross")
    values = [*(given[name] for name in names), *draft]
    values += [decoder.token_embedding.weight, decoder.positional_embedding, decoder.ln.weight, decoder.ln.bias]
    lengths, parameters = given["lengths"], {"n_channel": int(given["cache"].shape[-1])}
    tokens = TensorType(DType.int64, [lengths.shape[0], 1 + N_PROPOSED], lengths.device)
    return ops.inplace_custom("maxwhisper.propose", lengths.device, values, [tokens], parameters=parameters)[0].tensor


def draft_inputs(dims: ModelDimensions, policy: Policy) -> dict[str, TensorType]:
    """Returns how graphs take what the draft reads: the caches of texts, all in one, and the keys and values of their
    audio in int8, of both of which there may be more rows than texts; and the draft, as `draft_types` has it."""
    n_channel, n_head, n_kv = dims.n_text_state // dims.n_text_head, dims.n_text_head, 2 * dims.n_text_layer
    quantized: list[int | str] = [n_kv, "quantized_row", n_head, dims.n_audio_ctx, n_channel + SCALE_SIZE]
    return {
        "cache": TensorType(policy.compute, [n_kv, "row", n_head, "position", n_channel], policy.device),
        "quantized cross": TensorType(DType.int8, quantized, policy.device),
        **{f"draft {name}": type for name, type in draft_types(dims, policy)._asdict().items()},
    }


def quantize_keys_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Returns the graph that puts the keys and values of the audio into memory in int8, as the draft takes them, from a
    row on."""

    def quantize_keys(_: Module, into: BufferValue, row: TensorValue, **cross: TensorValue) -> list[TensorValue]:
        layers = by_layer(cross, dims.n_text_layer, "cross")
        for number, kv in enumerate(kv for layer in layers for kv in layer.values()):
            values = [into, kv, row, ops.constant([number], DType.int64, kv.device)]
            ops.inplace_custom("maxwhisper.quantize_keys", kv.device, values, [])
        return []

    into = draft_inputs(dims, policy)["quantized cross"].as_buffer()
    inputs: dict[str, TensorType | BufferType] = {"into": into, "row": TensorType(DType.int64, [1], policy.device)}
    inputs |= every_cross(dims, policy)
    return Program(QUANTIZE_KEYS, "", NoWeights(), quantize_keys, inputs)


def speculate_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Returns the graph of rounds of proposing and verifying: `N_PROPOSED` tokens behind every text, and what the
    decoder puts in their place, which is one token more if all are right. It goes on as long as every text may have
    `WORTH_PROPOSING` more, and rounds are worth it: credit begins with as many tokens, and a round adds what it gives
    and takes as many for each text that goes on.

    It gives what `select_tokens_program` gives, for the likeliest token of each step alone. Every text has audio of its
    own, and all have positions for `N_PROPOSED` tokens more than they may have.
    """

    def speculate(decoder: TextDecoder, **given: Any) -> Sequence[TensorValue]:
        draft = Draft(*(given[f"draft {name}"] for name in Draft._fields))

        def propose_and_verify(credit: TensorValue, before: TensorValue, totals: TensorValue) -> list[TensorValue]:
            now = {**given, "lengths": before, "totals": totals}
            _, totals, lengths, left = next_tokens(decoder, propose(decoder, draft, now), now)
            return [*goes_on(left, credit, before, lengths, WORTH_PROPOSING), lengths, totals]

        lengths, totals = rounds(WORTH_PROPOSING, [given["lengths"], given["totals"]], propose_and_verify)
        return [totals, lengths]

    inputs = {**steps_inputs(dims, policy), **draft_inputs(dims, policy)}
    del inputs["tokens"]
    return Program(SPECULATE, "decoder", TextDecoder(dims, policy), speculate, inputs)


# ---- the stepper ---------------------------------------------------------------------------------------------------


class Drafted(Graphs, Protocol):
    """Graphs, and the draft that they take."""

    @property
    def draft(self) -> Draft:
        """Returns what the graph of speculation takes."""


class SpeculativeStepper(CPUStepper):
    """Has tokens proposed and verified where that takes less time than steps."""

    graphs: Drafted

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor) -> Advanced:
        """Decodes texts as `CPUStepper` does, to the same tokens, or to fewer, if so few are left that others steps
        take less time."""
        check_room(int((texts.lengths + n_token).max()) - 1, self.n_text_ctx)
        # Where keys of proposals go there must be a position too.
        n_proposed = n_token.minimum(self.n_text_ctx + 1 - N_PROPOSED - texts.lengths)
        of_its_own = len(cache.cross[0]) == len(texts.tokens)
        if rules.n_best > 1 or not of_its_own or not worth_proposing(n_proposed, n_token):
            return super().advance(texts, cache, rules, n_token)
        advanced = self._propose(texts, cache, rules, n_token, n_proposed)
        gained = advanced.texts.lengths - texts.lengths
        idle = n_token == 0
        ended = (advanced.texts.last()[:, 0] == rules.eot) & ~idle
        if (
            ended.any()
            or not advanced.texts.totals.isfinite().all()
            or not worth_proposing(n_proposed - gained, n_token)
        ):
            return advanced
        return super().advance(advanced.texts, cache, rules, n_token - gained)

    def _propose(
        self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor, n_proposed: Tensor
    ) -> Advanced:
        now, candidates = begun(texts, n_token, N_PROPOSED, rules.eot), rules.inputs()
        given = {**state(now, n_token), **candidates, **inputs_of(cache)}
        given["ends"] = torch.where(n_token == 0, now.lengths + WORTH_PROPOSING, now.lengths + n_proposed)
        given |= {f"draft {name}": each for name, each in self.graphs.draft._asdict().items()}
        given |= {"cache": cache.memory, "quantized cross": cache.quantized(self._quantize)}
        totals, lengths = self.graphs[SPECULATE](**given)
        return finished(texts, now._replace(totals=totals, lengths=lengths), candidates, cache, n_token, rules.eot)

    def _quantize(self, cross: Sequence[Tensor], into: Tensor, row: int) -> None:
        """Puts keys and values of audio into `room_for_quantized`, from a row on."""
        self.graphs[QUANTIZE_KEYS](into=into, row=torch.tensor([row]), **named(cross=cross))


def worth_proposing(n_proposed: Tensor, n_token: Tensor) -> bool:
    """Returns whether every text that may have tokens may have enough for a round."""
    return int(n_proposed.masked_fill(n_token == 0, WORTH_PROPOSING).min()) >= WORTH_PROPOSING
