"""openai-whisper's decode loop over MAX: its sampling and beam search untouched, the forward pass ours.

Where tokens are not drawn at random, the loop needs only the few likeliest tokens of each step: these a stepper finds.
"""

import inspect
import logging
import math
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from whisper import decoding

from ..engine.program import Executable
from ..errors import OptionError
from ..hooks import has_hooks
from ..rebind import rebind
from .cache import KeyValueCache
from .rules import TOKEN_RULES, Rules, TokenRules
from .stepper import Advanced, Candidates, Texts, checked

log = logging.getLogger("maxwhisper")

MAX_STEPS = 32
"""Tokens of greedy decoding that are asked for at once, while Python does nothing else, Ctrl-C included."""


class MaxInference(decoding.Inference):
    """The forward pass of the decode loop: the first call takes the whole prompt; later `logits`, the last token."""

    def __init__(self, model: Any, initial_token_length: int):
        self.model = model
        self.initial_token_length = initial_token_length
        self.cache = KeyValueCache()

    def logits(self, tokens: torch.Tensor, audio_features: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] > self.initial_token_length:
            tokens = tokens[:, -1:]
        return self.model.decoder(tokens, audio_features, kv_cache=self.cache)

    def start(self, tokens: torch.Tensor, audio_features: torch.Tensor, position: int) -> list[torch.Tensor]:
        """Returns logits, each (batch, vocab), at a position of the prompt and at its end. As many consecutive texts as
        share a row of audio features are the same still, and are computed once."""
        n_same = len(tokens) // len(audio_features)
        positions = torch.tensor([position, tokens.shape[1] - 1])
        logits = self.model.decoder(tokens[::n_same], audio_features, kv_cache=self.cache, positions=positions)
        if n_same > 1:
            self.cache.repeat(n_same)
            logits = logits.repeat_interleave(n_same, 0)
        return list(logits.unbind(1))

    def advance(self, texts: Texts, rules: Rules, n_token: Tensor) -> Advanced:
        """Decodes the texts further, as `Stepper.advance` does.

        Raises DecodingError if a logit was NaN, or no token is left.
        """
        return checked(self.model.stepper.advance(texts, self.cache, rules, n_token))

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        # The audio's keys and values stay: all beams of a window share them.
        if source_indices != list(range(len(source_indices))):
            self.cache.rearrange(source_indices)

    def cleanup_caching(self) -> None:
        self.cache = KeyValueCache()


def log_softmax(logits: Tensor | Candidates, dim: int) -> Tensor | Candidates:
    """Computes openai-whisper's of logits; leaves candidates as they are, which are normalised already."""
    return logits if isinstance(logits, Candidates) else functional.log_softmax(logits, dim=dim)


OF_CANDIDATES = SimpleNamespace(log_softmax=log_softmax)


class BeamSearchDecoder(decoding.BeamSearchDecoder):
    """openai-whisper's, of logits or of candidates."""

    update = rebind(decoding.BeamSearchDecoder.update, F=OF_CANDIDATES)


def first_tokens(
    graph: Executable, rules: TokenRules, logits: Tensor, tokens: Tensor, totals: Tensor, n_best: int
) -> Advanced:
    """Returns what follows the tokens (batch, token) by their logits (batch, vocab), the `n_best` likeliest among it,
    found by the graph TOKEN_RULES.

    Raises DecodingError if a logit is NaN, or none is left.
    """
    texts, lengths, totals = Texts.of(functional.pad(tokens, (0, 1), value=rules.eot), totals)
    given = {"texts": texts, "lengths": lengths - 1, "ends": lengths, **rules.inputs(tokens, n_best).inputs()}
    _, totals, lengths, _ = graph(logits=logits, totals=totals, **given)
    return checked(Advanced(Texts(texts, lengths, totals), Candidates(given["candidates"], given["logprobs"])))


@cache
def not_in_graph(reason: str) -> None:
    """Says so once per reason."""
    log.info("tokens are selected by openai-whisper's loop, not in the graph: %s", reason)


def inference_of(model: Any, initial_token_length: int) -> decoding.Inference:
    """Chooses how a model's decoder is called: openai-whisper's way where modules inside have hooks."""
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
        """Does what openai-whisper's loop does, with tokens from a graph where it can find them."""
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
                no_speech_probs = at_sot.softmax(1)[:, self.tokenizer.no_speech].tolist()
            first = first_tokens(self.model.network[TOKEN_RULES], rules, logits, tokens, sum_logprobs, n_best)
            if beams:
                tokens, sum_logprobs = self._beams(tokens, sum_logprobs, first.candidates, rules, n_end)
            else:
                tokens, _, sum_logprobs = self._greedy(first.texts, rules, n_end)
        finally:
            self.inference.cleanup_caching()
        return tokens, sum_logprobs, no_speech_probs

    def _beams(
        self, tokens: Tensor, sum_logprobs: Tensor, candidates: Candidates, rules: TokenRules, n_end: int
    ) -> tuple[Tensor, Tensor]:
        """Returns beams of up to `n_end` tokens, and their sums of log-probabilities."""
        while True:
            tokens, completed = self.decoder.update(tokens, candidates, sum_logprobs)
            if completed or tokens.shape[1] >= n_end:
                return tokens, sum_logprobs
            if self.model.stepper.searches:
                return self._search(Texts.of(tokens, sum_logprobs), rules, n_end)
            one = torch.ones(len(tokens), dtype=torch.int64)
            inputs = rules.inputs(tokens, candidates.tokens.shape[1])
            candidates = self.inference.advance(Texts.of(tokens, sum_logprobs), inputs, one).candidates

    def _search(self, texts: Texts, rules: TokenRules, n_end: int) -> tuple[Tensor, Tensor]:
        """Does the rest of what `_beams` does for the one window, by a stepper that chooses as openai-whisper does."""
        (of_window,) = self.decoder.finished_sequences
        while True:
            wanted, left = self.decoder.max_candidates - len(of_window), n_end - texts.lengths
            if wanted <= 0 or not left.any():
                return texts.tokens, texts.totals
            inputs = rules.inputs(texts.tokens, self.decoder.beam_size + 1)._replace(wanted=torch.tensor([wanted]))
            advanced = self.inference.advance(texts, inputs, left.clamp(max=MAX_STEPS))
            texts = advanced.texts
            of_window.update(*advanced.ended)

    def _greedy(self, texts: Texts, rules: TokenRules, n_end: int) -> Texts:
        """Returns the texts until each has ended, or has `n_end` tokens."""
        while True:
            left = (n_end - texts.lengths).masked_fill(texts.last()[:, 0] == self.tokenizer.eot, 0)
            if not left.any():
                return texts
            texts = self.inference.advance(texts, rules.inputs(texts.tokens, 1), left.clamp(max=MAX_STEPS)).texts

    def _rules(self) -> TokenRules | None:
        """Returns None where all logits are needed: to draw tokens at random, for more beams than the stepper has
        candidates for, for hooks, or for a decoder or filters not known."""
        if self.options.temperature != 0:
            not_in_graph("tokens are drawn at random")
            return None
        most = self.model.stepper.max_candidates
        if most is not None and (self.options.beam_size or 0) >= most:
            not_in_graph(f"{most} beams or more, not on a CPU")
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
