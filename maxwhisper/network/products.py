"""Products with matrices and convolutions: by kernels of our own for a CPU, by MAX's for other devices."""

from collections.abc import Callable
from typing import Any

from max.dtype import DType
from max.graph import Dim, Graph, StaticDim, TensorType, TensorValue, ops

FEW_TOKENS = 16
"""So many rows wait for memory, not for arithmetic, when they are multiplied with a matrix; audio has more."""

DECODER_LAYERS = (
    *("attn_ln", "attn.query", "attn.key", "attn.value", "attn.out"),
    *("cross_attn_ln", "cross_attn.query", "cross_attn.out", "mlp_ln", "mlp.0", "mlp.2"),
)
"""The submodules of a decoder's layer in the order in which kernels of our own take their weights."""


def linear(x: TensorValue, weight: TensorValue, bias: TensorValue | None = None) -> TensorValue:
    """Returns x @ weight.T + bias in the dtype of x: (batch, token, n_in) by (n_out, n_in) to (batch, token, n_out).

    It is rounded once, the bias added, as PyTorch does. A product that is rounded before its bias is added is wrong by
    nearly the same at every position: by how far the bias is from a multiple of the product's last digit.
    """
    y = (convolution if is_audio(x) else text_product)(x, weight)
    return (y if bias is None else y + bias).cast(x.dtype)


def is_audio(x: TensorValue) -> bool:
    """Tells whether x (batch, token, state) has as many tokens as audio has, which is known when a graph is built."""
    return isinstance(x.shape[1], StaticDim) and int(x.shape[1]) > FEW_TOKENS


def convolve(x: TensorValue, weight: TensorValue, bias: TensorValue, stride: int) -> TensorValue:
    """Convolves over time in the dtype of x: (batch, frame, n_in) by (n_out, n_in, taps) to (batch, frame, n_out)."""
    return (convolution(x, weight, stride) + bias).cast(x.dtype)


def text_product(x: TensorValue, weight: TensorValue) -> TensorValue:
    """Computes x @ weight.T in float32 for as many rows as a text has tokens, on a CPU.

    It is a kernel of our own, which reads the weights as they are stored, once: MAX's matrix product would first copy
    them all into another layout, which takes longer than the product itself.
    """
    return custom_product("maxwhisper.linear", x, weight, x.shape[1])


def convolution(x: TensorValue, weight: TensorValue, stride: int = 1, n_y: Dim | None = None) -> TensorValue:
    """Convolves over time in float32, without padding and bias, on a CPU: x (batch, frame, n_in) by weight (n_out,
    n_in, taps), or (n_out, n_in) for one tap, to (batch, n_y, n_out).

    It is a kernel of our own for the many rows that audio has. n_y: as many frames as that makes, where the number of
    x's is symbolic.
    """
    n_out, taps = weight.shape[0], int(weight.shape[2]) if weight.rank == 3 else 1
    if n_y is None:
        n_y = Dim((int(x.shape[1]) - taps) // stride + 1)
    parameters = {"taps": taps, "stride": stride}
    return custom_product("maxwhisper.convolution", x, weight.reshape((n_out, -1)), n_y, parameters)


def convolution_by_product(
    x: TensorValue, weight: TensorValue, bias: TensorValue | None = None, stride: int = 1
) -> TensorValue:
    """Convolves over time in the dtype of x by one matrix product, of the frames that each output sees, side by side,
    where MAX 26.7 has no kernel for GPUs but a plain loop. x: (batch, frame, n_in); weight: (n_out, n_in, taps)."""
    n_out, taps = int(weight.shape[0]), int(weight.shape[2])
    last = int(x.shape[1]) - taps
    seen = ops.concat([x[:, tap : last + tap + 1 : stride] for tap in range(taps)], axis=2)
    rows = ops.permute(weight, [0, 2, 1]).reshape((n_out, -1))
    return device_product(seen, rows, bias)


def custom_product(
    name: str, x: TensorValue, weight: TensorValue, n_row: Dim, parameters: dict[str, Any] | None = None
) -> TensorValue:
    """Multiplies x (batch, row, n_in) with a matrix by a kernel of ours, to float32 (batch, n_row, n_out); the kernel
    rounds the weights to the dtype of x, as PyTorch does."""
    y = TensorType(DType.float32, [x.shape[0], n_row, weight.shape[0]], x.device)
    return ops.custom(name, x.device, [x, weight], [y], parameters=parameters)[0].tensor


def device_product(x: TensorValue, weight: TensorValue, bias: TensorValue | None = None) -> TensorValue:
    """Computes `linear` off the CPU. In bfloat16 it is rounded before the bias is added: with anything else behind it,
    MAX 26.7's kernel for an H100 does not compile."""
    if x.dtype == DType.float32:
        y = float32_product(x, weight.cast(x.dtype))
        return y if bias is None else y + bias
    if bias is not None and x.dtype == DType.float16:
        return biased_product(x, weight.cast(x.dtype), bias)
    return shared(matrix_product, *((x, weight) if bias is None else (x, weight, bias)))


def matrix_product(x: TensorValue, weight: TensorValue, bias: TensorValue | None = None) -> TensorValue:
    """Computes `linear` by MAX's operation, which rounds to the dtype of x what a bias is then added to."""
    y = x @ ops.transpose(weight.cast(x.dtype), 0, 1)
    return y if bias is None else y + bias.cast(x.dtype)


def biased_product(x: TensorValue, weight: TensorValue, bias: TensorValue) -> TensorValue:
    """Computes `linear`, rounded once, by MAX's kernels in an operation of our own."""
    rows = x.reshape((-1, x.shape[2]))
    shape = [rows.shape[0], weight.shape[0]]
    types = [TensorType(dtype, shape, x.device) for dtype in (x.dtype, DType.float32)]
    y = ops.custom("maxwhisper.biased_product", x.device, [rows, weight, bias], types)[0].tensor
    return y.reshape((*x.shape[:2], weight.shape[0]))


def float32_product(x: TensorValue, weight: TensorValue) -> TensorValue:
    """Computes x @ weight.T in float32, where MAX's kernels for GPUs would take TF32, by the vendor's library."""
    rows = x.reshape((-1, x.shape[2]))
    y = TensorType(x.dtype, [rows.shape[0], weight.shape[0]], x.device)
    product = ops.custom("maxwhisper.float32_product", x.device, [rows, weight], [y])[0].tensor
    return product.reshape((*x.shape[:2], weight.shape[0]))


def step_product(
    x: TensorValue,
    weight: TensorValue,
    bias: TensorValue | None = None,
    norm: Any = None,
    activated: bool = False,
    residual: TensorValue | None = None,
    dtype: DType | None = None,
) -> TensorValue:
    """Computes `linear` of one token of each text, x (batch, 1, n_in), by an operation of ours for any device: of its
    layer norm where there is a `norm`, with GELU behind it if `activated`, a `residual` added. Of few texts it is one
    kernel, and rounded once, to the dtype of x or another."""
    n_in, n_out = int(x.shape[2]), weight.shape[0]
    rows, float32 = x.reshape((-1, n_in)), DType.float32
    of_products = float32 if x.dtype == DType.float16 else x.dtype
    kinds = ((dtype or x.dtype, n_out), (x.dtype, n_in), (of_products, n_out))
    types = [TensorType(kind, [rows.shape[0], width], x.device) for kind, width in kinds]
    not_read = norm.bias if bias is None else bias
    norms = [not_read, not_read] if norm is None else [norm.weight, norm.bias]
    values = [rows, weight.cast(x.dtype), not_read if bias is None else bias, *norms]
    values.append(rows if residual is None else residual.reshape((-1, n_out)))
    parameters = {"n_in": n_in, "normed": norm is not None, "biased": bias is not None}
    parameters |= {"activated": activated, "added": residual is not None}
    y = ops.custom("maxwhisper.step_product", x.device, values, types, parameters=parameters)[0].tensor
    return y.reshape((x.shape[0], 1, n_out))


def shared(function: Callable[..., TensorValue], *inputs: TensorValue) -> TensorValue:
    """Calls function(*inputs) as a subgraph that all calls with inputs of the same types share.

    MAX fuses what follows a matrix product into its kernel and compiles that kernel again for every difference, eight
    seconds each; behind a subgraph's boundary all products of one shape are one kernel.
    """
    subgraphs: dict[str, Graph] = vars(Graph.current).setdefault("maxwhisper_subgraphs", {})
    key = f"{function.__name__}{[value.type for value in inputs]}"
    if key not in subgraphs:
        name = f"{Graph.current.name}.{function.__name__}.{len(subgraphs)}"
        types = [value.type for value in inputs]
        with Graph.current.add_subgraph(name, input_types=types, devices=[inputs[0].device]) as subgraph:
            subgraph.output(function(*(value.tensor for value in subgraph.inputs)))
        subgraphs[key] = subgraph
    return ops.call(subgraphs[key], *inputs)[0].tensor
