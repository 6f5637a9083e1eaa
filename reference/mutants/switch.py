"""Which mutant is in force, and which have been reached: in memory that Python and compiled kernels both find.

The memory lies at a fixed address, so that a kernel reads it in one instruction. Only mutated sources ask.
"""

import ctypes
import os

ADDRESS = 0x6D57_5000_0000
"""Where the number in force stands, an Int64; far from where Linux puts heaps, libraries and stacks."""
REACHED = ADDRESS + 64
"""Where the first of ROOM bytes stands, one for every mutant: 1 once its place in the sources was run."""
ROOM = 1 << 16
VARIABLE = "MAXWHISPER_MUTANT"
"""The mutant that is in force from the start of a process, for what is only run then."""

_READ_AND_WRITE, _PRIVATE_ANONYMOUS, _FIXED_NOREPLACE = 0x3, 0x22, 0x100000


def _map() -> None:
    """Maps the memory; raises OSError if something else lies there."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    got = libc.mmap(ADDRESS, ROOM + 64, _READ_AND_WRITE, _PRIVATE_ANONYMOUS | _FIXED_NOREPLACE, -1, 0)
    if got != ADDRESS:
        raise OSError(ctypes.get_errno(), f"no memory for mutants at {ADDRESS:#x}")


_map()
_NUMBER = ctypes.c_int64.from_address(ADDRESS)
_REACHED = (ctypes.c_ubyte * ROOM).from_address(REACHED)
_NUMBER.value = int(os.environ.get(VARIABLE, 0))


def mutated(number: int) -> bool:
    """Tells whether a mutant is in force; what a mutated source asks at its place."""
    _REACHED[number] = 1
    return _NUMBER.value == number


def put_in_force(number: int) -> None:
    """Puts a mutant in force, in place of another; 0: none."""
    _NUMBER.value = number


def reached() -> frozenset[int]:
    """Returns the mutants whose places were run since the last call."""
    found = frozenset(number for number, at in enumerate(bytes(_REACHED)) if at)
    ctypes.memset(REACHED, 0, ROOM)
    return found
