"""What the graphs for a GPU consist of, as they are built: neither a GPU nor a compiler is needed."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from max.dtype import DType
from max.graph import DeviceRef
from max.graph import Module as GraphModule
from whisper.model import ModelDimensions

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.decoding.gpu import search_program, step_program
from maxwhisper.engine.program import Program
from maxwhisper.engine.session import Policy
from maxwhisper.network.blocks import BLOCKS
from maxwhisper.network.log_mel import LOG_MEL
from reference.fixtures import NANO

DTYPES = pytest.mark.parametrize("dtype", [DType.float32, DType.float16, DType.bfloat16], ids=lambda dtype: dtype.name)
ATTENTION = {"split_attention", "cached_split_attention", "device_scores", "store"}
STEPS = {"embed_last", "step_product", "device_select", "device_beams"}
OTHERS = {
    DType.float32: {"float32_product", "limited_split_attention"},
    DType.float16: {"biased_product", "device_attention"},
    DType.bfloat16: {"device_attention"},
}


@cache
def graphs(dtype: DType) -> str:
    """Returns all that a model executes on a GPU, and the blocks of the suite, as MAX is given them: of one layer,
    which others repeat."""
    dims = replace(load_checkpoint(NANO).dims, n_audio_layer=1, n_text_layer=1)
    policy, module = Policy(DeviceRef.GPU(), dtype, dtype), GraphModule()
    programs: list[Program] = [block.program(dims, policy) for name, block in BLOCKS.items() if name != LOG_MEL]
    for program in (*programs, step_program(dims, policy), search_program(dims, policy)):
        program.trace(module)
    return module._to_mlir_str()


@DTYPES
def test_attention_is_by_operations_of_ours(dtype: DType) -> None:
    """MAX's split a query's keys in parts that they put together wrongly, and take TF32 for float32; so do its plain
    products, of four dimensions here."""
    operations = set(re.findall(r'symbol = "([\w.]+)"', graphs(dtype)))
    assert operations == {f"maxwhisper.{name}" for name in ATTENTION | STEPS | OTHERS[dtype]}


@DTYPES
def test_no_product_of_maxs_is_of_float32(dtype: DType) -> None:
    """It would be of TF32."""
    dtypes = Counter(re.findall(r"matmul.*: \(!mo.tensor<\[.*?\], (\w+), gpu", graphs(dtype)))
    assert set(dtypes) == ({"f16"} if dtype == DType.float16 else {"bf16"} if dtype == DType.bfloat16 else set())
    assert dtypes.total() == graphs(dtype).count("rmo.matmul(")


def test_a_bias_is_added_behind_every_float32_product_that_has_one() -> None:
    """The vendor's library multiplies, so that no arithmetic of it is judged without a GPU."""
    product = r'(%\d+) = mo.custom \[symbol = "maxwhisper.float32_product".*'
    added = rf"{product}\n +(%\d+) = rmo.reshape\(\1\).*\n +%\d+ = rmo.add\(\2, "
    n_biased = graphs(DType.float16).count('"maxwhisper.biased_product"')
    assert len(re.findall(added, graphs(DType.float32))) == n_biased > 0


@pytest.mark.parametrize("program", [step_program, search_program])
def test_a_step_can_be_captured(program: Callable[[ModelDimensions, Policy], Program]) -> None:
    """A replay runs nothing on the CPU: all that a step takes is on the GPU, only weights are brought there, which is
    once, and nothing is given back but in what it takes."""
    dims, module = load_checkpoint(NANO).dims, GraphModule()
    made = program(dims, Policy(DeviceRef.GPU(), DType.float16, DType.float16))
    assert all(kind.device == DeviceRef.GPU() for kind in made.inputs.values())
    made.trace(module)
    text = module._to_mlir_str()
    assert 0 < text.count("mo.constant.external") == text.count("rmo.mo.transfer[")
    assert re.search(r"^ +mo.output$", text, re.MULTILINE)


@pytest.mark.parametrize("program", [step_program, search_program])
def test_a_step_has_few_operations(program: Callable[[ModelDimensions, Policy], Program]) -> None:
    """Each is one kernel for few texts, but attention and selecting two: 11 kernels a layer, and 4 or 5 beside them."""
    dims, module = load_checkpoint(NANO).dims, GraphModule()
    program(dims, Policy(DeviceRef.GPU(), DType.float16, DType.float16)).trace(module)
    text, n = module._to_mlir_str(), dims.n_text_layer
    of_beams = {"device_beams": 1} if program is search_program else {}
    attention = {"store": n, "cached_split_attention": n, "split_attention": n}
    others = {"step_product": 6 * n + 1, "embed_last": 1, "device_select": 1}
    assert Counter(re.findall(r'symbol = "maxwhisper\.(\w+)"', text)) == {**attention, **others, **of_beams}
    assert set(re.findall(r" = (r?mo\.[\w.]+)", text)) <= VIEWS


VIEWS = {"mo.constant", "mo.constant.external", "mo.chain.create", "mo.custom", "rmo.mo.transfer", "rmo.reshape"}
"""What is no kernel, beside operations of ours."""
