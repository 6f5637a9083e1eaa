"""What Python and the Mojo kernels both say of a layout, by position or by number: the same."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from max.dtype import DType
from max.graph import DeviceRef, TensorType

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.decoding import rules, speculative
from maxwhisper.decoding.rules import TokenRules, rules_inputs, texts_inputs
from maxwhisper.decoding.speculative import MATRICES, SCALE_SIZE, VECTORS, WEIGHTS, Draft, draft_types, propose
from maxwhisper.engine.kernel_library import KERNELS
from maxwhisper.engine.session import Policy
from maxwhisper.network.keys_values import Cache, KeyValue
from maxwhisper.network.model import LayerNorm, ResidualAttentionBlock
from maxwhisper.network.products import DECODER_LAYERS

from .test_speculation import NANO

NUMBERS = {
    "layer_norm.mojo": {"EPSILON": LayerNorm.epsilon},
    "quantized.mojo": {"ZERO_POINT": speculative.ZERO_POINT},
    "select_tokens.mojo": {"TIMESTAMP_BEGIN": rules.TIMESTAMP_BEGIN, "END_OF_TEXT": rules.END_OF_TEXT},
}
"""By the kernels' files and constants: their values in Python."""

KERNELS_NAMES = {"attn.": "", "cross_attn.": "cross_", "mlp.0": "hidden", "mlp.2": "mlp"}
"""What kernels call the submodules of a decoder's layer, where it is not their own name."""


def kernels_name(path: str) -> str:
    """Returns what kernels call a submodule, or a weight, of a decoder's layer."""
    start = next((start for start in KERNELS_NAMES if path.startswith(start)), "")
    return (KERNELS_NAMES.get(start, "") + path.removeprefix(start)).replace(".", "_")


def source(file: str) -> str:
    return (KERNELS / file).read_text()


def operands(file: str, operation: str) -> dict[str, str]:
    """Returns the operands of a registered operation, in order: name, and kind of tensor."""
    _, registered = source(file).split(f'@extensibility.register("{operation}")')
    arguments = registered.split("def execute")[1].split("ctx: DeviceContext")[0]
    return dict(re.findall(r"(\w+): _?(Output|Input|MutableInput)Tensor\[", arguments))


def inputs(file: str, operation: str) -> list[str]:
    return [name for name, kind in operands(file, operation).items() if kind != "Output"]


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in NUMBERS.items() for name in names])
def test_a_number_is_the_same_in_a_kernel(file: str, name: str) -> None:
    (value,) = re.findall(rf"(?m)^comptime {name} = (\S+)", source(file))
    assert float(value) == NUMBERS[file][name]


def test_a_kernel_takes_a_layers_weights_in_the_order_of_its_submodules() -> None:
    names = operands("decoder_block.mojo", "maxwhisper.decoder_block")
    outputs = [name for name, kind in names.items() if kind == "Output"]
    given = [kernels_name(layer).replace("out", "attn") for layer in DECODER_LAYERS]  # named by the submodule around it
    assert outputs[1 : 1 + len(DECODER_LAYERS)] == given
    weights = [name for name in names if name.endswith(("_weight", "_bias"))]
    assert list(names)[-len(weights) :] == weights
    assert weights == [kernels_name(name) for name in WEIGHTS if name in (*MATRICES, *VECTORS)]


def test_a_kernel_takes_texts_and_rules_in_the_order_of_a_graphs_inputs() -> None:
    assert inputs("select_tokens.mojo", "maxwhisper.select_tokens") == ["logits", *texts_inputs(), *rules_inputs(9)]


class Named(str):
    """What stands for the value of a kernel's operand, by its name there."""

    shape = (1, 1, 64)
    device = DeviceRef.CPU()
    dtype = DType.float32

    def same(self, _: Any) -> "Named":
        return self

    cast = broadcast_to = same


def test_a_kernel_takes_a_layers_values_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def custom(name: str, _: DeviceRef, values: list[Any], types: list[TensorType], **parameters: Any) -> list[Any]:
        taken.extend([values, types])
        return [SimpleNamespace(tensor=Named(number)) for number in range(len(types))]

    monkeypatch.setattr("maxwhisper.network.backends.ops.custom", custom)
    names = operands("decoder_block.mojo", "maxwhisper.decoder_block")
    outputs = [name for name, kind in names.items() if kind == "Output"]
    x, k, v, n_past, rows, *cross = given = [Named(name) for name in [*names][len(outputs) :][:7]]
    assert given == ["x", "k", "v", "n_past", "rows", "k_cross", "v_cross"]
    policy = Policy(DeviceRef.CPU(), DType.float32, DType.float32)
    block = ResidualAttentionBlock(64, 2, policy, cross_attention=True)
    y, found = block.kernel_outputs(x, KeyValue(*cross), Cache(k, v, n_past, rows))  # type: ignore[arg-type]
    values, types = taken
    assert values[:7] == given
    assert [name for name, of in zip(outputs, types, strict=True) if of.shape[2] == 256] == ["hidden", "active"]
    hidden, active, mlp = block.mlp
    named = {"attn_ln": block.attn_ln, "query": block.attn.query, "key": block.attn.key, "value": block.attn.value}
    named |= {"attn": block.attn, "cross_attn": block.cross_attn, "cross_query": block.cross_attn.query}
    named |= {
        "cross_attn_ln": block.cross_attn_ln,
        "mlp_ln": block.mlp_ln,
        "hidden": hidden,
        "active": active,
        "mlp": mlp,
    }
    assert y == "0" and {name: found[module] for name, module in named.items()} == {
        name: str(outputs.index(name)) for name in named
    }


def test_a_kernel_takes_what_it_proposes_by_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def inplace_custom(name: str, _: DeviceRef, values: list[Any], *others: Any, **parameters: Any) -> list[Any]:
        taken.extend(values)
        return [SimpleNamespace(tensor=None)]

    monkeypatch.setattr(speculative.ops, "inplace_custom", inplace_custom)
    names = inputs("draft.mojo", "maxwhisper.propose")
    named = {"quantized cross" if name == "cross" else name: Named(name) for name in names}
    ln = SimpleNamespace(weight="ln_weight", bias="ln_bias")
    embedding = SimpleNamespace(weight="token_embedding")
    decoder: Any = SimpleNamespace(token_embedding=embedding, positional_embedding="positional_embedding", ln=ln)
    propose(decoder, Draft("matrices", "vectors", "quantized_embedding"), named)
    assert taken == names


def test_a_drafts_weights_stand_where_the_kernel_looks_for_them() -> None:
    """In the order of the kernel's source: it has the offset of each in terms of the layer's sizes."""
    checkpoint = load_checkpoint(NANO)
    n_state, n_hidden = checkpoint.dims.n_text_state, 4 * checkpoint.dims.n_text_state
    body = re.sub(r"row_size\[DType\.int8\]\((\w+)\)", rf"(\1 + {SCALE_SIZE})", source("draft.mojo"))
    body = body.split("def layer_weights(")[1].split("\n\n")[0]
    sizes = {"n_state": n_state, "n_hidden": n_hidden}
    for name, formula in re.findall(r"var (\w+) = (.+)", body):
        sizes[name] = eval(formula, {}, sizes)
    looked_for = {
        kind: {name: eval(offset or "0", {}, sizes) for name, offset in re.findall(pattern, body)}
        for kind, pattern in (
            (kind, rf"(\w+)={kind}(?:\.unsafe_offset\((.+)\))?,\n") for kind in ("matrices", "vectors")
        )
    }
    tensors = {name: checkpoint.tensors[f"decoder.blocks.0.{name}"] for name in (*MATRICES, *VECTORS)}
    types = draft_types(checkpoint.dims, SimpleNamespace(device=DeviceRef.CPU()))  # type: ignore[arg-type]
    for kind, names in (("matrices", MATRICES), ("vectors", VECTORS)):
        end, stands = 0, {}
        for name in names:
            stands[kernels_name(name)] = end
            shape = tensors[name].shape
            end += shape[0] * (shape[1] + SCALE_SIZE) if kind == "matrices" else shape[0]
        assert looked_for[kind] == stands
        assert int(getattr(types, kind).shape[1]) == end
    (beside,) = re.findall(r"n_hidden=vectors\.dim_size\(1\) - (\d+) \* n_state", source("draft.mojo"))
    assert n_hidden == int(types.vectors.shape[1]) - int(beside) * n_state


def test_limits_are_where_they_are_looked_for() -> None:
    given = TokenRules(9, 1, 7).inputs(torch.zeros(1, 1), 1)
    assert (given.limits[rules.TIMESTAMP_BEGIN], given.limits[rules.END_OF_TEXT]) == (9, 7)
