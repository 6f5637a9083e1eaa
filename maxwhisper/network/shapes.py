"""Lengths, positions and masks of values whose dimensions are known when the graph runs."""

from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorValue, ops

from ..engine.session import Policy


def length(dim: Dim) -> TensorValue:
    """Returns the length of a dimension, known when the graph runs, as an int64 scalar on the CPU."""
    return ops.shape_to_tensor([dim]).reshape(())


def indices(dim: Dim, device: DeviceRef) -> TensorValue:
    """Returns 0, 1, 2 ... along a dimension, int64."""
    return ops.range(0, length(dim), 1, out_dim=dim, dtype=DType.int64, device=device)


def causal_mask(n_token: Dim, policy: Policy) -> TensorValue:
    """Returns (token, token): 0 where a query may see a key, minus infinity where the key is later.

    It is made by band_part: MAX 26.7 drops a mask that is made by comparing positions when it fuses attention on CPU.
    """
    minus_infinity = ops.constant(float("-inf"), DType.float32, policy.device)
    return ops.band_part(minus_infinity.broadcast_to((n_token, n_token)), num_lower=-1, num_upper=0, exclude=True)


def split_rows(x: TensorValue, n_row: Dim) -> TensorValue:
    """Turns (batch, token, state) to (n_row, batch / n_row * token, state): consecutive sequences share a row."""
    batch, n_token, n_state = x.shape
    if batch == n_row:
        return x
    width = batch * n_token // n_row
    return x.reshape((batch * n_token, n_state)).rebind((n_row * width, n_state)).reshape((n_row, width, n_state))


def join_rows(x: TensorValue, batch: Dim, n_token: Dim) -> TensorValue:
    """Undoes `split_rows`: back to (batch, n_token, state)."""
    n_row, width, n_state = x.shape
    if batch == n_row:
        return x
    return x.reshape((n_row * width, n_state)).rebind((batch * n_token, n_state)).reshape((batch, n_token, n_state))
