"""Decode loops in graphs: what is done between the steps of the decoder, by kernels of our own, on a CPU."""

from collections.abc import Callable, Sequence

from max.dtype import DType
from max.graph import BufferValue, TensorType, TensorValue, ops

from ..network.model import TextDecoder


def embed_next(decoder: TextDecoder, tokens: TensorValue, lengths: TensorValue) -> tuple[TensorValue, TensorValue]:
    """As `TextDecoder.embed`, for tokens (batch, token) the first of which is the last of a text of that length; also
    how many come before it, (batch,)."""
    token_embedding, positional_embedding = decoder.token_embedding.weight, decoder.positional_embedding
    x = TensorType(decoder.policy.compute, [*tokens.shape, token_embedding.shape[1]], tokens.device)
    values = [tokens, lengths, token_embedding, positional_embedding]
    embedded, offsets = ops.custom("maxwhisper.embed", tokens.device, values, [x, lengths.type])
    return embedded.tensor, offsets.tensor


def append(caches: Sequence[BufferValue], new: Sequence[TensorValue], offsets: TensorValue) -> None:
    """Puts every layer's new keys and values, each (batch, token, state), into its cache, behind `offsets` (batch,)
    places."""
    for layer in range(0, len(new), 2):
        values = [*caches[layer : layer + 2], *new[layer : layer + 2], offsets]
        ops.inplace_custom("maxwhisper.append", offsets.device, values)


def nothing_found(lengths: TensorValue, places: TensorValue) -> list[TensorValue]:
    """Candidates of texts, and their log-probabilities, before there are any."""
    shape = [lengths.shape[0], places.shape[0]]
    types = [TensorType(dtype, shape, lengths.device) for dtype in (DType.int64, DType.float32)]
    found = ops.custom("maxwhisper.nothing_found", lengths.device, [lengths, places], types)
    return [each.tensor for each in found]


def goes_on(
    left: TensorValue, credit: TensorValue, before: TensorValue, lengths: TensorValue, worth: int
) -> list[TensorValue]:
    """Whether there is another round, and its credit: the graph of `maxwhisper.goes_on`."""
    device = lengths.device
    types = [TensorType(DType.bool, [1], device), credit.type]
    values = [left, credit, before, lengths, ops.constant([worth], DType.int64, device)]
    go_on, credit = (each.tensor for each in ops.custom("maxwhisper.goes_on", device, values, types))
    return [go_on.reshape(()), credit]


def rounds(worth: int, start: Sequence[TensorValue], body: Callable[..., Sequence[TensorValue]]) -> list[TensorValue]:
    """What is left of `start` after as many rounds as are worth it, one at least. body: of the credit and these values,
    `goes_on` and the next ones."""
    device = start[0].device
    state = [ops.constant(True, DType.bool, device), ops.constant([worth], DType.int64, device), *start]
    _, _, *end = ops.while_loop(state, lambda go_on, *_: go_on, lambda _, *values: body(*values))
    return end
