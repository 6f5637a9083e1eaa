"""Keys and values of attention, and the caches that they are read from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from max.graph import BufferValue, Dim, TensorType, TensorValue, ops

from .shapes import indices


class KeyValue(NamedTuple):
    """Keys and values of one attention, each (batch, head, token, channel)."""

    k: TensorValue
    v: TensorValue


def by_layer(given: Mapping[str, Any], n_layer: int, *kinds: str) -> list[dict[str, Any]]:
    """Returns the keys and values of some kinds that the graph of a whole decoder is given, layer by layer, by their
    names in one: `k_cross` and `v_cross` of the kind "cross", which are `k_cross.0` and `v_cross.0` of the first."""
    names = [f"{name}_{kind}" for kind in kinds for name in "kv"]
    return [{name: given[f"{name}.{layer}"] for name in names} for layer in range(n_layer)]


def tokens_first(kv: KeyValue) -> tuple[TensorValue, TensorValue]:
    """Returns keys and values as (batch, token, head, channel), which a GPU reads them as."""
    return ops.permute(kv.k, [0, 2, 1, 3]), ops.permute(kv.v, [0, 2, 1, 3])


class Cache(NamedTuple):
    """Keys and values of the tokens before, each (row, head, position, channel), in the first `length` positions;
    length is int64 on the CPU, a scalar, or (batch,) where a kernel of ours attends. What other positions hold is never
    read.

    rows: int64 (batch, position), for kernels of ours, which find a text's key and value of a position in that row;
    where there are none, every text has its own row.
    """

    k: TensorValue
    v: TensorValue
    length: TensorValue
    rows: TensorValue | None = None

    def for_kernel(self, batch: Dim) -> list[TensorValue]:
        """Returns what kernels take: keys, values, length and rows of every text."""
        rows = self.rows
        if rows is None:
            rows = ops.unsqueeze(indices(batch, self.k.device), 1).broadcast_to((batch, self.k.shape[2]))
        return [self.k, self.v, self.length.broadcast_to((batch,)), rows]

    def followed_by(self, new: KeyValue) -> KeyValue:
        """Returns the cached keys and values and the new ones, in new memory."""
        assert self.rows is None, "only kernels of ours read other rows"
        filled = (slice(0, self.length), "past")
        past = (x[:, :, filled] for x in (self.k, self.v))
        return KeyValue(*(ops.concat(pair, axis=2) for pair in zip(past, new, strict=True)))


class Slots(NamedTuple):
    """A cache on any device, for one token of each text, whose key and value are put into it before it is read.

    k, v: (batch, position, head, channel).
    k_written, v_written: the same memory, to be written.
    n_past: int64 (batch,), how many positions of a text are filled; what others hold is never read.
    rows: int64 (batch, position), in which row of k and v a text's key and value of a filled position are; what is new
        goes into the text's own.
    """

    k: TensorValue
    v: TensorValue
    k_written: BufferValue
    v_written: BufferValue
    n_past: TensorValue
    rows: TensorValue

    def filled(self, qkv: TensorValue) -> TensorValue:
        """Puts new keys and values into the cache, of queries, keys and values side by side, (batch, 1, 3 * state);
        returns the queries, (batch, 1, state).

        That they are there the graph only knows by the queries, which the operation returns that puts them there.
        """
        queries = TensorType(qkv.dtype, [qkv.shape[0], 1, self.k.shape[2] * self.k.shape[3]], qkv.device)
        values = [self.k_written, self.v_written, qkv, self.n_past]
        return ops.inplace_custom("maxwhisper.store", qkv.device, values, [queries])[0].tensor
