"""The kernels of a GPU inside MAX's objects for the CPU, and which of them a function of an object launches."""

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from .elf import CUDA, MAGIC, X86_64, Elf, Section, Symbol

INSTRUCTION = 16
"""Bytes, of which the low 12 bits say what it does."""
KIND = 0x1FF
"""The bits of these 12 that name it whatever its operands are."""
HMMA, HGMMA = 0x3C, 0x1F0
"""Products of small matrices by tensor cores, those of a warp and those of four warps."""
INPUTS_OF = {HMMA: 64 + 18, HGMMA: 64 + 12}
"""The bit of an instruction where the dtype of what is multiplied stands, in two: 0 is float16, 1 bfloat16, 2 TF32.
So ptxas 13.0 assembles `mma` for sm_80 and sm_90a, and `wgmma`."""
TF32 = 2
SPLIT_REDUCER = "splitk_reduce"
"""In the name of the kernel that puts parts of attention together (docs/max-split-attention.md)."""
LOADS_A_KERNEL, COPIES = "AsyncRT_DeviceContext_loadFunction", "AsyncRT_DeviceContext_DtoD_async"
"""What MAX's code calls to have a kernel, and to copy inside a GPU's memory."""
VENDOR, VENDOR_TF32 = "cublasGemmEx", re.compile(r"_cublas_matmul\[.*\ba_type=f32\b.*\buse_tf32=true\b", re.DOTALL)
"""In the names of functions that call cuBLAS, and of those that let it multiply float32 in TF32."""
HASH = re.compile(r"_[0-9a-f]{8}([0-9a-f]{8})?$")
"""What ends a kernel's name, and is another one where only names of types have changed."""


@dataclass(frozen=True)
class Kernel:
    """A kernel: its name without the hash, a digest of its code and constants, the size of its code in bytes, and how
    often it has each instruction. Of another name it is the same."""

    name: str = field(compare=False)
    digest: str
    size: int
    instructions: Counter[int] = field(compare=False)
    tf32: bool

    @property
    def on_tensor_cores(self) -> bool:
        return any(code & KIND in INPUTS_OF for code in self.instructions)


def kernels_of(program: Elf) -> Iterator[Kernel]:
    """Returns the kernels of a program for a GPU. Raises ValueError where it has none."""
    texts = [section for section in program.sections if section.name.startswith(".text.")]
    if not texts:
        raise ValueError("a program for a GPU has no kernel")
    data = [each for each in program.sections if each.name.startswith((".nv.constant", ".nv.global"))]
    constants = b"".join(program.bytes_of(section) for section in data)
    for section in texts:
        code = program.bytes_of(section)
        digest = hashlib.sha256(code + constants)
        starts = range(0, len(code), INSTRUCTION)
        instructions = Counter(struct.unpack_from("<H", code, at)[0] & 0xFFF for at in starts)
        tf32 = any(multiplies_tf32(code[at : at + INSTRUCTION]) for at in starts)
        name = HASH.sub("", section.name.removeprefix(".text."))
        yield Kernel(name, digest.hexdigest(), len(code), instructions, tf32)


def multiplies_tf32(instruction: bytes) -> bool:
    """Tells whether an instruction multiplies matrices of TF32."""
    bits = int.from_bytes(instruction, "little")
    place = INPUTS_OF.get(bits & KIND)
    return place is not None and bits >> place & 3 == TF32


@dataclass(frozen=True)
class Launch:
    """What a function of an object has a GPU do.

    kernels: those of which it launches some, by the shapes that it meets. vendor: whether it may call cuBLAS. tf32:
    whether cuBLAS may round float32 to TF32. copies: whether it may copy inside the GPU's memory. host: a digest of its
    own code.
    """

    kernels: frozenset[Kernel]
    vendor: bool
    tf32: bool
    copies: bool
    host: str

    def __bool__(self) -> bool:
        return bool(self.kernels) or self.vendor or self.copies


class Code:
    """An object for the CPU with programs for a GPU in it."""

    def __init__(self, content: bytes):
        self.elf = Elf(content)
        if not content.startswith(MAGIC) or self.elf.machine != X86_64:
            raise ValueError("an object is not in ELF for x86-64")
        self._launches: dict[str, Launch] = {}

    @cached_property
    def _entries(self) -> dict[str, Symbol]:
        return {symbol.name: symbol for symbol in self.elf.symbols if symbol.section and symbol.size}

    def launch(self, function: str) -> Launch:
        """Returns what a function has a GPU do. Raises KeyError for one that the object lacks, ValueError for one that
        loads kernels which are not there."""
        if function not in self._launches:
            self._launches[function] = self._launch(self._entries[function])
        return self._launches[function]

    def _launch(self, entry: Symbol) -> Launch:
        digest = hashlib.sha256()
        kernels: set[Kernel] = set()
        names: set[str] = set()
        seen, waiting = {entry}, [entry]
        while waiting:
            symbol = waiting.pop()
            names.add(symbol.name)
            content = self.elf.bytes_of(self.elf.sections[symbol.section], symbol.start, symbol.size)
            if content.startswith(MAGIC):
                kernels |= self._kernels(symbol)
            elif executable(self.elf.sections[symbol.section]):
                digest.update(content)
                for target, section, place in self.elf.refers_to(symbol):
                    digest.update(self._constant(section, place))
                    if not target.section:
                        names.add(target.name)
                    elif target.size and target not in seen:
                        seen.add(target)
                        waiting.append(target)
        if LOADS_A_KERNEL in names and not kernels:
            raise ValueError(f"function {entry.name} loads a kernel, and none is found that could be it")
        vendor = any(VENDOR in name for name in names)
        tf32 = any(VENDOR_TF32.search(name) for name in names)
        return Launch(frozenset(kernels), vendor, tf32, COPIES in names, digest.hexdigest())

    def _kernels(self, symbol: Symbol) -> set[Kernel]:
        program = Elf(self.elf.bytes_of(self.elf.sections[symbol.section], symbol.start, symbol.size))
        if program.machine != CUDA:
            raise ValueError(f"{symbol.name} is a program for machine {program.machine}, expected {CUDA}")
        return set(kernels_of(program))

    def _constant(self, number: int, place: int) -> bytes:
        """Returns the number at a place, if that is in a section of numbers: strings name places in sources."""
        section = self.elf.sections[number]
        if ".cst" not in section.name:
            return b""
        return self.elf.bytes_of(section, place, section.entry)


def executable(section: Section) -> bool:
    return section.name.startswith((".text", ".ltext"))
