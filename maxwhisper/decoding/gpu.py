"""Decoding in the memory of a device: rules, beams and caches stay there, and Python waits only now and then.

A GPU works on while Python goes on. One execution is one step of the decoder, which puts its token behind every text,
or chooses among beams, and its key and value into the cache; several are sent at once, and only then is asked what
became of the texts. All that a step reads and writes is in the same memory at every step, so that a GPU's step is
captured once and replayed. On a CPU `decoding.cpu` takes the steps, with kernels of its own.
"""

from collections.abc import Mapping
from threading import local
from typing import Any

import torch
from max.driver import Device
from max.dtype import DType
from max.graph import BufferType, DeviceRef, TensorType, TensorValue, ops
from torch import Tensor
from torch.nn import functional
from whisper.model import ModelDimensions

from ..engine.program import Executable, Program
from ..engine.repeated import Repeated
from ..engine.session import Policy
from ..network.model import TextDecoder
from .cache import CacheSlots, JoinedCache, KeyValueCache, named
from .cpu import SELECT_TOKENS
from .mirror import Mirror
from .rules import Rules, rules_inputs, texts_inputs
from .stepper import Advanced, Candidates, Graphs, Texts, check_room

SEARCH = "decoder.search"
"""The graph of a step of beam search, which compiles together with that of steps."""

MAX_CANDIDATES = 8
"""How many a step finds, one more than there can be beams."""

MAX_ENDED = 16
"""Texts of a window for which there is room once they have ended: of more steps than one."""

STATE = ("texts", "lengths", "totals", "latest")
"""What every step changes in place. latest: (batch,), the log-probability of each text's latest token."""

ENDED = ("n_ended", "ended", "ended_lengths", "ended_totals")
"""What beam search leaves of the texts that end: how many of each window, these, their lengths and sums."""

STEPS_AT_ONCE = 8
"""Before Python looks which texts have ended: what has ended meanwhile is computed on, half as many steps as a rule."""

PART = 256
"""Tokens of a part in `maxwhisper.device_select`."""


def next_logits(decoder: TextDecoder, given: Mapping[str, Any]) -> TensorValue:
    """Returns the logits of the token behind every text, (batch, vocab). The last one's key and value go into the
    cache, which is given twice, as `Slots` has it. given: what the graph is given."""
    x, n_past = embed_last(decoder, given["texts"], given["lengths"])
    return decoder.step_in_place(x, n_past, given["rows"], given)


def embed_last(decoder: TextDecoder, texts: TensorValue, lengths: TensorValue) -> tuple[TensorValue, TensorValue]:
    """Embeds the last token of every text, as (batch, 1, state); also returns how many come before it, (batch,)."""
    token_embedding, positional_embedding = decoder.token_embedding.weight, decoder.positional_embedding
    types = [
        TensorType(decoder.policy.compute, [texts.shape[0], 1, token_embedding.shape[1]], texts.device),
        lengths.type,
    ]
    values = [texts, lengths, token_embedding, positional_embedding]
    x, n_past = ops.custom("maxwhisper.embed_last", texts.device, values, types)
    return x.tensor, n_past.tensor


def select(logits: TensorValue, given: Mapping[str, Any], n_best: int, appends: bool) -> None:
    """Finds the `n_best` likeliest tokens behind every text by openai-whisper's rules, and puts the likeliest there if
    it `appends`, by `maxwhisper.device_select`, whose Mojo source says what goes in. logits: (batch, vocab)."""
    batch, n_vocab = logits.shape
    parts = [batch, (n_vocab + PART - 1) // PART + 1]
    room = [
        TensorType(DType.float32, [*parts, n_best + 2], logits.device),
        TensorType(DType.int64, [*parts, n_best], logits.device),
    ]
    changed = ("candidates", "logprobs", *(f"{name} written" for name in STATE))
    values = [logits, *(given[name] for name in (*changed, "ends", "begins", "suppressed", "limits"))]
    parameters = {"n_best": n_best, "appends": appends}
    ops.inplace_custom("maxwhisper.device_select", logits.device, values, room, parameters=parameters)


def choose_beams(given: Mapping[str, Any], device: Any) -> None:
    """Puts the candidates that openai-whisper's beam search chooses behind the texts, by `maxwhisper.device_beams`,
    whose Mojo source says what goes in."""
    changed = ("texts", "lengths", "rows", "totals", "latest")
    values = [*(given[f"{name} written"] for name in changed), *(given[name] for name in ENDED)]
    values += [given[name] for name in ("candidates", "logprobs", "ends", "wanted", "limits")]
    ops.inplace_custom("maxwhisper.device_beams", device, values)


def step_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Returns the graph of a step of the decoder, which in the memory that it is given puts the likeliest token behind
    every text that has not ended, is not as long as it may get, and has had no log-probability that is not finite."""

    def step(decoder: TextDecoder, **given: Any) -> list[TensorValue]:
        select(next_logits(decoder, given), given, n_best=1, appends=True)
        return []

    types = inputs(dims, policy, n_best=1)
    return Program(SELECT_TOKENS, "decoder", TextDecoder(dims, policy, joined=True), step, types)


def search_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Returns the graph of a step of beam search, which in the memory that it is given finds the MAX_CANDIDATES
    likeliest tokens behind every text, and chooses among them as openai-whisper does."""

    def search(decoder: TextDecoder, **given: Any) -> list[TensorValue]:
        select(next_logits(decoder, given), given, n_best=MAX_CANDIDATES, appends=False)
        choose_beams(given, policy.device)
        return []

    types = inputs(dims, policy, n_best=MAX_CANDIDATES)
    return Program(SEARCH, "decoder", TextDecoder(dims, policy, joined=True), search, types)


def inputs(dims: ModelDimensions, policy: Policy, n_best: int) -> dict[str, TensorType | BufferType]:
    """Returns the inputs of both programs; what is also read is given twice. Keys and values are (row, token, head,
    channel), as kernels for GPUs take them."""
    device, n_head = policy.device, dims.n_text_head
    n_channel = dims.n_text_state // n_head
    layers = range(2 * dims.n_text_layer)
    own = TensorType(policy.compute, ["batch", "position", n_head, n_channel], device)
    cross = TensorType(policy.compute, ["audio", dims.n_audio_ctx, n_head, n_channel], device)
    kv = {"cache": own, "cross": cross, "written": own.as_buffer()}
    given = {**texts_inputs(device), **rules_inputs(dims.n_vocab, device)}
    texts = TensorType(DType.int64, ["batch", "capacity"], device)
    read = {"texts": texts, "lengths": given["lengths"], "rows": TensorType(DType.int64, ["batch", "position"], device)}
    changed = {**read, "totals": given["totals"], "latest": given["totals"]}
    found = {"candidates": DType.int64, "logprobs": DType.float32}
    types: dict[str, TensorType | BufferType] = {
        **read,
        **{name: given[name] for name in ("ends", "begins", "suppressed", "limits")},
        **{f"{name} written": each.as_buffer() for name, each in changed.items()},
        **{name: BufferType(dtype, ["batch", n_best], device) for name, dtype in found.items()},
        **named(**{kind: [each for _ in layers] for kind, each in kv.items()}),
    }
    if n_best == 1:
        del types["rows written"]
        return types
    shapes = (["audio"], ["audio", MAX_ENDED, "capacity"], ["audio", MAX_ENDED], ["audio", MAX_ENDED])
    dtypes = (DType.int64, DType.int64, DType.int64, DType.float32)
    ended = {name: BufferType(*of, device) for name, *of in zip(ENDED, dtypes, shapes, strict=True)}
    return {**types, **ended, "wanted": TensorType(DType.int64, ["audio"], device)}


# ---- the stepper ---------------------------------------------------------------------------------------------------

GIVEN = ("suppressed", "limits", "begins", "ends", "wanted")
CHANGED = (*STATE, "rows", "n_ended")
"""What a `Mirror` gives to a device, and what is changed there, of the inputs of both programs; `latest` and `n_ended`
are given as 0."""


def shapes_of(dims: ModelDimensions, n_best: int, sizes: Mapping[str, int]) -> dict[str, tuple[DType, list[int]]]:
    """Returns the inputs of a program but for keys and values, each once. sizes: of their symbolic dimensions."""
    types = inputs(dims, Policy(DeviceRef.CPU(), DType.float32, DType.float32), n_best)
    state = {name.removesuffix(" written"): type for name, type in types.items() if "." not in name}
    return {name: (type.dtype, [sizes.get(str(n)) or int(n) for n in type.shape]) for name, type in state.items()}


class Steps:
    """A graph of steps for the texts of some cache slots, and the memory that it works in."""

    def __init__(self, graph: Executable, cache: JoinedCache, dims: ModelDimensions, device: Device):
        """Makes room and has the graph executed once: for texts that are to get no token, but whose last one's key and
        value go where no text has any that is still to get one."""
        batch, position = cache.rows.shape
        sizes = {"batch": batch, "position": position, "capacity": dims.n_text_ctx + 1, "audio": len(cache.cross[0])}
        left = shapes_of(dims, MAX_CANDIDATES if graph.name == SEARCH else 1, sizes)
        given, changed = ({name: left.pop(name) for name in names if name in left} for names in (GIVEN, CHANGED))
        self.mirror = Mirror(given, changed, left, device)
        self.here = self.mirror.here
        self.here["lengths"].fill_(dims.n_text_ctx)
        self.here["begins"].fill_(dims.n_text_ctx)
        self.mirror.put()
        there = self.mirror.there
        buffers = {**there, **{f"{name} written": each for name, each in there.items()}}
        buffers |= {**cache.inputs(), **cache.written()}
        self.step = Repeated(graph, {name: buffers[name] for name in graph.inputs})

    def take(self, texts: Texts, cache: JoinedCache, rules: Rules, n_token: Tensor, n_step: int) -> dict[str, Tensor]:
        """Has the texts advance by some steps; returns what `Mirror.get` does."""
        n_room = self.here["texts"].shape[1] - texts.tokens.shape[1]
        now = {
            "texts": functional.pad(texts.tokens, (0, n_room), value=rules.eot),
            "lengths": texts.lengths,
            "totals": texts.totals,
            "rows": cache.rows,
            "ends": texts.lengths + n_token,
            "suppressed": rules.suppressed,
            "begins": rules.begins,
            "limits": rules.limits,
            "wanted": torch.tensor(0) if rules.wanted is None else rules.wanted,
        }
        for name in now.keys() & self.here.keys():
            self.here[name].copy_(now[name])
        self.mirror.put()
        for _ in range(n_step):
            self.step()
        return self.mirror.get()


class GPUStepper:
    """Takes texts further in the memory of a device: Python waits only now and then."""

    max_candidates = MAX_CANDIDATES
    tokens_first = True
    searches = True

    def __init__(self, graphs: Graphs, dims: ModelDimensions, device: Device):
        self.graphs = graphs
        self.dims = dims
        self.device = device
        self.of_thread = SlotsOfThread()

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor) -> Advanced:
        """Decodes texts by at most STEPS_AT_ONCE tokens, the likeliest ones or those of beams; by one, with several
        candidates, where the rules do not say how many texts are wanted to end."""
        check_room(int((texts.lengths + n_token).max()) - 1, self.dims.n_text_ctx)
        in_slots = cache if isinstance(cache, JoinedCache) else self._in_slots(cache)
        one_by_one = rules.n_best > 1 and rules.wanted is None
        n_step = 1 if one_by_one else min(int(n_token.max()), STEPS_AT_ONCE)
        found = self._steps(in_slots, rules).take(texts, in_slots, rules, n_token, n_step)
        if one_by_one:
            best, logprobs = (found[name][:, : rules.n_best] for name in ("candidates", "logprobs"))
            tokens = found["texts"].scatter(1, texts.lengths[:, None], best[:, :1])
            now = Texts(tokens, texts.lengths + 1, texts.totals + logprobs[:, 0])
        else:
            in_slots.rows.copy_(found["rows"])
            now = Texts(found["texts"], found["lengths"], found["totals"])
            best, logprobs = now.last(), found["latest"][:, None]
        longest = int(now.lengths.max())
        cache.n_token = longest - 1
        texts = now._replace(tokens=now.tokens[:, :longest])
        return Advanced(texts, Candidates(best, logprobs), [] if rules.wanted is None else ended_of(found))

    def _steps(self, cache: JoinedCache, rules: Rules) -> Steps:
        """Returns those of the slots, which are made where there are none."""
        name = SELECT_TOKENS if rules.n_best == 1 else SEARCH
        kept, key = cache.slots.kept, (name, cache.n_slot)
        if key not in kept:
            kept[key] = Steps(self.graphs[name], cache, self.dims, self.device)
        return kept[key]

    def verify(self) -> int:
        """Executes the steps that this thread has taken last; returns how many graphs they are of. Raises RuntimeError
        if one is not captured, or launches other kernels than were captured."""
        kept = self.of_thread.slots.kept.values()
        for steps in kept:
            steps.step.verify()
        return len(kept)

    def _in_slots(self, cache: KeyValueCache) -> JoinedCache:
        """Returns the cache in the memory that kernels take: that of the thread's one before, if it fits."""
        room, wanted = ([kv.shape for kv in (*each.own, *each.cross)] for each in (self.of_thread.slots, cache))
        if room not in ([], wanted):
            self.of_thread.slots = CacheSlots(1, tokens_first=True)
        self.of_thread.slots.place([cache])
        return self.of_thread.slots.joined(1)


class SlotsOfThread(local):
    """What every thread has for itself, as others may use the same model at the same time: room for one window."""

    def __init__(self) -> None:
        self.slots = CacheSlots(1, tokens_first=True)


def ended_of(found: Mapping[str, Tensor]) -> list[dict[tuple[int, ...], float]]:
    """Returns by window the texts that have ended, in the order in which they did, and their sums."""
    of_windows = zip(*(found[name].tolist() for name in ENDED), strict=True)
    return [
        {tuple(text[:length]): total for text, length, total in zip(texts[:n], lengths, totals, strict=False)}
        for n, texts, lengths, totals in of_windows
    ]
