"""Products of many rows by AMX, the matrix unit of some of Intel's processors, which multiplies in bfloat16.

A float32 is the sum of three bfloat16, a float16 of two: its parts. A product of numbers is the sum of the products of
their parts, but for those that are less than what float32 rounds off. So products in float32 are as exact as those of
vectors; there are six times as many as in bfloat16, and the unit is sixteen times as fast.

Rows and columns of a product lie in memory as the unit takes them, BLOCK at a time and in STEPs of terms, with zeros
where there are none: (step, part, row, term) and (step, part, pair of terms, column, term of the pair), the latter for
TILE columns and then for TILE more.
"""

from std.math import align_up, ceildiv
from std.memory import bitcast
from std.sys import llvm_intrinsic
from std.sys.info import CompilationTarget
from std.utils.numerics import max_finite

from .pointers import Numbers, Stored, untracked

comptime HAS_AMX = CompilationTarget._has_feature["amx-bf16"]()
comptime TILE = 16  # rows of a register of the unit, and columns
comptime STEP = 2 * TILE  # terms that lie in one
comptime BLOCK = 2 * TILE  # rows, and columns, that are packed together
comptime REGISTER = TILE * STEP  # bfloat16 numbers
comptime STEPS = 9  # of one part at a time: those of a block of rows and of one of columns fit the first cache
comptime CONFIGURATION = 64  # bytes

comptime Parts[n: Int] = Array[SIMD[DType.bfloat16, STEP], n]
comptime Packed = Stored[DType.bfloat16]
comptime Room = List[SIMD[DType.bfloat16, STEP]]  # which begins where a line of the cache does
comptime Bits = SIMD[DType.uint32, TILE]


def part_count[dtype: DType]() -> Int:
    """Returns of how many bfloat16 numbers one of this dtype is the sum."""
    comptime if dtype == DType.bfloat16:
        return 1
    return 2 if dtype == DType.float16 else 3


def column_dtype[dtype: DType, stored: DType]() -> DType:
    """Returns in which dtype columns are packed that are stored in another and computed with in dtype: a float16 is the
    sum of two parts in float32 too."""
    return stored if dtype == DType.float32 else dtype


def block_size[dtype: DType](n_term: Int) -> Int:
    """Returns how many bfloat16 numbers a block of rows or columns takes, each of n_term terms."""
    return ceildiv(n_term, STEP) * part_count[dtype]() * BLOCK * STEP


def room[dtype: DType](n_block: Int, n_term: Int) -> Room:
    """Returns room for some blocks of rows or columns."""
    return Room(unsafe_uninit_length=n_block * block_size[dtype](n_term) // STEP)


@always_inline
def packed(mut room: Room) -> Packed:
    """Returns where a room begins, as long as it lives."""
    return untracked(room).unsafe_bitcast[BFloat16]()


@always_inline
def split[dtype: DType](numbers: SIMD[dtype, STEP]) -> Parts[part_count[dtype]()]:
    """Returns the parts of some numbers, the greatest first. What bfloat16 holds as an infinity or NaN has that alone,
    as its last part, which is multiplied with greatest parts only: these are 0 where a number is."""
    comptime if dtype == DType.bfloat16:
        return Parts[part_count[dtype]()](fill=rebind[SIMD[DType.bfloat16, STEP]](numbers))
    comptime n_part = part_count[dtype]()
    var values = numbers.cast[DType.float32]()
    var held = abs(values).le(SIMD[DType.float32, STEP](max_finite[DType.bfloat16]().cast[DType.float32]()))
    var rest = held.select(values, SIMD[DType.float32, STEP](0))
    var parts = Parts[n_part](fill=rest.cast[DType.bfloat16]())
    rest -= parts[0].cast[DType.float32]()
    comptime for i in range(1, n_part - 1):
        # Cut off, not rounded: what is left then fits the last part, and its sign is anybody's.
        var part = bitcast[DType.float32, STEP](bitcast[DType.uint32, STEP](rest) & 0xFFFF0000)
        parts[i] = part.cast[DType.bfloat16]()
        rest -= part
    parts[n_part - 1] = held.select(rest, values).cast[DType.bfloat16]()
    return parts^


@always_inline
def load_terms[dtype: DType](terms: Pointer[Scalar[dtype], _], n: Int) -> SIMD[dtype, STEP]:
    """Loads the next `n` terms, as many as there are, and then zeros."""
    if n >= STEP:
        return terms.unsafe_load[width=STEP]()
    var some = SIMD[dtype, STEP](0)
    for i in range(n):
        some[i] = terms[unsafe_offset=i]
    return some


@always_inline
def store[dtype: DType](into: Packed, row: Int, step: Int, terms: SIMD[dtype, STEP]):
    """Packs STEP terms of a row of a block."""
    comptime n_part = part_count[dtype]()
    var parts = split(terms)
    comptime for i in range(n_part):
        into.unsafe_store(((step * n_part + i) * BLOCK + row) * STEP, parts[i])


@no_inline
def pack_row[dtype: DType](into: Packed, row: Int, x: Pointer[Scalar[dtype], _], n_term: Int):
    """Packs one row of a block, (n_term,)."""
    for step in range(ceildiv(n_term, STEP)):
        store(into, row, step, load_terms(x.unsafe_offset(step * STEP), n_term - step * STEP))


@always_inline
def transpose(mut rows: Array[Bits, TILE]):
    """Swaps rows and columns."""
    comptime for _ in range(4):  # halves of all rows shuffled as cards are, once for each bit of their numbers
        var shuffled = Array[Bits, TILE](fill=0)
        comptime for i in range(TILE // 2):
            var both = rows[i].interleave(rows[i + TILE // 2])
            shuffled[2 * i] = both.slice[TILE]()
            shuffled[2 * i + 1] = both.slice[TILE, offset=TILE]()
        rows = shuffled^


@no_inline
def pack_columns[
    dtype: DType, stored: DType
](into: Packed, weights: Pointer[Scalar[stored], _], n_column: Int, n_term: Int):
    """Packs a block of at most BLOCK columns, rounded to dtype, each of which is a row of weights (n_column, n_term).
    """
    comptime n_part = part_count[dtype]()
    for step in range(ceildiv(n_term, STEP)):
        comptime for half in range(2):
            var pairs = Array[Array[Bits, TILE], n_part](fill=Array[Bits, TILE](fill=0))
            for column in range(min(TILE, n_column - half * TILE)):
                var terms = weights.unsafe_offset((half * TILE + column) * n_term + step * STEP)
                var parts = split(load_terms(terms, n_term - step * STEP).cast[dtype]())
                comptime for i in range(n_part):
                    pairs[i][column] = bitcast[DType.uint32, TILE](parts[i])
            comptime for i in range(n_part):
                transpose(pairs[i])
                var register = into.unsafe_offset(((step * n_part + i) * 2 + half) * REGISTER)
                comptime for pair in range(TILE):
                    register.unsafe_store(pair * STEP, bitcast[DType.bfloat16, STEP](pairs[i][pair]))


@no_inline
def pack_terms[
    n_column: Int, dtype: DType, stored: DType
](into: Packed, values: Pointer[Scalar[stored], _], n_term: Int):
    """Packs columns, rounded to dtype, of values (n_term, n_column), in blocks of BLOCK columns."""
    comptime n_part = part_count[dtype]()
    var size = block_size[dtype](n_term)
    for term in range(0, align_up(n_term, STEP), 2):
        comptime for column in range(0, n_column, TILE):
            var first, second = SIMD[dtype, TILE](0), SIMD[dtype, TILE](0)
            if term < n_term:
                first = values.unsafe_load[width=TILE](term * n_column + column).cast[dtype]()
            if term + 1 < n_term:
                second = values.unsafe_load[width=TILE]((term + 1) * n_column + column).cast[dtype]()
            var parts = split(first.interleave(second))
            comptime for i in range(n_part):
                var register = ((term // STEP * n_part + i) * 2 + column // TILE % 2) * REGISTER
                into.unsafe_store(column // BLOCK * size + register + term % STEP // 2 * STEP, parts[i])


@no_inline
def configure():
    """Has every register of this thread hold TILE rows; until `release`."""
    var bytes = Array[UInt8, CONFIGURATION](fill=0)
    bytes[0] = 1  # the palette
    comptime for register in range(8):
        bytes[16 + 2 * register] = 64  # bytes in a row
        bytes[48 + register] = TILE
    llvm_intrinsic["llvm.x86.ldtilecfg", NoneType](bytes.unsafe_ptr())


@no_inline
def release():
    """Empties the unit, whose registers else go with the thread from core to core."""
    llvm_intrinsic["llvm.x86.tilerelease", NoneType]()


@always_inline
def load[register: Int](numbers: Packed):
    llvm_intrinsic["llvm.x86.tileloadd64", NoneType](Int8(register), numbers, Int64(64))


@no_inline
def multiply[
    dtype: DType, columns_dtype: DType = dtype, add: Bool = False
](into: Numbers, apart: Int, rows: Packed, columns: Packed, n_term: Int):
    """Writes the products of a block of rows with a block of columns, or adds them to what is there: (BLOCK, BLOCK),
    whose rows are `apart` numbers apart. Each is summed in the same order, whatever is beside it.

    A register of sums at a time, over terms that stay in the first cache for all four. More registers would have to be
    loaded less often, but while another thread is at work on the same core, each that is written makes all slower: with
    all eight a product takes four times as long, with three twice.
    """
    comptime n_part = part_count[dtype]()
    comptime n_column_part = part_count[columns_dtype]()
    var n_step = ceildiv(n_term, STEP)
    for first in range(0, n_step, STEPS // n_part):
        for quarter in range(4):
            var sums = into.unsafe_offset(quarter // 2 * TILE * apart + quarter % 2 * TILE)
            if add or first > 0:
                llvm_intrinsic["llvm.x86.tileloadd64", NoneType](Int8(0), sums, Int64(4 * apart))
            else:
                llvm_intrinsic["llvm.x86.tilezero", NoneType](Int8(0))
            for step in range(first, min(first + STEPS // n_part, n_step)):
                var its_rows = rows.unsafe_offset((step * n_part * 2 + quarter // 2) * REGISTER)
                var its_columns = columns.unsafe_offset((step * n_column_part * 2 + quarter % 2) * REGISTER)
                comptime for i in range(n_part):
                    load[1](its_rows.unsafe_offset(2 * i * REGISTER))
                    comptime for j in range(min(n_part - i, n_column_part)):
                        load[2](its_columns.unsafe_offset(2 * j * REGISTER))
                        llvm_intrinsic["llvm.x86.tdpbf16ps", NoneType](Int8(0), Int8(1), Int8(2))
            llvm_intrinsic["llvm.x86.tilestored64", NoneType](Int8(0), sums, Int64(4 * apart))
