"""The protocol between openai-whisper's loop and what decodes: texts, and who takes them some tokens further."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.program import Executable
from ..errors import DecodingError, OptionError
from .cache import KeyValueCache
from .rules import Rules


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
        """Makes texts of the same length."""
        return cls(tokens, torch.full((len(tokens),), tokens.shape[1]), totals)

    @classmethod
    def joined(cls, texts: Sequence["Texts"], eot: int) -> "Texts":
        width = max(each.tokens.shape[1] for each in texts)
        tokens = [functional.pad(each.tokens, (0, width - each.tokens.shape[1]), value=eot) for each in texts]
        return cls(torch.cat(tokens), *(torch.cat(each) for each in list(zip(*texts, strict=True))[1:]))

    def last(self) -> Tensor:
        """Returns the last token of each, (batch, 1)."""
        return self.tokens.gather(1, self.lengths[:, None] - 1)


class Advanced(NamedTuple):
    """What a stepper gives: texts with the likeliest token of each step behind them, and the candidates of the last
    step.

    Of a stepper's own beam search, beams, and each one's likeliest candidate. ended: of each window the texts that have
    ended, and the sums of their log-probabilities.
    """

    texts: Texts
    candidates: Candidates
    ended: Sequence[Mapping[tuple[int, ...], float]] = ()


def checked(advanced: Advanced) -> Advanced:
    """Raises DecodingError if a logit was NaN, or no token is left."""
    if not all(map(math.isfinite, advanced.candidates.logprobs[:, 0].tolist())):
        raise DecodingError("logits are not finite, or the rules of decoding exclude every token")
    return advanced


class Graphs(Protocol):
    """Compiled graphs by name."""

    def __getitem__(self, name: str) -> Executable:
        """Returns the graph, which may compile now."""


class Stepper(Protocol):
    """What decodes texts: on a CPU, on a GPU, by speculation, or together with other texts."""

    @property
    def max_candidates(self) -> int | None:
        """Says how many candidates of a step it finds at most; None for as many as are wanted."""

    @property
    def tokens_first(self) -> bool:
        """Says whether it takes caches of several windows with the tokens of a row before its heads."""

    @property
    def searches(self) -> bool:
        """Says whether it does beam search by itself, where rules say how many texts are wanted to end."""

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: Tensor) -> Advanced:
        """Decodes texts, all but the last tokens of which are in the cache: each by at most as many tokens as `n_token`
        (batch,) says, until one has ended or has as many, or sooner, but by one at least.

        A text that gets none stays as it is, but its cache is lost. A window's beams, texts of one length, get tokens
        until enough have ended. Raises OptionError where the cache has no room.
        """


def check_room(n_token: int, n_text_ctx: int) -> None:
    """Raises OptionError if a text has more tokens than the model has positions for."""
    if n_token > n_text_ctx:
        raise OptionError(f"the text has {n_token} tokens, the model has positions for {n_text_ctx}")
