"""Decoding in the memory of a device: rules and caches stay there, and Python waits only now and then.

A GPU works on while Python goes on. One execution is one step of the decoder, which puts its token behind every text,
and its key and value into the cache; several are sent at once, and only then is asked what became of the texts. Beam
search asks after every step for the likeliest tokens, and which text goes on with which cache Python decides. On a CPU
`maxwhisper.decoding.openai_loop` takes the steps, with kernels of its own.
"""

from collections.abc import Sequence
from typing import Any

from max.dtype import DType
from max.graph import BufferType, TensorType, TensorValue, ops
from whisper.model import ModelDimensions

from ..engine.program import Program
from ..engine.session import Policy
from ..network.model import KeyValue, Slots, TextDecoder, flash_dtype, grouped, indices
from .openai_loop import N_BEST, PICK

CANDIDATES = "decoder.candidates"
"""The graph of beam search, which compiles together with that of steps."""

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
    """Of every next token (batch, vocab), by openai-whisper's rules: minus infinity for those excluded; not finite if a
    logit is NaN, or no token is left.

    By MAX's operations, for any device: what `maxwhisper.pick` has inside, whose Mojo source says what goes in. logits:
    (batch, vocab).
    """
    begin, eot = limits[0:1], limits[1:2]
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
    """Of (batch, n), (batch, 1); of minus infinity alone minus infinity, of anything with NaN in it NaN."""
    greatest = ops.max(x, axis=1)
    base = ops.where(greatest > NEVER, greatest, 0)
    # MAX's exponential of NaN is a number.
    return base + ops.log(ops.sum(ops.where(ops.is_nan(x), x, ops.exp(x - base)), axis=1))


def rules_of_timestamps(
    texts: TensorValue, lengths: TensorValue, begins: TensorValue, begin: TensorValue, eot: TensorValue
) -> tuple[TensorValue, TensorValue]:
    """For every text, (batch, 1): the first token of text, and the first timestamp, that may follow."""
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
    """What is at a place of each row of (batch, place), both (batch, 1); the first for a place before it."""
    return ops.unsqueeze(ops.gather_nd(x, ops.max(place, 0), batch_dims=1), 1)


def next_logits(
    decoder: TextDecoder, texts: TensorValue, lengths: TensorValue, kv: Sequence[Any]
) -> tuple[TensorValue, TensorValue]:
    """The last token of every text, (batch, 1), and the logits of the next, (batch, vocab). The key and value of the
    last go into the cache, which is given twice, as `Slots` has it."""
    n_own = len(kv) // 3
    own, cross, written = (grouped(kv[i : i + n_own], 2) for i in range(0, len(kv), n_own))
    # A text as long as the cache has ended, and it does not matter where its last token is computed again.
    n_past = ops.min(lengths, int(decoder.positional_embedding.shape[0])) - 1
    mask = mask_behind(n_past, own[0][0])
    pairs = zip(own, written, strict=True)
    slots = [Slots(k, v, k_written, v_written, n_past, mask) for (k, v), (k_written, v_written) in pairs]
    last = at(texts, ops.unsqueeze(lengths - 1, 1))
    cross_kv = [KeyValue(*(ops.permute(x, [0, 2, 1, 3]) for x in pair)) for pair in cross]
    return last, ops.squeeze(decoder.step_in_place(last, cross_kv, slots), 1)


def step_program(dims: ModelDimensions, policy: Policy) -> Program:
    """A step of the decoder, from texts, their lengths, the sums of their tokens' log-probabilities and the latest of
    these to the same: the likeliest token behind every text that has not ended, is not as long as it may get, and has
    had no log-probability that is not finite."""

    def step(
        decoder: TextDecoder,
        texts: TensorValue,
        lengths: TensorValue,
        totals: TensorValue,
        logprobs: TensorValue,
        ends: TensorValue,
        *others: Any,
    ) -> list[TensorValue]:
        (suppressed, begins, limits), kv = others[:3], others[3:]
        last, logits = next_logits(decoder, texts, lengths, kv)
        scores = log_probabilities(logits, texts, lengths, begins, suppressed, limits)
        token = ops.argmax(scores, axis=1)
        logprob = ops.squeeze(at(scores, token), 1)  # the greatest of what is not finite may be finite
        failed = ops.is_nan(logprobs) | ops.is_inf(logprobs)
        goes_on = (ops.squeeze(last, 1) != limits[1:2]) & (lengths < ends) & ~failed
        places = ops.unsqueeze(indices(texts.shape[1], texts.device), 0)
        is_next = (places == ops.unsqueeze(lengths, 1)) & ops.unsqueeze(goes_on, 1)
        return [
            ops.where(is_next, token, texts),
            lengths + goes_on.cast(DType.int64),
            totals + ops.where(goes_on, logprob, 0),
            ops.where(goes_on, logprob, logprobs),
        ]

    state = ("texts", "lengths", "totals", "logprobs", "ends")
    return Program(PICK, "decoder", TextDecoder(dims, policy), step, inputs(dims, policy, state))


def candidates_program(dims: ModelDimensions, policy: Policy) -> Program:
    """For beam search: the N_BEST likeliest tokens behind every text, and their log-probabilities, in falling order."""

    def candidates(
        decoder: TextDecoder, texts: TensorValue, lengths: TensorValue, *others: Any
    ) -> tuple[TensorValue, TensorValue]:
        (suppressed, begins, limits), kv = others[:3], others[3:]
        _, logits = next_logits(decoder, texts, lengths, kv)
        scores = log_probabilities(logits, texts, lengths, begins, suppressed, limits)
        logprobs, tokens = ops.top_k(scores, N_BEST)
        return ops.max(tokens, 0), logprobs  # a GPU may know no token for minus infinity

    return Program(
        CANDIDATES, "decoder", TextDecoder(dims, policy), candidates, inputs(dims, policy, ("texts", "lengths"))
    )


def mask_behind(n_past: TensorValue, cache: TensorValue) -> TensorValue:
    """The mask of `Slots`, for a cache (batch, place, head, channel)."""
    places = indices(cache.shape[1], cache.device).reshape((1, 1, cache.shape[1]))
    visible = places <= n_past.reshape((n_past.shape[0], 1, 1))
    return ops.where(visible, ops.constant(0, DType.float32, cache.device), NEVER)


def inputs(dims: ModelDimensions, policy: Policy, state: Sequence[str]) -> dict[str, TensorType | BufferType]:
    """Of both programs. Keys and values are (row, token, head, channel), as MAX's kernels for GPUs take them."""
    device, n_head = policy.device, dims.n_text_head
    n_channel = dims.n_text_state // n_head
    layers = range(2 * dims.n_text_layer)
    dtype = flash_dtype(policy.compute)
    own = {f"cache.{i}": TensorType(dtype, ["batch", "place", n_head, n_channel], device) for i in layers}
    cross = TensorType(dtype, ["audio", dims.n_audio_ctx, n_head, n_channel], device)
    of_texts = {
        "texts": TensorType(DType.int64, ["batch", "text_place"], device),
        "lengths": TensorType(DType.int64, ["batch"], device),
        "totals": TensorType(DType.float32, ["batch"], device),
        "logprobs": TensorType(DType.float32, ["batch"], device),
        "ends": TensorType(DType.int64, ["batch"], device),
    }
    return {
        **{name: of_texts[name] for name in state},
        "suppressed": TensorType(DType.bool, [dims.n_vocab], device),
        "begins": TensorType(DType.int64, ["batch"], device),
        "limits": TensorType(DType.int64, [2], device),
        **own,
        **{f"cross.{i}": cross for i in layers},
        **{f"{name} written": each.as_buffer() for name, each in own.items()},
    }
