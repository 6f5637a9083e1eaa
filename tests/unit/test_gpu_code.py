"""What is compiled for a GPU, read as code: nothing can run it here."""

import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

COMPILE = """
import sys
from max.dtype import DType
from max.graph import BufferType, DeviceRef, TensorType, ops
from maxwhisper.artifacts import aim_at
from maxwhisper.decoding import NoWeights
from maxwhisper.model import linear
from maxwhisper.runtime import Artifact, Program

device, gpu = aim_at("sm_90a"), DeviceRef.GPU()
cache, row, matrix = ["batch", "place", 2, 64], ["batch", 1, 128], [128, 128]
float32 = lambda shape: TensorType(DType.float32, shape, gpu)

def store(_, k, v, q, *new):
    return [each.tensor for each in ops.inplace_custom("maxwhisper.store", gpu, [k, v, q, *new], [q.type])]

into = float32(cache).as_buffer()
inputs = {
    "store": [into, into, *map(float32, [row] * 3), TensorType(DType.int64, ["batch"], gpu)],
    "product": [float32(["batch", 1500, 128]), float32(matrix)],
}
graphs = {"store": store, "product": lambda _, x, weight: [linear(x, weight)]}
name, path = sys.argv[1:]
program = Program(name, "", NoWeights(), graphs[name], dict(enumerate(inputs[name])))
Artifact(name, [program], device).stored.compiled.export_mef(path)
"""
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


def compiled(name: str, folder: Path) -> list[Counter[int]]:
    """The instructions of each kernel of a graph of COMPILE."""
    path = folder / f"{name}.mef"
    subprocess.run([sys.executable, "-c", COMPILE, name, str(path)], check=True, env=dict(os.environ))
    found = [code for _, code in kernels(path.read_bytes())]
    assert found
    return found


def test_a_kernel_of_ours_has_its_parameters_by_value(tmp_path: Path) -> None:
    """Else it would look for the addresses of caches on the stack of the CPU: it has nothing else to load than a
    length, a query, a key and a value, of which it stores three."""
    for code in compiled("store", tmp_path):
        loads, stores = (sum(code[each] for each in kind) for kind in (LOADS, STORES))
        assert loads > 0 and loads * 3 == stores * 4


def test_products_of_float32_are_of_tf32(tmp_path: Path) -> None:
    """So MAX 26.7 has it, and so float32 on a GPU fails; a MAX that has it otherwise is news for docs/gpu.md."""
    assert any(code[TENSOR_CORES] for code in compiled("product", tmp_path))
