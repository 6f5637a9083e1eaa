"""What is compiled for a GPU, read as code, by the compile gate: nothing can run it there."""

import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from maxwhisper.engine.artifacts import source_hash

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

name, dtype, path = sys.argv[1:]
device, gpu, dtype = aim_at("sm_90a"), DeviceRef.GPU(), DType[dtype]
policy = Policy(gpu, dtype, dtype)
attn = MultiHeadAttention(128, 2, policy)
tensor = lambda *shape: TensorType(dtype, shape, gpu)
heads = lambda x: ops.permute(x.reshape((*x.shape[:2], 2, 64)), [0, 2, 1, 3])

def store(_, k, v, q, *new):
    return [each.tensor for each in ops.inplace_custom("maxwhisper.store", gpu, [k, v, q, *new], [q.type])]

def step(_, q, n_past, k, v, k_audio, v_audio, *into):
    q = attn.attend(q, KeyValue(heads(q), heads(q)), cache=Slots(k, v, *into, n_past))
    return [q, attn.attend(q, KeyValue(*(ops.permute(x, [0, 2, 1, 3]) for x in (k_audio, v_audio))))]

def many(_, audio, text):
    cross = KeyValue(heads(audio), heads(audio))
    causal = attn.attend(text, KeyValue(heads(text), heads(text)), causal_mask(text.shape[1], policy))
    return [attn.attend(audio, cross), causal, *attn.attend_with_scores(text, cross)]

cache, row, audio = tensor("batch", "position", 2, 64), tensor("batch", 1, 128), tensor("audio", 1500, 2, 64)
into, lengths = cache.as_buffer(), TensorType(DType.int64, ["batch"], gpu)
inputs = {
    "store": [into, into, row, row, row, lengths],
    "step": [row, lengths, cache, cache, audio, audio, into, into],
    "many": [tensor("audio", 1500, 128), tensor("batch", "token", 128)],
    "convolution": [tensor("batch", 3002, 128), tensor(128, 128, 3), TensorType(DType.float32, [128], gpu)],
}
graphs = {
    "store": store,
    "step": step,
    "many": many,
    "convolution": lambda _, x, weight, bias: [convolution_by_product(x, weight, bias, stride=2)],
}
program = Program(name, "", NoWeights(), graphs[name], dict(enumerate(inputs[name])))
Artifact(name, [program], device).stored.compiled.export_mef(path)
"""
pytestmark = pytest.mark.compiles_for("sm_90a")
CUDA, ELF = 190, b"\x7fELF"
INSTRUCTION = 16
"""Bytes, of which the low 12 bits say what it does."""
LOADS, STORES = {0x980, 0x981}, {0x385, 0x386, 0x985, 0x986}
"""LD and LDG, ST and STG: from and to the memory of the GPU."""
TENSOR_CORES = 0x23C
"""HMMA: a product of small matrices, of float16, bfloat16 or TF32."""


def kernels(artifact: bytes) -> Iterator[tuple[str, Counter[int]]]:
    """Every kernel of the GPU programs in an artifact, by name, and how often it has each instruction."""
    start = artifact.find(ELF)
    while start >= 0:
        program = artifact[start:]
        if struct.unpack_from("<H", program, 18)[0] == CUDA:
            (offset,), (size, number, names) = (
                struct.unpack_from("<Q", program, 40),
                struct.unpack_from("<HHH", program, 58),
            )
            sections = [struct.unpack_from("<IIQQQQIIQQ", program, offset + i * size) for i in range(number)]
            strings = program[sections[names][4] :]
            for section in sections:
                name = strings[section[0] : strings.index(b"\0", section[0])].decode()
                if name.startswith(".text."):
                    code = range(section[4], section[4] + section[5], INSTRUCTION)
                    yield name, Counter(struct.unpack_from("<H", program, at)[0] & 0xFFF for at in code)
        start = artifact.find(ELF, start + 1)


def own_cache(name: str) -> dict[str, str]:
    """Names a compile cache for this graph alone: MAX puts kernels that it has compiled for others into an artifact."""
    users = Path(os.environ.get("MODULAR_CACHE_DIR") or Path.home() / ".cache" / "modular")
    folder = str(users / "gpu-code" / f"{name}-{source_hash()[:16]}")
    return {"MODULAR_CACHE_DIR": folder, "MODULAR_MAX_CACHE_DIR": folder}


def compiled(name: str, folder: Path) -> list[tuple[str, Counter[int]]]:
    """The kernels of a graph of COMPILE."""
    path = folder / f"{name}.mef"
    subprocess.run([sys.executable, "-c", COMPILE, name, str(path)], check=True, env=os.environ | own_cache(name))
    found = list(kernels(path.read_bytes()))
    assert found
    return found


def test_a_kernel_of_ours_has_its_parameters_by_value(tmp_path: Path) -> None:
    """Else it would look for the addresses of caches on the stack of the CPU: it has nothing else to load than a
    length, a query, a key and a value, of which it stores three."""
    for _, code in compiled("store", tmp_path):
        loads, stores = (sum(code[each] for each in kind) for kind in (LOADS, STORES))
        assert loads > 0 and loads * 3 == stores * 4


def test_attention_reads_a_cache_where_it_is(tmp_path: Path) -> None:
    """A copy would take longer than attention, and might be made before the new key is there."""
    names = [name.removeprefix(".text.") for name, _ in compiled("attention", tmp_path)]
    assert any(name.startswith("mha_decoding") for name in names)
    # For each element: the kernel that stores, and one that attention starts with.
    others = [name for name in names if not name.startswith("mha_")]
    assert len(others) == 2 and all(name.startswith("elementwise") for name in others)


@pytest.fixture(scope="module")
def convolution(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Counter[int]]]:
    return compiled("convolution", tmp_path_factory.mktemp("convolution"))


def test_a_convolution_is_a_product(convolution: list[tuple[str, Counter[int]]]) -> None:
    """MAX's own has a thread for each frame, which adds up every channel of it without tensor cores."""
    names = [name for name, _ in convolution]
    assert any("gemm" in name for name in names) and not any("conv" in name for name in names)


def test_products_of_float32_are_of_tf32(convolution: list[tuple[str, Counter[int]]]) -> None:
    """So MAX 26.7 has it, and so float32 on a GPU fails; a MAX that has it otherwise is news for docs/gpu.md."""
    assert any(code[TENSOR_CORES] for _, code in convolution)
