"""Decoding on a CPU: many steps in one execution, by kernels of our own.

A graph finds the likeliest tokens of each step, rules included, so that Python sees a handful of numbers in place of
a vocabulary of logits. The likeliest token is the next one, unless openai-whisper's beam search wants to choose.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from max.dtype import DType
from max.graph import BufferType, TensorType, TensorValue, ops
from torch import Tensor
from torch.nn import functional
from whisper.model import ModelDimensions

from ..engine.program import Program
from ..engine.session import Policy
from ..network.blocks import every_cache, every_cross, step_tokens
from ..network.keys_values import by_layer
from ..network.model import TextDecoder
from .cache import KeyValueCache, named
from .rules import Rules, rules_inputs, texts_inputs, top_tokens
from .stepper import Advanced, Candidates, Graphs, Texts, check_room

SELECT_TOKENS = "decoder.select_tokens"


# ---- graphs --------------------------------------------------------------------------------------------------------


def select_tokens_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Returns the graph of steps of the decoder, each of which puts the likeliest token behind every text that has not
    ended, and its keys and values into the cache, until one of these ends or is as long as it may get. It gives the
    texts' totals and their lengths, and writes the candidates of the last step.

    The texts may be of different lengths. Their caches are given twice, to be read and to be written: what is written
    is a position that is not read in the same step. The next step reads it, and comes after: its tokens are those of
    `top_tokens`, which as an in-place operation follows all that write into the caches.
    """

    def select_tokens(decoder: TextDecoder, tokens: TensorValue, **given: Any) -> Sequence[TensorValue]:
        def step(
            credit: TensorValue, before: TensorValue, totals: TensorValue, tokens: TensorValue
        ) -> list[TensorValue]:
            tokens, totals, lengths, left = next_tokens(decoder, tokens, {**given, "lengths": before, "totals": totals})
            return [*goes_on(left, credit, before, lengths, 1), lengths, totals, tokens]

        lengths, totals, _ = rounds(1, [given["lengths"], given["totals"], tokens], step)
        return [totals, lengths]

    return Program(SELECT_TOKENS, "decoder", TextDecoder(dims, policy), select_tokens, steps_inputs(dims, policy))


def steps_inputs(dims: ModelDimensions, policy: Policy) -> dict[str, TensorType | BufferType]:
    """Returns what graphs take that decode several steps."""
    caches = every_cache(dims, policy)
    return {
        **step_tokens(dims, policy),
        **texts_inputs(),
        **rules_inputs(dims.n_vocab),
        "rows": TensorType(DType.int64, ["batch", "position"], policy.device),
        **caches,
        **every_cross(dims, policy),
        **named(written=[each.as_buffer() for each in caches.values()]),
    }


def next_tokens(decoder: TextDecoder, tokens: TensorValue, given: Mapping[str, Any]) -> list[TensorValue]:
    """Returns what `top_tokens` makes of the decoder's logits for tokens (batch, token), the first of which is the last
    of each text, and puts their keys and values into the cache. given: what the graph is given."""
    x, offsets = embed_next(decoder, tokens, given["lengths"])
    logits, *new = decoder.steps(x, offsets, given["rows"], given)
    append(given, new, offsets)
    return top_tokens(logits, given)


def embed_next(decoder: TextDecoder, tokens: TensorValue, lengths: TensorValue) -> tuple[TensorValue, TensorValue]:
    """Embeds tokens (batch, token) the first of which is the last of a text of that length; also returns how many come
    before it, (batch,)."""
    token_embedding, positional_embedding = decoder.token_embedding.weight, decoder.positional_embedding
    x = TensorType(decoder.policy.compute, [*tokens.shape, token_embedding.shape[1]], tokens.device)
    values = [tokens, lengths, token_embedding, positional_embedding]
    embedded, offsets = ops.custom("maxwhisper.embed", tokens.device, values, [x, lengths.type])
    return embedded.tensor, offsets.tensor


def append(given: Mapping[str, Any], new: Sequence[TensorValue], offsets: TensorValue) -> None:
    """Puts every layer's new keys and values, each (batch, token, state), into its cache, behind `offsets` (batch,)
    positions. given: what the graph is given."""
    ks, vs = new[::2], new[1::2]
    for cache, k, v in zip(by_layer(given, len(ks), "written"), ks, vs, strict=True):
        values = [cache["k_written"], cache["v_written"], k, v, offsets]
        ops.inplace_custom("maxwhisper.append", offsets.device, values)


def goes_on(
    left: TensorValue, credit: TensorValue, before: TensorValue, lengths: TensorValue, worth: int
) -> list[TensorValue]:
    """Returns whether there is another round, and its credit: the graph of `maxwhisper.goes_on`."""
    device = lengths.device
    types = [TensorType(DType.bool, [1], device), credit.type]
    values = [left, credit, before, lengths, ops.constant([worth], DType.int64, device)]
    go_on, credit = (each.tensor for each in ops.custom("maxwhisper.goes_on", device, values, types))
    return [go_on.reshape(()), credit]


def rounds(worth: int, start: Sequence[TensorValue], body: Callable[..., Sequence[TensorValue]]) -> list[TensorValue]:
    """Returns what is left of `start` after as many rounds as are worth it, one at least. body: of the credit and these
    values, `goes_on` and the next ones."""
    device = start[0].device
    state = [ops.constant(True, DType.bool, device), ops.constant([worth], DType.int64, device), *start]
    _, _, *end = ops.while_loop(state, lambda go_on, *_: go_on, lambda _, *values: body(*values))
    return end


# ---- the stepper ---------------------------------------------------------------------------------------------------


class CPUStepper:
    """Takes texts further step by step, in one execution of `select_tokens_program`."""

    max_candidates = None
    tokens_first = False
    searches = False

    def __init__(self, graphs: Graphs, n_text_ctx: int):
        self.graphs = graphs
        self.n_text_ctx = n_text_ctx

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor) -> Advanced:
        """Decodes texts until one has ended, or has as many tokens more as it may have."""
        check_room(int((texts.lengths + n_token).max()) - 1, self.n_text_ctx)
        now, given = begun(texts, n_token, 0, rules.eot), rules.inputs()
        found = self.graphs[SELECT_TOKENS](tokens=now.last(), **state(now, n_token), **given, **inputs_of(cache))
        return finished(texts, now._replace(totals=found[0], lengths=found[1]), given, cache, n_token, rules.eot)


def begun(texts: Texts, n_token: Tensor, n_more: int, eot: int) -> Texts:
    """Returns texts as graphs take and change them: with room for `n_token` (batch,) tokens and `n_more` proposals.
    A text that gets none takes part as the end of text alone, to which nothing is added."""
    idle = n_token == 0
    tokens = functional.pad(texts.tokens, (0, int(n_token.max()) + n_more), value=eot)
    return Texts(tokens.masked_fill(idle[:, None], eot), texts.lengths.masked_fill(idle, 1), texts.totals)


def finished(
    texts: Texts, now: Texts, given: Mapping[str, Tensor], cache: KeyValueCache, n_token: Tensor, eot: int
) -> Advanced:
    """Returns what has become of texts that `begun` gave: without proposals behind them, idle ones as they were, and
    the candidates written into what the graph was given. The cache is as long as the longest."""
    idle = n_token == 0
    lengths = torch.where(idle, texts.lengths, now.lengths)
    before = functional.pad(texts.tokens, (0, now.tokens.shape[1] - texts.tokens.shape[1]), value=eot)
    tokens = torch.where(idle[:, None], before, now.tokens)[:, : int(lengths.max())]
    tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = eot
    cache.n_token = int(lengths.max()) - 1
    return Advanced(Texts(tokens, lengths, now.totals), Candidates(given["candidates"], given["logprobs"]))


def state(texts: Texts, n_token: Tensor) -> dict[str, Tensor]:
    """Returns the inputs of `texts_inputs`."""
    tokens, lengths, totals = texts
    return {"texts": tokens, "lengths": lengths, "ends": lengths + n_token, "totals": totals}


def inputs_of(cache: KeyValueCache) -> dict[str, Any]:
    """Returns the inputs that a cache is given as, to be read and to be written."""
    return {"rows": cache.rows, **cache.inputs(), **cache.written()}
