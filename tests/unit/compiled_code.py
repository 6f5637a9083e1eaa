"""Artifacts as MAX writes them, made by hand: graphs whose operations launch kernels of a few instructions."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maxwhisper.engine.artifacts import MANIFEST
from reference.kernel_diff.elf import CUDA, X86_64
from reference.kernel_diff.mef import (
    ATTRIBUTES,
    EXECUTE,
    FUNCTION,
    FUNCTION_INDEX,
    FUNCTIONS,
    KINDS,
    LOAD,
    REGISTER_TYPES,
    STRINGS,
    TYPES,
)
from reference.kernel_diff.mef import MAGIC as MEF

LOADS_A_KERNEL = "AsyncRT_DeviceContext_loadFunction"
FFMA = 0x000FC8000000000A_0000000B0C077223
MOVE = 0x000FE200078E00FF_0000001000047202
"""Instructions, for sm_90a."""


def kernel(name: str, *instructions: int) -> bytes:
    """Returns a program for a GPU of one kernel."""
    code = b"".join(each.to_bytes(16, "little") for each in instructions)
    return elf(CUDA, [(f".text.{name}", 1, code, 0, 0)])


def elf(machine: int, sections: Sequence[tuple[str, int, bytes, int, int]]) -> bytes:
    """Returns a file of sections, each with its name, type, content, and the fields `link` and `info`."""
    names = "\0" + "\0".join([name for name, *_ in sections] + [".shstrtab"]) + "\0"
    given = [("", 0, b"", 0, 0), *sections, (".shstrtab", 3, names.encode(), 0, 0)]
    content, headers = bytearray(64), b""
    for name, type_, body, link, info in given:
        at = names.index(f"\0{name}\0") + 1 if name else 0
        headers += struct.pack("<IIQQQQIIQQ", at, type_, 0, 0, len(content), len(body), link, info, 1, 0)
        content += body
    content[:20] = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 1, machine)
    struct.pack_into("<Q", content, 40, len(content))
    struct.pack_into("<HHH", content, 58, 64, len(given), len(given) - 1)
    return bytes(content) + headers


@dataclass
class Entry:
    """A function on the CPU: its code, the kernels that it loads, by their programs, and other functions by name."""

    code: bytes = b"launch"
    kernels: Sequence[bytes] = ()
    calls: Sequence[str] = ()


def image(entries: Mapping[str, Entry]) -> bytes:
    """Returns an object for the CPU."""
    text, data, symbols, references = b"", b"", [("", 0, 0, 0)], []
    for name, entry in entries.items():
        symbols.append((name, 1, len(text), len(entry.code)))
        named = [*entry.calls, *([LOADS_A_KERNEL] if entry.kernels else [])]
        references += [(len(text), each) for each in named]
        for number, program in enumerate(entry.kernels):
            symbols.append((f"static_string_{name}_{number}", 2, len(data), len(program)))
            references.append((len(text), symbols[-1][0]))
            data += program
        text += entry.code
    numbers = {name: number for number, (name, *_) in enumerate(symbols)}
    for _, name in references:
        if name not in numbers:
            numbers[name] = len(symbols)
            symbols.append((name, 0, 0, 0))
    strings = "\0".join([*(name for name, *_ in symbols), ""]).encode()
    places = {name: len("\0".join(each for each, *_ in symbols[:at])) + bool(at) for name, at in numbers.items()}
    places[""] = 0
    table = b"".join(struct.pack("<IBBHQQ", places[name], 0, 0, at, *place) for name, at, *place in symbols)
    relocations = b"".join(struct.pack("<QQq", at, numbers[name] << 32, 0) for at, name in references)
    tables = [(".symtab", 2, table, 4, 0), (".strtab", 3, strings, 0, 0), (".rela.text", 4, relocations, 3, 1)]
    return elf(X86_64, [(".text", 1, text, 0, 0), (".rodata", 1, data, 0, 0), *tables])


@dataclass
class Step:
    """An operation of a graph: the function that it calls, what it computes, and its values by number."""

    entry: str
    summary: str = "mo.add"
    takes: Sequence[int] = ()
    gives: int | None = None


@dataclass
class Made:
    """An artifact of graphs by name, each of which takes values of the types of `inputs`, and of one object."""

    entries: Mapping[str, Entry]
    graphs: Mapping[str, Sequence[Step]]
    inputs: Sequence[str] = ('!mgp.tensor<?x128xf32, <"gpu", 0>>',)
    attributes: bytearray = field(default_factory=bytearray)

    def content(self) -> bytes:
        kinds, names = [EXECUTE, LOAD, FUNCTION], list(self.entries)
        n_value = len(self.inputs) + 8
        bodies = [
            function(n_value, [self.step(each, names) for each in steps], n_result=2) for steps in self.graphs.values()
        ]
        load = (self.number(0), self.text(image(self.entries)), self.text("\n".join(names).encode()), 0, 0)
        callables = [
            record(2, attributes=[self.text(f"{name}$exec".encode())], bodies=[at])
            for at, name in enumerate(self.graphs)
        ]
        bodies.append(function(n_value, [record(1, attributes=[*load, self.number(0), 0]), *callables], n_result=0))
        starts = [sum(map(len, bodies[:at])) for at in range(len(bodies))]
        index = [
            each for at, start in enumerate(starts) for each in (start, len(self.inputs), 2 * (at < len(self.graphs)))
        ]
        places = [sum(len(kind) + 1 for kind in kinds[:at]) for at in range(len(kinds))]
        types = [*self.inputs, "!mgp.buffer"]
        registers = [min(at, len(types) - 1) for _ in bodies for at in range(n_value)]
        return MEF + b"".join(
            section(number, body)
            for number, body in {
                STRINGS: "\0".join([*kinds, ""]).encode(),
                ATTRIBUTES: bytes(self.attributes),
                KINDS: integers(len(kinds), *places),
                FUNCTIONS: b"".join(bodies),
                FUNCTION_INDEX: integers(len(bodies), *index),
                TYPES: "\0".join([*types, ""]).encode(),
                REGISTER_TYPES: integers(*registers),
            }.items()
        )

    def step(self, step: Step, names: Sequence[str]) -> bytes:
        entry, summary = self.number(names.index(step.entry)), self.text(step.summary.encode())
        return record(0, step.takes, [0, self.number(0), entry, summary, 0, 0], gives=step.gives)

    def number(self, value: int) -> int:
        self.attributes += struct.pack("<I", value)
        return len(self.attributes) - 4

    def text(self, content: bytes) -> int:
        self.attributes += integers(len(content))[::-1] + b"\x40" + content
        return len(self.attributes) - len(content)


def record(
    kind: int,
    takes: Sequence[int] = (),
    attributes: Sequence[int] = (),
    bodies: Sequence[int] = (),
    gives: int | None = None,
) -> bytes:
    counts = (kind, 0, len(takes), len(attributes), len(bodies), gives is not None)
    content = struct.pack(f"<6I{len(attributes)}Q", *counts, *attributes)
    content += struct.pack(f"<{len(takes) + len(bodies)}I", *takes, *bodies)
    if gives is not None:
        content += struct.pack("<II", gives, 0)
    return content + bytes(-len(content) % 8)


def function(n_value: int, records: Sequence[bytes], n_result: int) -> bytes:
    words = [sum(map(len, records[:at])) // 8 for at in range(len(records))]
    table = [each for word in words for each in (word, 0)]
    head = integers(len(records), n_value, *[1] * n_value, *table, *[0] * n_result)
    return head + bytes(-len(head) % 8) + b"".join(records)


def section(number: int, body: bytes) -> bytes:
    """Writes a section that is not aligned, but of FUNCTIONS, which is in words of 8 bytes."""
    if number != FUNCTIONS:
        return bytes([number]) + integers(len(body) << 1) + body
    return bytes([number]) + integers(len(body) << 1 | 1) + b"\1" + body


def integers(*values: int) -> bytes:
    """Writes each in groups of 7 bits, the high ones first."""
    found = b""
    for value in values:
        groups = [value & 0x7F]
        while value := value >> 7:
            groups.append(value & 0x7F | 0x80)
        found += bytes(reversed(groups))
    return found


def written(folder: Path, made: Made, dtype: str = "float32") -> Path:
    """Writes a folder with the artifact."""
    folder.mkdir()
    content = made.content()
    (folder / "made.mef").write_bytes(content)
    entry = {"unit": "parts", "dims": {"n_text_state": 128}, "storage": dtype, "compute": dtype, "file": "made.mef"}
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"artifacts": [entry]}))
    return folder
