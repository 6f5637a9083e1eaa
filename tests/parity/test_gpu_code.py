"""What is compiled for a GPU, read as code, by the compile gate: nothing can run it there."""

import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from mojo.run import subprocess_run_mojo

from maxwhisper.engine.kernel_library import KERNELS
from reference.kernel_diff import graphs
from reference.kernel_diff.kernels import SPLIT_REDUCER, Kernel

COMPILE = """
import sys
from max.dtype import DType
from max.graph import DeviceRef, TensorType, ops
from maxwhisper.engine.artifacts import aim_at
from maxwhisper.decoding.rules import NoWeights
from maxwhisper.network.keys_values import KeyValue, Slots
from maxwhisper.network.model import MultiHeadAttention
from maxwhisper.network.products import convolution_by_product
from maxwhisper.network.shapes import causal_mask
from maxwhisper.engine.program import Artifact, Program
from maxwhisper.engine.session import Policy

path, *names = sys.argv[1:]
device, gpu = aim_at("sm_90a"), DeviceRef.GPU()

def program(name, dtype):
    policy = Policy(gpu, dtype, dtype)
    attn = MultiHeadAttention(128, 2, policy)
    tensor = lambda *shape: TensorType(dtype, shape, gpu)
    heads = lambda x: ops.permute(x.reshape((*x.shape[:2], 2, 64)), [0, 2, 1, 3])

    def step(_, qkv, k_audio, v_audio, **slots):
        q = attn.attend_in_place(qkv, Slots(**slots))
        return [q, attn.split_attention("split_attention", q, k_audio, v_audio)]

    def many(_, audio, text):
        cross = KeyValue(heads(audio), heads(audio))
        causal = attn.attend(text, KeyValue(heads(text), heads(text)), causal_mask(text.shape[1], policy))
        return [attn.attend(audio, cross), causal, *attn.attend_with_scores(text, cross)]

    def convolution(_, x, weight, bias):
        return [convolution_by_product(x, weight, bias, stride=2)]

    cache, row, audio = tensor("batch", "position", 2, 64), tensor("batch", 1, 384), tensor("audio", 1500, 2, 64)
    into, lengths = cache.as_buffer(), TensorType(DType.int64, ["batch"], gpu)
    rows = TensorType(DType.int64, ["batch", "position"], gpu)
    kernel, bias = tensor(128, 128, 3), TensorType(DType.float32, [128], gpu)
    caches = {"k": cache, "v": cache, "k_written": into, "v_written": into}
    inputs = {
        "step": {"qkv": row, "n_past": lengths, "rows": rows, **caches, "k_audio": audio, "v_audio": audio},
        "many": {"audio": tensor("audio", 1500, 128), "text": tensor("batch", "token", 128)},
        "convolution": {"x": tensor("batch", 3002, 128), "weight": kernel, "bias": bias},
    }
    graphs = {"step": step, "many": many, "convolution": convolution}
    return Program(f"{name} {dtype.name}", "", NoWeights(), graphs[name], inputs[name])

programs = [program(name, DType[dtype]) for name, dtype in map(str.split, names)]
Artifact("parts on a GPU", programs, device).stored.compiled.export_mef(path)
"""
COMPILED = [
    *("step float16", "step float32", "many float16", "many bfloat16", "many float32"),
    *("convolution bfloat16", "convolution float32"),
]
"""Graphs of COMPILE and their dtypes, as one module: each of its own would take twice as long."""
KERNELS_OF_A_STEP = """
from kernels.device_rating import rate_on_gpu
from kernels.device_select import choose_on_gpu
from kernels.step_product import multiply_on_gpu, normalize_on_gpu
from max.gpu.host import get_gpu_target
from max.gpu.host.compile import _compile_code

comptime target = get_gpu_target["sm_90a"]()
comptime half, single = DType.float16, DType.float32

def main() raises:
    print(_compile_code[rate_on_gpu[1], target=target]().asm)
    print(_compile_code[rate_on_gpu[8], target=target]().asm)
    print(_compile_code[choose_on_gpu[1, True], target=target]().asm)
    print(_compile_code[choose_on_gpu[8, False], target=target]().asm)
    print(_compile_code[multiply_on_gpu[half, half, 1280, 1, True, True, True, False], target=target]().asm)
    print(_compile_code[multiply_on_gpu[half, single, 384, 8, True, False, False, False], target=target]().asm)
    print(_compile_code[multiply_on_gpu[single, single, 5120, 8, False, True, False, True], target=target]().asm)
    print(_compile_code[normalize_on_gpu[half, 384], target=target]().asm)
"""
pytestmark = pytest.mark.compiles_for("sm_90a")
LOADS, STORES = {0x980, 0x981}, {0x385, 0x386, 0x985, 0x986}
"""LD and LDG, ST and STG: from and to the memory of the GPU."""


@cache
def artifact() -> dict[str, list[Kernel]]:
    """Returns the kernels of COMPILED, by graph."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "graphs.mef")
        subprocess.run([sys.executable, "-c", COMPILE, str(path), *COMPILED], check=True)
        return {graph.graph.name: list(graph.kernels) for graph in graphs.compiled(path.read_bytes(), path)}


def compiled(name: str, dtype: str) -> list[Kernel]:
    """Returns the kernels of a graph of COMPILE."""
    kernels = artifact()[f"{name} {dtype}"]
    assert kernels
    return kernels


STEPS = pytest.mark.parametrize("dtype", ["float16", "float32"])  # by kernels of ours, whatever the dtype


@STEPS
def test_a_kernel_of_ours_has_its_parameters_by_value(dtype: str) -> None:
    """Else it would look for the addresses of caches on the stack of the CPU: what puts a key and a value into a cache
    has nothing else to load than a length, a query, a key and a value, of which it stores three."""
    storing = [each.instructions for each in compiled("step", dtype) if "elementwise" in each.name]
    for code in storing:
        loads, stores = (sum(code[each] for each in kind) for kind in (LOADS, STORES))
        assert loads > 0 and loads * 3 == stores * 4
    assert storing


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scores_are_computed_from_parameters_by_value_too(dtype: str) -> None:
    """For each score there is nothing to load but a query and a key, 16 bytes at a time."""
    size = 2 * 64 * (4 if dtype == "float32" else 2)
    scoring = [each.instructions for each in compiled("many", dtype) if "elementwise" in each.name]
    for code in scoring:
        loads, stores = (sum(code[each] for each in kind) for kind in (LOADS, STORES))
        assert stores > 0 and loads * 16 == stores * size
    assert scoring


@STEPS
def test_a_step_attends_by_kernels_of_ours_and_reads_a_cache_where_it_is(dtype: str) -> None:
    """A copy would take longer than attention, and might be made before the new key is there. Of our own two there is
    one of each for caches, and one for the audio; what stores is compiled for small and for large caches."""
    counts = Counter(kernel.name.partition("_")[0] for kernel in compiled("step", dtype))
    assert counts == {"split": 2, "join": 2, "elementwise": 2}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("step", "many") for dtype in ("float16", "float32")] + [("many", "bfloat16")],
)
def test_attention_puts_no_parts_together_by_maxs_reducer(name: str, dtype: str) -> None:
    """Which weighs the parts by other powers than those in which their maxima are: docs/max-split-attention.md."""
    assert not [kernel for kernel in compiled(name, dtype) if SPLIT_REDUCER in kernel.name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention_of_many_queries_is_on_tensor_cores_in_its_own_dtype(dtype: str) -> None:
    """In float32 these would cut probabilities off to TF32."""
    names = [kernel.name for kernel in compiled("many", dtype) if kernel.on_tensor_cores]
    assert names and all(f"_{dtype}_{dtype}_" in name and "float32" not in name for name in names)


@pytest.mark.parametrize("name", ["step", "many", "convolution"])
def test_float32_is_not_on_tensor_cores(name: str) -> None:
    """Which know no float32 but TF32."""
    assert not [kernel for kernel in compiled(name, "float32") if kernel.on_tensor_cores]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_convolution_is_a_product(dtype: str) -> None:
    """By MAX's kernel for those, in float32 by the vendor's library. MAX's own for convolutions has a thread for each
    frame, which adds up every channel of it without tensor cores."""
    names = [kernel.name for kernel in compiled("convolution", dtype)]
    assert any("gemm" in name for name in names) == (dtype == "bfloat16")
    assert not any("conv" in name for name in names)


def test_kernels_of_a_step_keep_what_they_compute_in_registers(tmp_path: Path) -> None:
    """And in memory that a block's threads share: what is local to a thread but too much, or has an index that is known
    only when it runs, lies in the memory of the GPU."""
    source = tmp_path / "kernels_of_a_step.mojo"
    source.write_text(KERNELS_OF_A_STEP)
    done = subprocess_run_mojo(["run", "-I", str(KERNELS.parent), str(source)], check=True, capture_output=True)
    code = done.stdout.decode()
    assert code.count(".visible .entry") == KERNELS_OF_A_STEP.count("_compile_code[")
    assert ".local" not in code
