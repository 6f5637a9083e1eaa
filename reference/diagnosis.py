"""What a failure looks like: common mistakes, tried on the right values, and what error each leaves unexplained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_WIDTH = 64
"""Channels of a head in every Whisper model."""
EXPLAINED = 0.2
"""A mistake explains a failure if it leaves less than this share of the error."""


@dataclass(frozen=True)
class Diagnosis:
    """A mistake that turns the oracle's values nearly into the subject's.

    before, after: relative L2 of the subject to the oracle, and to the oracle with the mistake made.
    """

    name: str
    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.name} (relative L2 {self.before:.1e}, with this mistake in the oracle {self.after:.1e})"


def diagnose(oracle: Tensor, subject: Tensor, inside: Mapping[str, Tensor] | None = None) -> tuple[Diagnosis, ...]:
    """Returns the mistakes that explain the difference, the best explanation first.

    inside: what the oracle makes of its inputs with mistakes that its values do not show, by their names.
    """
    before = distance(oracle, subject)
    tried = [*mistakes(oracle, subject), *(inside or {}).items()]
    found = [Diagnosis(name, before, distance(mistaken, subject)) for name, mistaken in tried]
    return tuple(sorted((each for each in found if each.after < EXPLAINED * before), key=lambda each: each.after))


def distance(oracle: Tensor, subject: Tensor) -> float:
    norm = float(oracle.norm())
    return float((subject - oracle).norm()) / (norm or 1.0)


def mistakes(oracle: Tensor, subject: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields every mistake's name and what it makes of the oracle's values (..., position, channel)."""
    if float(oracle.norm()):
        scale = float((oracle * subject).sum() / oracle.square().sum())
        yield f"scaled by {scale:.4g}", oracle * scale
    difference = subject - oracle
    yield f"a constant added, {float(difference.mean()):.4g}", oracle + difference.mean()
    if oracle.ndim < 2:
        return
    n_position, n_channel = oracle.shape[-2:]
    if n_position > 2:
        yield "a constant vector added to every position, as by a bias", oracle + difference.mean(-2, keepdim=True)
        yield "positions shifted by one, to later ones", shifted(oracle, subject, 1)
        yield "positions shifted by one, to earlier ones", shifted(oracle, subject, -1)
        transposed = oracle.transpose(-1, -2).reshape(oracle.shape)
        yield "position and channel transposed", transposed
    if oracle.shape[0] > 1:
        yield "rows of the batch in reverse order", oracle.flip(0)
    if n_channel % HEAD_WIDTH == 0 and n_channel > HEAD_WIDTH:
        yield from permuted_heads(oracle, subject)
        interleaved = oracle.unflatten(-1, (HEAD_WIDTH, -1)).transpose(-1, -2).reshape(oracle.shape)
        yield "channels of every head interleaved", interleaved


def shifted(oracle: Tensor, subject: Tensor, by: int) -> Tensor:
    """Returns the oracle with its positions moved; what stands where nothing was moved to is the subject's own."""
    moved = oracle.roll(by, -2)
    edge = 0 if by > 0 else -1
    moved[..., edge, :] = subject[..., edge, :]
    return moved


def permuted_heads(oracle: Tensor, subject: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the oracle with its heads in the order in which the subject's resemble them, if that is not their own."""
    heads = oracle.unflatten(-1, (-1, HEAD_WIDTH))
    right, ours = (x.movedim(-2, 0).flatten(1) for x in (heads, subject.unflatten(-1, (-1, HEAD_WIDTH))))
    order = torch.cdist(ours, right).argmin(1)
    if not torch.equal(order, torch.arange(len(order), device=order.device)):
        yield f"heads permuted: {order.tolist()}", heads[..., order, :].flatten(-2)
