"""Reading MAX's artifacts: which operations a graph executes, and the objects that hold their code.

MAX 26.7 writes a graph in the Binary Executable Format of TFRT, with attributes of 64 bits and magic bytes of its own:
https://github.com/tensorflow/runtime/blob/master/documents/binary_executable_format.md. Nothing of it is MAX's
interface, so whatever is not as expected is an error.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

MAGIC = b"\xee\xf0"
STRINGS, ATTRIBUTES, KINDS, FUNCTIONS, FUNCTION_INDEX, TYPES, REGISTER_TYPES = 3, 4, 5, 6, 7, 11, 12
"""Sections, by their numbers."""
EXECUTE, LOAD, FUNCTION = "mgp.generic.execute", "mgp.module.load.cpu", "mef.callable"
WORD = 8
"""Bytes, of which records are a whole number."""
MODULE, ENTRY, SUMMARY = 1, 2, 3
"""Attributes of EXECUTE, by place: the object, the function in it, and what it computes, in MAX's words."""
IMAGE, ENTRIES, NUMBER = 1, 2, 5
"""Attributes of LOAD: an object, its functions, a line each, and the number by which EXECUTE knows it."""


@dataclass(frozen=True)
class Operation:
    """What a graph has executed: a function of an object, with the values that it takes and gives, by number."""

    module: int
    function: str
    summary: str
    takes: tuple[int, ...]
    gives: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """A graph: its operations, how many of its values are inputs, and the types of all of its values."""

    name: str
    operations: list[Operation]
    inputs: int
    types: list[str]


@dataclass(frozen=True)
class _Record:
    kind: str
    takes: tuple[int, ...]
    attributes: tuple[int, ...]
    bodies: tuple[int, ...]
    gives: tuple[int, ...]


@dataclass(frozen=True)
class Mef:
    """An artifact. Raises struct.error, IndexError, KeyError or ValueError, when it is read, for what is none."""

    content: bytes

    @cached_property
    def _sections(self) -> dict[int, tuple[int, int]]:
        """Returns, by number, where each section's body starts and ends."""
        if not self.content.startswith(MAGIC):
            raise ValueError(f"starts with {self.content[:2].hex()}, expected {MAGIC.hex()}")
        at, found = len(MAGIC), {}
        while at < len(self.content):
            number = self.content[at]
            length, at = self._integer(at + 1)
            if length & 1:  # aligned, to a power of two that stands in front
                at += 1 + -(at + 1) % self.content[at]
            found[number] = at, at + (length >> 1)
            at = found[number][1]
        return found

    def _integer(self, at: int) -> tuple[int, int]:
        """Returns an integer, of 7 bits a byte with the high ones first, and what stands behind it."""
        value = 0
        while True:
            value = value << 7 | self.content[at] & 0x7F
            at += 1
            if self.content[at - 1] < 0x80:
                return value, at

    def _integers(self, at: int, number: int) -> tuple[list[int], int]:
        found = []
        for _ in range(number):
            value, at = self._integer(at)
            found.append(value)
        return found, at

    def _attribute(self, offset: int) -> bytes:
        """Returns an attribute of bytes: in front of it stand its kind and, backwards, its length."""
        start = self._sections[ATTRIBUTES][0] + offset
        at, length = start - 2, 0
        while True:
            length = length << 7 | self.content[at] & 0x7F
            if self.content[at] < 0x80:
                return self.content[start : start + length]
            at -= 1

    def _number(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.content, self._sections[ATTRIBUTES][0] + offset)[0])

    @cached_property
    def _kinds(self) -> list[str]:
        at, strings = self._sections[KINDS][0], self._sections[STRINGS][0]
        number, at = self._integer(at)
        starts = [strings + offset for offset in self._integers(at, number)[0]]
        return [self.content[start : self.content.index(b"\0", start)].decode() for start in starts]

    @cached_property
    def _functions(self) -> list[tuple[int, int, int]]:
        """Returns where each function starts, and how many values it takes and gives."""
        number, at = self._integer(self._sections[FUNCTION_INDEX][0])
        numbers, _ = self._integers(at, 3 * number)
        return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))

    def _size(self, function: int) -> tuple[int, int, int]:
        """Returns how many records and values a function has, and what stands behind these numbers."""
        start = self._sections[FUNCTIONS][0] + self._functions[function][0]
        (n_record, n_value), at = self._integers(start, 2)
        return n_record, n_value, at

    def _records(self, function: int) -> Iterator[_Record]:
        n_record, n_value, at = self._size(function)
        _, at = self._integers(at, n_value)
        table, at = self._integers(at, 2 * n_record)
        _, at = self._integers(at, self._functions[function][2])
        at += -(at - self._sections[FUNCTIONS][0]) % WORD
        for offset in table[::2]:
            yield self._record(at + WORD * offset, n_value)

    def _record(self, at: int, n_value: int) -> _Record:
        kind, _, n_take, n_attribute, n_body, n_give = struct.unpack_from("<6I", self.content, at)
        if n_give > n_value:
            raise ValueError(f"an operation gives {n_give} values of {n_value}")
        attributes = struct.unpack_from(f"<{n_attribute}Q", self.content, at + 24)
        number = n_take + n_body + bool(n_give)
        values = struct.unpack_from(f"<{number}I", self.content, at + 24 + 8 * n_attribute)
        bodies = values[n_take : n_take + n_body]
        gives = tuple(range(values[-1], values[-1] + n_give)) if n_give else ()
        return _Record(self._kinds[kind], values[:n_take], attributes, bodies, gives)

    @cached_property
    def _every_record(self) -> list[list[_Record]]:
        return [list(self._records(function)) for function in range(len(self._functions))]

    @cached_property
    def _modules(self) -> dict[int, tuple[bytes, list[str]]]:
        loads = [record for records in self._every_record for record in records if record.kind == LOAD]
        return {
            self._number(load.attributes[NUMBER]): (
                self._attribute(load.attributes[IMAGE]),
                self._attribute(load.attributes[ENTRIES]).decode().split(),
            )
            for load in loads
        }

    @cached_property
    def objects(self) -> dict[int, bytes]:
        """Returns the objects in ELF, by number."""
        return {number: image for number, (image, _) in self._modules.items()}

    @cached_property
    def graphs(self) -> list[Graph]:
        """Returns the graphs, in the order of the file."""
        start, end = self._sections[TYPES]
        names = self.content[start:end].decode().split("\0")
        at, types = self._sections[REGISTER_TYPES][0], []
        for function in range(len(self._functions)):
            numbers, at = self._integers(at, self._size(function)[1])
            types.append([names[number] for number in numbers])
        bodies = {
            self._attribute(record.attributes[0]).decode(): record.bodies[0]
            for records in self._every_record
            for record in records
            if record.kind == FUNCTION
        }
        return [
            Graph(name.removesuffix("$exec"), list(self._operations(body)), self._functions[body][1], types[body])
            for name, body in bodies.items()
            if name.endswith("$exec")
        ]

    def _operations(self, function: int) -> Iterator[Operation]:
        for record in self._every_record[function]:
            if record.kind == EXECUTE:
                module = self._number(record.attributes[MODULE])
                name = self._modules[module][1][self._number(record.attributes[ENTRY])]
                summary = self._attribute(record.attributes[SUMMARY]).decode()
                yield Operation(module, name, summary, record.takes, record.gives)
