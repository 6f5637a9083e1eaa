"""What Python and the Mojo kernels both say of a layout, by position or by number: the same."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from max.dtype import DType
from max.graph import DeviceRef, TensorType, ops

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.decoding import cpu, gpu, rules, speculative
from maxwhisper.decoding.rules import TokenRules, top_tokens
from maxwhisper.decoding.speculative import MATRICES, SCALE_SIZE, VECTORS, WEIGHTS, Draft, draft_types, propose
from maxwhisper.engine.kernel_library import KERNELS
from maxwhisper.engine.session import Policy
from maxwhisper.network.keys_values import Cache, KeyValue
from maxwhisper.network.model import LayerNorm, MultiHeadAttention, ResidualAttentionBlock
from maxwhisper.network.products import DECODER_LAYERS, step_product

from .test_speculation import NANO

NUMBERS: dict[str, dict[str, float]] = {
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


class Named(str):
    """What stands for the value of a kernel's operand, by its name there."""

    shape: tuple[int, ...] = (1, 1, 64)
    device = DeviceRef.CPU()
    dtype = DType.float32
    type = None

    def same(self, _: Any) -> "Named":
        return self

    cast = broadcast_to = reshape = same


Operation = tuple[list[Any], list[TensorType]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Operation]:
    """The values and the types of outputs that operations of ours are called with, by name; a constant is the operand
    `worth`, as it is where there is one."""
    found: dict[str, Operation] = {}

    def custom(name: str, _: DeviceRef, values: list[Any], types: Any = (), **parameters: Any) -> list[Any]:
        found[name.removeprefix("maxwhisper.")] = values, types
        return [SimpleNamespace(tensor=Named(number)) for number in range(len(types))]

    monkeypatch.setattr(ops, "custom", custom)
    monkeypatch.setattr(ops, "inplace_custom", custom)
    monkeypatch.setattr(ops, "constant", lambda *_: Named("worth"))
    return found


POLICY = Policy(DeviceRef.CPU(), DType.float32, DType.float32)
Operands = dict[str, Any]


def decoder(given: Operands) -> Any:
    """What of a decoder is an operand, beside its layers."""
    weights = ("token_embedding", "ln")
    named = {name: SimpleNamespace(weight=given.get(name, f"{name}_weight"), bias=f"{name}_bias") for name in weights}
    return SimpleNamespace(policy=POLICY, positional_embedding=given.get("positional_embedding"), **named)


def written(given: Operands, *names: str) -> Operands:
    """Operands by the names of a graph's inputs, some of which are those that it writes into."""
    return {f"{name} written" if name in names else name: value for name, value in given.items()}


def selected(given: Operands) -> None:
    logits = given.pop("logits")
    logits.shape = (1, 9)
    gpu.select(logits, written(given, *gpu.STATE), 1, True)


def beams(given: Operands) -> None:
    ended = {name: given.pop(name.replace("ended", "finished")) for name in gpu.ENDED}
    gpu.choose_beams({**written(given, *gpu.STATE, "rows"), **ended}, POLICY.device)


def proposed(given: Operands) -> None:
    draft = Draft(given["matrices"], given["vectors"], given["quantized_embedding"])
    propose(decoder(given), draft, {**given, "quantized cross": given["cross"]})


def cached(given: Operands) -> None:
    attn = MultiHeadAttention(64, 1, POLICY)
    cache = Cache(given["k"], given["v"], given["n_past"], given["rows"])
    attn.by_kernel(given["q"], KeyValue(given["k_new"], given["v_new"]), cache=cache)


def in_place(given: Operands) -> None:
    q = given.pop("q")
    slots: Any = SimpleNamespace(filled=lambda qkv: q, **given)
    MultiHeadAttention(64, 1, POLICY).attend_in_place(Named("qkv"), slots)


def step(given: Operands) -> None:
    norm = SimpleNamespace(weight=given.pop("norm_weight"), bias=given.pop("norm_bias"))
    step_product(**given, norm=norm)


def appended(given: Operands) -> None:
    caches = {"k_written.0": given["k"], "v_written.0": given["v"]}
    cpu.append(caches, [given["k_new"], given["v_new"]], given["n_past"])


OPERATIONS: dict[str, Callable[[Operands], object]] = {
    "append": appended,
    "cached_attention": cached,
    "cached_split_attention": in_place,
    "device_beams": beams,
    "device_select": selected,
    "goes_on": lambda given: cpu.goes_on(given["left"], given["credit"], given["before"], given["lengths"], 1),
    "propose": proposed,
    "select_tokens": lambda given: top_tokens(given["logits"], given),
    "step_product": step,
}
"""What calls an operation of ours, of its operands by their names in Mojo."""

FILES = {
    operation: file.name
    for file in sorted(KERNELS.glob("*.mojo"))
    for operation in re.findall(r'register\("maxwhisper\.(\w+)"\)', file.read_text())
}


@pytest.mark.parametrize(
    "operation",
    [name for name, file in FILES.items() if len(inputs(file, f"maxwhisper.{name}")) > 4 and name != "decoder_block"],
)
def test_a_kernel_takes_its_operands_in_the_order_of_its_source(operation: str, called: dict[str, Operation]) -> None:
    """Of every operation with more than four; another test has `decoder_block`."""
    names = inputs(FILES[operation], f"maxwhisper.{operation}")
    OPERATIONS[operation]({name: Named(name) for name in names})
    assert called[operation][0] == names


def test_a_kernel_takes_a_layers_values_in_this_order(called: dict[str, Operation]) -> None:
    names = operands("decoder_block.mojo", "maxwhisper.decoder_block")
    outputs = [name for name, kind in names.items() if kind == "Output"]
    x, k, v, n_past, rows, *cross = given = [Named(name) for name in [*names][len(outputs) :][:7]]
    assert given == ["x", "k", "v", "n_past", "rows", "k_cross", "v_cross"]
    block = ResidualAttentionBlock(64, 2, POLICY, cross_attention=True)
    y, found = block.kernel_outputs(x, KeyValue(*cross), Cache(k, v, n_past, rows))  # type: ignore[arg-type]
    values, types = called["decoder_block"]
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
