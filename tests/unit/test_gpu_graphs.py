"""What the graphs for a GPU consist of, as they are built: neither a GPU nor a compiler is needed."""

import re
from collections import Counter
from functools import cache

import pytest
from max.dtype import DType
from max.graph import DeviceRef
from max.graph import Module as GraphModule

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.decoding.gpu import candidates_program, step_program
from maxwhisper.engine.program import Program
from maxwhisper.engine.session import Policy
from maxwhisper.network.blocks import BLOCKS
from maxwhisper.network.log_mel import LOG_MEL
from reference.fixtures import NANO

DTYPES = pytest.mark.parametrize("dtype", [DType.float32, DType.float16, DType.bfloat16], ids=lambda dtype: dtype.name)
ATTENTION = {"split_attention", "cached_split_attention", "device_scores", "store"}
OTHERS = {
    DType.float32: {"float32_product"},
    DType.float16: {"biased_product", "device_attention"},
    DType.bfloat16: {"device_attention"},
}


@cache
def graphs(dtype: DType) -> str:
    """All that a model executes on a GPU, and the blocks of the suite, as MAX is given them."""
    dims, policy, module = load_checkpoint(NANO).dims, Policy(DeviceRef.GPU(), dtype, dtype), GraphModule()
    programs: list[Program] = [block.program(dims, policy) for name, block in BLOCKS.items() if name != LOG_MEL]
    for program in (*programs, step_program(dims, policy), candidates_program(dims, policy)):
        program.trace(module)
    return module._to_mlir_str()


@DTYPES
def test_attention_is_by_operations_of_ours(dtype: DType) -> None:
    """MAX's split a query's keys in parts that they put together wrongly, and take TF32 for float32; so do its plain
    products, of four dimensions here."""
    operations = set(re.findall(r'symbol = "([\w.]+)"', graphs(dtype)))
    assert operations == {f"maxwhisper.{name}" for name in ATTENTION | OTHERS[dtype]}


@DTYPES
def test_no_product_of_maxs_is_of_float32(dtype: DType) -> None:
    """It would be of TF32."""
    dtypes = Counter(re.findall(r"matmul.*: \(!mo.tensor<\[.*?\], (\w+), gpu", graphs(dtype)))
    assert set(dtypes) == ({"f16"} if dtype == DType.float16 else {"bf16"} if dtype == DType.bfloat16 else set())
    assert dtypes.total() == graphs(dtype).count("rmo.matmul(")
