"""openai-whisper's decode loop over MAX: its sampling and beam search untouched, the forward pass ours.

Where tokens are not drawn at random, the loop needs only the few likeliest tokens of each step. These are found inside
a graph, rules included, so that Python sees a handful of numbers in the place of a vocabulary of logits. Without beams
the likeliest token is the next one, and the graph takes many steps, or all until a text ends, each of which checks
several tokens of every text, which `maxwhisper.decoding.speculative` guesses. These graphs are a CPU's;
`maxwhisper.decoding.gpu` has a GPU's.
"""

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from max.driver import Buffer
from max.dtype import DType
from max.graph import BufferType, BufferValue, DeviceRef, TensorType, TensorValue, ops
from max.nn.layer import Module
from torch import Tensor
from torch.nn import functional
from whisper import decoding
from whisper.model import ModelDimensions

from ..engine.program import Executable, Program, buffer
from ..engine.session import Policy
from ..errors import DecodingError, OptionError
from ..frozen import has_hooks
from ..network.blocks import BLOCKS
from ..network.model import TextDecoder
from ..rebind import rebind
from .loop import append, embed_next, goes_on, nothing_found, rounds

log = logging.getLogger("maxwhisper")

KV = list[torch.Tensor]


@dataclass(eq=False)
class KeyValueCache:
    """What the decoder keeps between calls; empty, and false, until the first one.

    own: keys and values of the text so far, layer by layer, each (batch, head, place, channel), with a place for every
        token that a text may have. The first n_token of them are filled; where texts are of different lengths, those of
        the longest.
    cross: keys and values of the audio, layer by layer, each (audio, head, n_audio_ctx, channel).
    sources: (batch, place), the row of memory in which a text's keys and values of a place are; the first row of `own`
        is row `first_row` of that memory. What is new goes into a text's own row.
    memory: `own` in one, where nobody else's are between them.
    rough_cross: `cross` in int8, as `maxwhisper.decoding.speculative` takes it, once it has been asked for.
    """

    own: KV = field(default_factory=list)
    cross: KV = field(default_factory=list)
    n_token: int = 0
    sources: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64, device="cpu"))
    first_row: int = 0
    memory: Tensor | None = None
    rough_cross: Tensor | None = None
    _inputs: list[Buffer] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.n_token > 0

    def append(self, new: KV, n_place: int) -> None:
        """Puts keys and values of the next tokens, each (batch, head, token, channel), behind what is filled."""
        if not self.own:
            n_text, n_head, _, n_channel = new[0].shape
            self.memory = new[0].new_empty((len(new), n_text, n_head, n_place, n_channel))
            self.own = list(self.memory)
            self.sources, self.first_row = own_rows(len(new[0]), n_place), 0
            self._inputs = []
        end = self.n_token + new[0].shape[2]
        for cached, kv in zip(self.own, new, strict=True):
            cached[:, :, self.n_token : end] = kv
        wait_for_pytorch(new[0])
        self.n_token = end

    def repeat(self, times: int) -> None:
        """As many copies of every text, side by side; the texts are still in their own rows."""
        own, n_token, n_place = self.own, self.n_token, self.own[0].shape[2]
        self.own, self.n_token = [], 0
        self.append([kv[:, :, :n_token].repeat_interleave(times, 0) for kv in own], n_place)

    def rearrange(self, texts: list[int]) -> None:
        """Puts the texts of these numbers in the place of all; no key or value moves."""
        self.sources[:, : self.n_token] = self.sources[texts, : self.n_token]

    def settle(self) -> None:
        """Puts the keys and values of every text into its own row."""
        rows, past = own_rows(*self.sources.shape), self.sources[:, : self.n_token] - self.first_row
        if not past.equal(rows[:, : self.n_token]):
            for kv in self.own:
                kv[:, :, : self.n_token] = kv[past, :, torch.arange(self.n_token, device="cpu")].transpose(1, 2)
            self.sources.copy_(rows + self.first_row)
            wait_for_pytorch(self.own[0])

    def move(self, own: KV, cross: KV, sources: Tensor, first_row: int) -> None:
        """Continues in other memory, of the shapes of `own`, `cross` and `sources`."""
        for there, kv in zip(own, self.own, strict=True):
            there[:, :, : self.n_token] = kv[:, :, : self.n_token]
        for there, kv in zip(cross, self.cross, strict=True):
            there.copy_(kv)
        wait_for_pytorch(own[0])
        sources.copy_(self.sources - self.first_row + first_row)
        self.own, self.cross, self.sources, self.first_row, self._inputs = own, cross, sources, first_row, []
        self.memory = self.rough_cross = None

    def inputs(self) -> list[Buffer]:
        """`own` and `cross` as MAX takes them, in the same memory."""
        if not self._inputs:
            self._inputs = [buffer(kv) for kv in (*self.own, *self.cross)]
        return self._inputs

    def copy(self) -> "KeyValueCache":
        memory = torch.stack(self.own) if self.own else None
        own = [] if memory is None else list(memory)
        return KeyValueCache(own, list(self.cross), self.n_token, self.sources - self.first_row, memory=memory)


def wait_for_pytorch(written: Tensor) -> None:
    """For what it does to a tensor, which MAX does not wait for where it has a buffer of it already."""
    if written.is_cuda:
        torch.cuda.synchronize(written.device)


def own_rows(n_text: int, n_place: int) -> Tensor:
    """The sources of texts that each have a row of a cache for themselves."""
    return torch.arange(n_text, device="cpu")[:, None].repeat(1, n_place)


class MaxInference(decoding.Inference):
    """The forward pass of the decode loop: the first call takes the whole prompt; later `logits`, the last token."""

    def __init__(self, model: Any, initial_token_length: int):
        self.model = model
        self.initial_token_length = initial_token_length
        self.cache = KeyValueCache()

    def logits(self, tokens: torch.Tensor, audio_features: torch.Tensor) -> torch.Tensor:
        if tokens.shape[-1] > self.initial_token_length:
            tokens = tokens[:, -1:]
        return self.model.decoder(tokens, audio_features, kv_cache=self.cache)

    def start(self, tokens: torch.Tensor, audio_features: torch.Tensor, position: int) -> list[torch.Tensor]:
        """Logits, each (batch, vocab), at a position of the prompt and at its end. As many consecutive texts as share a
        row of audio features are the same still, and are computed once."""
        n_same = len(tokens) // len(audio_features)
        positions = torch.tensor([position, tokens.shape[1] - 1])
        logits = self.model.decoder(tokens[::n_same], audio_features, kv_cache=self.cache, positions=positions)
        if n_same > 1:
            self.cache.repeat(n_same)
            logits = logits.repeat_interleave(n_same, 0)
        return list(logits.unbind(1))

    def pick(self, texts: "Texts", rules: "Rules", n_token: torch.Tensor) -> "Picked":
        """What follows the texts, as `TextDecoder.pick` finds it; rules: as `TokenRules.inputs` gives them."""
        return checked(self.model.decoder.pick(texts, self.cache, rules, n_token))

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        # The audio's keys and values stay: all beams of a window share them.
        if source_indices != list(range(len(source_indices))):
            self.cache.rearrange(source_indices)

    def cleanup_caching(self) -> None:
        self.cache = KeyValueCache()


# ---- the rules, in the graph ---------------------------------------------------------------------------------------

TOKEN_RULES, PICK = "token_rules", "decoder.pick"
"""Graphs of the decode loop: the rules alone, and behind steps of the decoder."""

MAX_STEPS = 32
"""Of greedy decoding in one execution, during which Python does nothing else, Ctrl-C included."""


N_BEST = 8
"""Candidates that are found on a device other than a CPU, and one more than it can pursue beams."""


def likeliest(
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
    """The graph of `maxwhisper.pick`, whose Mojo source says what goes in and out: logits (batch, token, vocab) and the
    rest, to candidates, their log-probabilities, tokens, totals, lengths, and how many more tokens the texts may have.

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
    """The graph, for any vocabulary."""

    def pick(_: Module, logits: TensorValue, *others: Any) -> Sequence[TensorValue]:
        return likeliest(ops.unsqueeze(logits, 1), *others)

    logits = TensorType(DType.float32, ["batch", "vocab"], DeviceRef.CPU())
    return Program(TOKEN_RULES, "", NoWeights(), pick, {"logits": logits, **texts_inputs(), **rules_inputs("vocab")})


def texts_inputs() -> dict[str, TensorType | BufferType]:
    """Texts, to which `likeliest` adds, and how long they may get."""
    cpu = DeviceRef.CPU()
    return {
        "texts": BufferType(DType.int64, ["batch", "text_place"], cpu),
        "lengths": TensorType(DType.int64, ["batch"], cpu),
        "ends": TensorType(DType.int64, ["batch"], cpu),
        "totals": TensorType(DType.float32, ["batch"], cpu),
    }


def rules_inputs(n_vocab: int | str) -> dict[str, TensorType | BufferType]:
    """What `likeliest` takes beside logits and texts."""
    cpu = DeviceRef.CPU()
    return {
        "suppressed": TensorType(DType.bool, [n_vocab], cpu),
        "begins": TensorType(DType.int64, ["batch"], cpu),
        "limits": TensorType(DType.int64, [2], cpu),
        "places": TensorType(DType.int64, ["candidate"], cpu),
    }


def pick_program(dims: ModelDimensions, policy: Policy) -> Program:
    """Steps of the decoder, each of which puts the likeliest token behind every text that has not ended, and its keys
    and values into the cache, until one of these ends or is as long as it may get. Gives the likeliest
    tokens of the last step and their log-probabilities, the texts' totals, and their lengths.

    The texts may be of different lengths. Their caches are given twice, to be read and to be written: what is written
    is a place that is not read in the same step. The next step reads it, and comes after: its tokens are those of
    `maxwhisper.pick`, which as an in-place operation follows all that write into the caches.
    """
    n_own = 2 * dims.n_text_layer
    n_rule = len(rules_inputs(dims.n_vocab))

    def pick(
        decoder: TextDecoder,
        tokens: TensorValue,
        texts: BufferValue,
        lengths: TensorValue,
        ends: TensorValue,
        totals: TensorValue,
        *others: Any,
    ) -> Sequence[TensorValue]:
        rules, (sources, *kv), caches = others[:n_rule], others[n_rule:-n_own], others[-n_own:]

        def step(credit: TensorValue, before: TensorValue, *state: TensorValue) -> list[TensorValue]:
            totals, tokens, *_ = state
            x, offsets = embed_next(decoder, tokens, before)
            logits, *new = decoder.steps(x, offsets, kv, sources)
            append(caches, new, offsets)
            candidates, logprobs, tokens, *after = likeliest(logits, texts, before, ends, totals, *rules)
            totals, lengths, left = after
            return [*goes_on(left, credit, before, lengths, 1), lengths, totals, tokens, candidates, logprobs]

        lengths, totals, _, *found = rounds(1, [lengths, totals, tokens, *nothing_found(lengths, rules[-1])], step)
        return [*found, totals, lengths]

    return Program(PICK, "decoder", TextDecoder(dims, policy), pick, picking_inputs(dims, policy))


def picking_inputs(dims: ModelDimensions, policy: Policy) -> dict[str, TensorType | BufferType]:
    """What graphs take that decode several steps."""
    given = BLOCKS["decoder.step"].inputs(dims, policy)
    given.pop("offset")
    inputs: dict[str, TensorType | BufferType] = {"tokens": given.pop("tokens")}
    inputs |= {**texts_inputs(), **rules_inputs(dims.n_vocab)}
    inputs["sources"] = TensorType(DType.int64, ["batch", "place"], policy.device)
    written = {f"{name} written": type.as_buffer() for name, type in list(given.items())[: 2 * dims.n_text_layer]}
    return {**inputs, **given, **written}


@dataclass
class Candidates:
    """The likeliest next tokens of every text, in the place of the logits of all: what openai-whisper's beam search
    asks of logits, as far as it does.

    tokens, logprobs: (batch, candidate), in falling order.
    """

    tokens: Tensor
    logprobs: Tensor

    def float(self) -> "Candidates":
        return self

    def __getitem__(self, text: int) -> "Candidates":
        return Candidates(self.tokens[text], self.logprobs[text])

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        assert k == len(self.tokens)
        return self.logprobs, self.tokens


class Texts(NamedTuple):
    """Texts that decode together.

    tokens: (batch, token), as many of which as `lengths` (batch,) says are a text's, and behind them the end of text.
    totals: (batch,), the sum of the log-probabilities of a text's tokens.
    """

    tokens: Tensor
    lengths: Tensor
    totals: Tensor

    @classmethod
    def of(cls, tokens: Tensor, totals: Tensor) -> "Texts":
        """Texts of the same length."""
        return cls(tokens, torch.full((len(tokens),), tokens.shape[1]), totals)

    @classmethod
    def joined(cls, texts: Sequence["Texts"], eot: int) -> "Texts":
        width = max(each.tokens.shape[1] for each in texts)
        tokens = [functional.pad(each.tokens, (0, width - each.tokens.shape[1]), value=eot) for each in texts]
        return cls(torch.cat(tokens), *(torch.cat(each) for each in list(zip(*texts, strict=True))[1:]))

    def last(self) -> Tensor:
        """The last token of each, (batch, 1)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)


class Picked(NamedTuple):
    """What a graph has picked: texts with the likeliest token of each step behind them, and the candidates of the last
    step."""

    texts: Texts
    candidates: Candidates


def checked(picked: Picked) -> Picked:
    """Raises DecodingError if a logit was NaN, or no token is left."""
    if not all(map(math.isfinite, picked.candidates.logprobs[:, 0].tolist())):
        raise DecodingError("logits are not finite, or the rules of decoding exclude every token")
    return picked


def log_softmax(logits: Tensor | Candidates, dim: int) -> Tensor | Candidates:
    """Candidates are normalised already."""
    return logits if isinstance(logits, Candidates) else functional.log_softmax(logits, dim=dim)


OF_CANDIDATES = SimpleNamespace(log_softmax=log_softmax)


class BeamSearchDecoder(decoding.BeamSearchDecoder):
    """openai-whisper's, of logits or of candidates."""

    update = rebind(decoding.BeamSearchDecoder.update, F=OF_CANDIDATES)


class Rules(NamedTuple):
    """The values of `rules_inputs`."""

    suppressed: Tensor
    begins: Tensor
    limits: Tensor
    places: Tensor

    @classmethod
    def joined(cls, rules: Sequence["Rules"]) -> "Rules":
        """Those of several tasks with the same filters, for all their texts."""
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
        """The rules of some filters; None if there is one among them that is not openai-whisper's."""
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
        """What graphs take beside logits and texts to find the `n_best` likeliest tokens behind the tokens (batch,
        token)."""
        suppressed = self.suppressed if tokens.shape[1] > self.sample_begin else self.suppressed_first
        begins = torch.full((len(tokens),), self.sample_begin)
        limits = torch.tensor([self.timestamp_begin, self.eot])
        return Rules(suppressed, begins, limits, torch.zeros(n_best, dtype=torch.int64))

    def pick(self, graph: Executable, logits: Tensor, tokens: Tensor, totals: Tensor, n_best: int) -> Picked:
        """What follows the tokens (batch, token) by their logits (batch, vocab), the `n_best` likeliest among it, found
        by the graph TOKEN_RULES.

        Raises DecodingError if a logit is NaN, or none is left.
        """
        texts, lengths, totals = Texts.of(functional.pad(tokens, (0, 1), value=self.eot), totals)
        given = logits, texts, lengths - 1, lengths, totals, *self.inputs(tokens, n_best)
        candidates, logprobs, _, totals, lengths, _ = graph(*given)
        return checked(Picked(Texts(texts, lengths, totals), Candidates(candidates, logprobs)))


@cache
def not_in_graph(reason: str) -> None:
    """Says so once per reason."""
    log.info("tokens are picked by openai-whisper's loop, not in the graph: %s", reason)


def inference_of(model: Any, initial_token_length: int) -> decoding.Inference:
    """How a model's decoder is called: openai-whisper's way where modules inside have hooks."""
    kind = decoding.PyTorchInference if model.decoder.hooked() else MaxInference
    return kind(model, initial_token_length)


class DecodingTask(decoding.DecodingTask):
    """openai-whisper's decoding of a window, its forward passes through `MaxInference`."""

    __init__ = rebind(
        decoding.DecodingTask.__init__,
        PyTorchInference=inference_of,
        BeamSearchDecoder=BeamSearchDecoder,
    )

    # A program may have set another default dtype than float32, for all its threads.
    _openai_loop = rebind(
        decoding.DecodingTask._main_loop,
        torch=SimpleNamespace(zeros=partial(torch.zeros, dtype=torch.float32)),
    )

    def _get_initial_tokens(self) -> tuple[int, ...]:
        tokens: tuple[int, ...] = super()._get_initial_tokens()
        if len(tokens) > self.n_ctx:
            raise OptionError(f"prefix is too long: with it the text begins with {len(tokens)} of {self.n_ctx} tokens")
        return tokens

    def _get_audio_features(self, mel: Tensor) -> Tensor:
        # openai-whisper goes on with another dtype than these two until something fails.
        return super()._get_audio_features(mel.to(torch.float16 if self.options.fp16 else torch.float32))

    def _main_loop(self, audio_features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """What openai-whisper's loop does, with tokens from a graph where it can find them."""
        rules = self._rules()
        if rules is None:
            return self._openai_loop(audio_features, tokens)
        beams = self.options.beam_size
        n_best = beams + 1 if beams else 1
        n_end = min(tokens.shape[1] + self.sample_len, self.n_ctx + 1)
        sum_logprobs = torch.zeros(len(tokens), dtype=torch.float32)
        no_speech_probs = [math.nan] * len(tokens)
        try:
            at_sot, logits = (x.cpu() for x in self.inference.start(tokens, audio_features, self.sot_index))
            tokens = tokens.cpu()
            if self.tokenizer.no_speech is not None:
                no_speech_probs = at_sot.softmax(dim=-1)[:, self.tokenizer.no_speech].tolist()
            picked = rules.pick(self.model.network[TOKEN_RULES], logits, tokens, sum_logprobs, n_best)
            if beams:
                tokens, sum_logprobs = self._beams(tokens, sum_logprobs, picked.candidates, rules, n_end)
            else:
                tokens, _, sum_logprobs = self._greedy(picked.texts, rules, n_end)
        finally:
            self.inference.cleanup_caching()
        return tokens, sum_logprobs, no_speech_probs

    def _beams(
        self, tokens: Tensor, sum_logprobs: Tensor, candidates: Candidates, rules: "TokenRules", n_end: int
    ) -> tuple[Tensor, Tensor]:
        """Beams of up to `n_end` tokens, and their sums of log-probabilities."""
        while True:
            tokens, completed = self.decoder.update(tokens, candidates, sum_logprobs)
            if completed or tokens.shape[1] >= n_end:
                return tokens, sum_logprobs
            one = torch.ones(len(tokens), dtype=torch.int64)
            inputs = rules.inputs(tokens, candidates.tokens.shape[1])
            candidates = self.inference.pick(Texts.of(tokens, sum_logprobs), inputs, one).candidates

    def _greedy(self, texts: "Texts", rules: "TokenRules", n_end: int) -> "Texts":
        """The texts until each has ended, or has `n_end` tokens."""
        while True:
            left = (n_end - texts.lengths).masked_fill(texts.last()[:, 0] == self.tokenizer.eot, 0)
            if not left.any():
                return texts
            texts = self.inference.pick(texts, rules.inputs(texts.tokens, 1), left.clamp(max=MAX_STEPS)).texts

    def _rules(self) -> TokenRules | None:
        """None where all logits are needed: to draw tokens at random, for more beams than a GPU has candidates for, for
        hooks, or for a decoder or filters not known."""
        if self.options.temperature != 0:
            not_in_graph("tokens are drawn at random")
            return None
        if (self.options.beam_size or 0) >= N_BEST and self.model.decoder.on_device:
            not_in_graph(f"{N_BEST} beams or more, not on a CPU")
            return None
        if type(self.inference) is not MaxInference or has_hooks(self.model.decoder):
            not_in_graph("the decoder has hooks")
            return None
        if type(self.decoder) not in (decoding.GreedyDecoder, BeamSearchDecoder):
            not_in_graph("unknown decoder")
            return None
        rules = TokenRules.of(self.logit_filters, self.model.dims.n_vocab, self.sample_begin, self.tokenizer.eot)
        if rules is None:
            not_in_graph("unknown logit filters")
        return rules

    def run(self, mel: torch.Tensor) -> list[decoding.DecodingResult]:
        """Decodes windows (batch, n_mels, frame): together, or one by one where each has several sequences, since
        openai-whisper's loop then takes only one window."""
        run = super().run
        if self.n_group == 1:
            return run(mel)
        return [result for window in mel for result in run(window[None])]


decode = torch.no_grad()(rebind(inspect.unwrap(decoding.decode), DecodingTask=DecodingTask))
