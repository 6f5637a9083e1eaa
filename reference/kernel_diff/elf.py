"""Files in ELF of 64 bits: MAX's objects for the CPU, and the programs for a GPU inside them."""

import struct
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

MAGIC = b"\x7fELF"
X86_64, CUDA = 62, 190
"""Machines."""
SYMBOLS, RELOCATIONS, NO_BITS = 2, 4, 8
"""Types of sections."""
EXECUTABLE = 4
"""A flag of a section."""


@dataclass(frozen=True)
class Section:
    """A section: where its bytes are in the file, and the fields that mean different things by type."""

    name: str
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    entry: int


@dataclass(frozen=True)
class Symbol:
    """A function or a constant: bytes `start` to `start + size` of a section; section 0 where it is in another file."""

    name: str
    section: int
    start: int
    size: int


@dataclass(frozen=True)
class Elf:
    """A file in ELF. Raises struct.error, IndexError or ValueError, when it is read, for one that is cut short."""

    content: bytes

    @property
    def machine(self) -> int:
        return int(struct.unpack_from("<H", self.content, 18)[0])

    @cached_property
    def sections(self) -> list[Section]:
        offset = struct.unpack_from("<Q", self.content, 40)[0]
        size, number, names = struct.unpack_from("<HHH", self.content, 58)
        raw = [struct.unpack_from("<IIQQQQIIQQ", self.content, offset + i * size) for i in range(number)]
        strings = raw[names][4]
        return [
            Section(self.string(strings + name), type_, flags, at, length, link, info, entry)
            for name, type_, flags, _, at, length, link, info, _, entry in raw
        ]

    def string(self, at: int) -> str:
        return self.content[at : self.content.index(b"\0", at)].decode()

    def bytes_of(self, section: Section, start: int = 0, size: int | None = None) -> bytes:
        """Returns bytes of a section, all of them where no size is given; none of one that has no bytes in the file."""
        if section.type == NO_BITS:
            return b""
        end = section.size if size is None else start + size
        found = self.content[section.offset + start : section.offset + end]
        if len(found) != end - start:
            raise ValueError(f"section {section.name} is cut short")
        return found

    @cached_property
    def symbols(self) -> list[Symbol]:
        (table,) = (each for each in self.sections if each.type == SYMBOLS)
        strings = self.sections[table.link].offset
        entries = struct.iter_unpack("<IBBHQQ", self.bytes_of(table))
        return [Symbol(self.string(strings + name), at, start, size) for name, _, _, at, start, size in entries]

    @cached_property
    def _by_section(self) -> dict[int, list[Symbol]]:
        """Returns, by section, its symbols by where they start."""
        found = defaultdict(list)
        for symbol in sorted(self.symbols, key=attrgetter("start")):
            if symbol.size:
                found[symbol.section].append(symbol)
        return found

    def at(self, section: int, offset: int) -> Symbol | None:
        """Returns the symbol that holds a byte of a section."""
        symbols = self._by_section.get(section, [])
        place = bisect_right(symbols, offset, key=attrgetter("start")) - 1
        found = symbols[place] if place >= 0 else None
        return found if found and offset < found.start + found.size else None

    @cached_property
    def _relocations(self) -> dict[Symbol, list[tuple[Symbol, int]]]:
        found = defaultdict(list)
        for table in (each for each in self.sections if each.type == RELOCATIONS):
            for offset, info, addend in struct.iter_unpack("<QQq", self.bytes_of(table)):
                if holder := self.at(table.info, offset):
                    found[holder].append((self.symbols[info >> 32], addend))
        return found

    def refers_to(self, symbol: Symbol) -> Iterator[tuple[Symbol, int, int]]:
        """Returns what a symbol's bytes refer to, in order: the symbol, or where there is none by itself that of the
        section, the section, and the place in it."""
        for target, addend in self._relocations.get(symbol, []):
            place = target.start + addend
            inner = None if target.size or not target.section else self.at(target.section, place)
            yield inner or target, target.section, place
