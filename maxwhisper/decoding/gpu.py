"""Decoding in the memory of a device: rules and caches stay there, and Python waits only now and then.

A GPU works on while Python goes on. One execution is one step of the decoder, which puts its token behind every text,
and its key and value into the cache; several are sent at once, and only then is asked what became of the texts. Beam
search asks after every step for the likeliest tokens, and which text goes on with which cache Python decides. On a CPU
`decoding.cpu` takes the steps, with kernels of its own.
"""

from collections.abc import Mapping, Sequence
from threading import local
from typing import Any

import torch
from max.driver import CPU, Buffer, Device
from max.dtype import DType
from max.graph import BufferType, TensorType, TensorValue, ops
from torch import Tensor
from torch.nn import functional
from whisper.model import ModelDimensions

from ..engine.program import Program, buffer, by_name
from ..engine.session import Policy
from ..network.keys_values import KeyValue, Slots
from ..network.model import TextDecoder
from ..network.shapes import grouped, indices
from .cache import CacheSlots, JoinedCache, KeyValueCache, named
from .cpu import SELECT_TOKENS, keys_values, written
from .rules import END_OF_TEXT, TIMESTAMP_BEGIN, Rules, rules_inputs, texts_inputs
from .stepper import Advanced, Candidates, Graphs, Texts, check_room

CANDIDATES = "decoder.candidates"
"""The graph of beam search, which compiles together with that of steps."""

MAX_CANDIDATES = 8
"""How many a step finds, one more than there can be beams."""

STATE = ("texts", "lengths", "totals", "logprobs")
"""What a step takes and gives."""

STEPS_AT_ONCE = 8
"""Before Python looks which texts have ended: what has ended meanwhile is computed on, half as many steps as a rule."""

NEVER = float("-inf")
EVERY_TOKEN = 2**31
"""More than any vocabulary has."""


def log_probabilities(
    logits: TensorValue,
    texts: TensorValue,
    lengths: TensorValue,
    begins: TensorValue,
    suppressed: TensorValue,
    limits: TensorValue,
) -> TensorValue:
    """Returns those of every next token (batch, vocab), by openai-whisper's rules: minus infinity for those excluded;
    not finite if a logit is NaN, or no token is left.

    By MAX's operations, for any device: what `maxwhisper.select_tokens` has inside, whose source says what goes in.
    logits: (batch, vocab).
    """
    begin, eot = (limits[at : at + 1] for at in (TIMESTAMP_BEGIN, END_OF_TEXT))
    tokens = ops.unsqueeze(indices(logits.shape[1], logits.device), 0)
    is_timestamp = tokens >= begin
    text_from, timestamps_from = rules_of_timestamps(texts, lengths, begins, begin, eot)
    allowed = ops.where(is_timestamp, tokens >= timestamps_from, tokens >= text_from) & ~ops.unsqueeze(suppressed, 0)
    scores = ops.where(allowed, logits, NEVER)
    timestamp_is_next = log_sum_exp(ops.where(is_timestamp, scores, NEVER)) > ops.max(
        ops.where(is_timestamp, NEVER, scores), axis=1
    )
    scores = ops.where(timestamp_is_next & ~is_timestamp, NEVER, scores)
    return scores - log_sum_exp(scores)


def log_sum_exp(x: TensorValue) -> TensorValue:
    """Returns that of (batch, n), (batch, 1); of minus infinity alone minus infinity, of anything with NaN in it
    NaN."""
    greatest = ops.max(x, axis=1)
    base = ops.where(greatest > NEVER, greatest, 0)
    # MAX's exponential of NaN is a number.
    return base + ops.log(ops.sum(ops.where(ops.is_nan(x), x, ops.exp(x - base)), axis=1))


def rules_of_timestamps(
    texts: TensorValue, lengths: TensorValue, begins: TensorValue, begin: TensorValue, eot: TensorValue
) -> tuple[TensorValue, TensorValue]:
    """Returns for every text, (batch, 1), the first token of text, and the first timestamp, that may follow."""
    places = ops.unsqueeze(indices(texts.shape[1], texts.device), 0)
    first, last = ops.unsqueeze(begins, 1), ops.unsqueeze(lengths - 1, 1)
    stamped = (texts >= begin) & (places >= first) & (places <= last)
    # The greatest of float32, which every device finds, and which holds all places.
    latest = ops.max(ops.where(stamped, places.cast(DType.float32), -1), axis=1).cast(DType.int64)
    timestamp, before_last = (at(texts, place) for place in (latest, last - 1))
    ends_in_timestamp = latest == last
    of_two = (last == first) | (before_last >= begin)  # the first token counts as the second of two
    timestamps_from = ops.where(of_two, EVERY_TOKEN, timestamp)
    timestamps_from = ops.where(ends_in_timestamp, timestamps_from, timestamp + 1)
    timestamps_from = ops.where(latest >= 0, timestamps_from, begin)
    return ops.where(ends_in_timestamp & ~of_two, eot, 0), timestamps_from


def at(x: TensorValue, place: TensorValue) -> TensorValue:
    """Returns what is at a place of each row of (batch, place), both (batch, 1); the first for a place before it."""
    return ops.unsqueeze(ops.gather_nd(x, ops.max(place, 0), batch_dims=1), 1)


def next_logits(decoder: TextDecoder, given: Mapping[str, Any]) -> tuple[TensorValue, TensorValue]:
    """Returns the last token of every text, (batch, 1), and the logits of the next, (batch, vocab). The last's key and
    value go into the cache, which is given twice, as `Slots` has it. given: what the graph is given."""
    texts, lengths = given["texts"], given["lengths"]
    kv, caches = keys_values(given), written(given)
    own, cross, into = (grouped(each, 2) for each in (kv[: len(caches)], kv[len(caches) :], caches))
    # A text as long as the cache has ended, and it does not matter where its last token is computed again.
    n_past = ops.min(lengths, int(decoder.positional_embedding.shape[0])) - 1
    pairs = zip(own, into, strict=True)
    slots = [Slots(k, v, k_written, v_written, n_past) for (k, v), (k_written, v_written) in pairs]
    last = at(texts, ops.unsqueeze(lengths - 1, 1))
    cross_kv = [KeyValue(*(ops.permute(x, [0, 2, 1, 3]) for x in pair)) for pair in cross]
    return last, ops.squeeze(decoder.step_in_place(last, cross_kv, slots), 1)


def next_log_probabilities(logits: TensorValue, given: Mapping[str, Any]) -> TensorValue:
    """Returns `log_probabilities` of what a graph is given."""
    names = ("texts", "lengths", "begins", "suppressed", "limits")
    return log_probabilities(logits, *(given[name] for name in names))


def step_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Returns the graph of a step of the decoder, from texts, their lengths, the sums of their tokens'
    log-probabilities and the latest of these to the same: the likeliest token behind every text that has not ended, is
    not as long as it may get, and has had no log-probability that is not finite."""

    def step(decoder: TextDecoder, **given: Any) -> list[TensorValue]:
        texts, lengths, totals, logprobs = (given[name] for name in STATE)
        last, logits = next_logits(decoder, given)
        scores = next_log_probabilities(logits, given)
        token = ops.argmax(scores, axis=1)
        logprob = ops.squeeze(at(scores, token), 1)  # the greatest of what is not finite may be finite
        failed = ops.is_nan(logprobs) | ops.is_inf(logprobs)
        goes_on = (
            (ops.squeeze(last, 1) != given["limits"][END_OF_TEXT : END_OF_TEXT + 1])
            & (lengths < given["ends"])
            & ~failed
        )
        places = ops.unsqueeze(indices(texts.shape[1], texts.device), 0)
        is_next = (places == ops.unsqueeze(lengths, 1)) & ops.unsqueeze(goes_on, 1)
        return [
            ops.where(is_next, token, texts),
            lengths + goes_on.cast(DType.int64),
            totals + ops.where(goes_on, logprob, 0),
            ops.where(goes_on, logprob, logprobs),
        ]

    types = inputs(dims, policy, (*STATE, "ends"))
    return Program(SELECT_TOKENS, "decoder", TextDecoder(dims, policy), by_name(types, step), types)


def candidates_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Returns the graph for beam search: the MAX_CANDIDATES likeliest tokens behind every text, and their
    log-probabilities, in falling order."""

    def candidates(decoder: TextDecoder, **given: Any) -> tuple[TensorValue, TensorValue]:
        _, logits = next_logits(decoder, given)
        logprobs, tokens = ops.top_k(next_log_probabilities(logits, given), MAX_CANDIDATES)
        return ops.max(tokens, 0), logprobs  # a GPU may know no token for minus infinity

    types = inputs(dims, policy, ("texts", "lengths"))
    return Program(CANDIDATES, "decoder", TextDecoder(dims, policy), by_name(types, candidates), types)


def inputs(dims: ModelDimensions, policy: Policy, state: Sequence[str]) -> dict[str, TensorType | BufferType]:
    """Returns the inputs of both programs. Keys and values are (row, token, head, channel), as kernels for GPUs take
    them."""
    device, n_head = policy.device, dims.n_text_head
    n_channel = dims.n_text_state // n_head
    layers = range(2 * dims.n_text_layer)
    own = TensorType(policy.compute, ["batch", "position", n_head, n_channel], device)
    cross = TensorType(policy.compute, ["audio", dims.n_audio_ctx, n_head, n_channel], device)
    kv = named([own for _ in layers], [cross for _ in layers])
    given = {**texts_inputs(device), **rules_inputs(dims.n_vocab, device)}
    given["texts"] = TensorType(DType.int64, ["batch", "capacity"], device)  # which is not written into
    given["logprobs"] = TensorType(DType.float32, ["batch"], device)
    return {
        **{name: given[name] for name in (*state, "suppressed", "begins", "limits")},
        **kv,
        **{f"{name} written": each.as_buffer() for name, each in kv.items() if "cache" in name},
    }


# ---- the stepper ---------------------------------------------------------------------------------------------------


class GPUStepper:
    """Takes texts further in the memory of a device: Python waits only now and then."""

    max_candidates = MAX_CANDIDATES
    tokens_first = True

    def __init__(self, graphs: Graphs, dims: ModelDimensions, device: Device):
        self.graphs = graphs
        self.dims = dims
        self.device = device
        self.of_thread = SlotsOfThread()

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor) -> Advanced:
        """Decodes texts by at most STEPS_AT_ONCE tokens of the likeliest ones, or by one with several candidates."""
        check_room(int((texts.lengths + n_token).max()) - 1, self.dims.n_text_ctx)
        in_slots = cache if isinstance(cache, JoinedCache) else self._in_slots(cache)
        eot, n_free, n_best = rules.eot, self.dims.n_text_ctx + 1 - texts.tokens.shape[1], rules.n_best
        tokens = functional.pad(texts.tokens, (0, n_free), value=eot)
        of_rules = self._there(suppressed=rules.suppressed, begins=rules.begins, limits=rules.limits)
        given = {**of_rules, **in_slots.inputs(), **in_slots.written()}
        if n_best > 1:
            graph = self.graphs[CANDIDATES]
            here = self._there(texts=tokens, lengths=texts.lengths)
            found = back(graph.execute(*graph.in_order({**here, **given})))
            best, logprobs = (each[:, :n_best] for each in found)
            tokens = tokens.scatter(1, texts.lengths[:, None], best[:, :1])
            lengths, totals = texts.lengths + 1, texts.totals + logprobs[:, 0]
        else:
            tokens, lengths, totals, latest = self._steps(texts._replace(tokens=tokens), n_token, given)
            best, logprobs = tokens.gather(1, lengths[:, None] - 1), latest[:, None]
        cache.n_token = int(lengths.max()) - 1
        return Advanced(Texts(tokens[:, : int(lengths.max())], lengths, totals), Candidates(best, logprobs))

    def _steps(self, texts: Texts, n_token: Tensor, given: Mapping[str, Buffer]) -> list[Tensor]:
        graph = self.graphs[SELECT_TOKENS]
        no_logprobs = torch.zeros(len(texts.tokens), dtype=torch.float32)
        state = self._there(**texts._asdict(), logprobs=no_logprobs)
        state["texts"] = state.pop("tokens")
        ends = self._there(ends=texts.lengths + n_token)
        for _ in range(min(int(n_token.max()), STEPS_AT_ONCE)):
            latest = graph.execute(*graph.in_order({**state, **ends, **given}))
            state = dict(zip(STATE, latest, strict=True))
        return back([state[name] for name in STATE])

    def _there(self, **tensors: Tensor) -> dict[str, Buffer]:
        return {name: buffer(x).to(self.device) for name, x in tensors.items()}

    def _in_slots(self, cache: KeyValueCache) -> JoinedCache:
        """Returns the cache in the memory that kernels take: that of the thread's one before, if it fits."""
        cache.settle()
        room, wanted = ([kv.shape for kv in (*each.own, *each.cross)] for each in (self.of_thread.slots, cache))
        if room not in ([], wanted):
            self.of_thread.slots = CacheSlots(1, tokens_first=True)
        self.of_thread.slots.place([cache])
        return self.of_thread.slots.joined(1)


class SlotsOfThread(local):
    """What every thread has for itself, as others may use the same model at the same time: room for one window."""

    def __init__(self) -> None:
        self.slots = CacheSlots(1, tokens_first=True)


def back(buffers: Sequence[Buffer]) -> list[Tensor]:
    """Returns what is in buffers of a device."""
    return [torch.from_dlpack(x.to(CPU())) for x in buffers]
