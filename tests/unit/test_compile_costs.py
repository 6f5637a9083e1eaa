"""What compiling costs: how the Mojo that MAX writes is taken apart."""

import pytest
import torch

from reference.compile_costs import Emitted, kind, modules, numbered, programs
from reference.models import trained
from reference.suite import Suite

TEXT = """import layout

# FusionInfo:
#   mo.add

@export
def __add_0123456789abcdef_7_async(arg):
    __add_0123456789abcdef(arg)

# FusionInfo:
#   mo.mul

@export
def __mul_async(arg):
    __mul(arg)

# FusionInfo:
#   index.constant

@export
def __primitive_0_async(arg):
    pass

# FusionInfo:
#   mo.add

def __add_0123456789abcdef(arg):
    Epilogue_0(arg)

# FusionInfo:
#   mo.mul

def __mul(arg):
    pass

from layout import Coord

@fieldwise_init
struct Epilogue_0(Movable):
    pass
"""


def test_a_kernel_alone_has_what_calls_it_and_all_types() -> None:
    emitted = Emitted.of(TEXT)
    assert (list(emitted.kernels), emitted.primitives) == (["__add_0123456789abcdef", "__mul"], 1)
    alone = emitted.alone("__add_0123456789abcdef")
    assert "from layout import Coord" in alone and "__mul" not in alone
    alone = emitted.alone("__mul")
    assert alone.startswith("import layout") and "from layout import Coord" in alone
    assert "struct Epilogue_0" in alone
    assert "def __mul_async" in alone and "def __mul(" in alone
    assert "__add" not in alone and "__primitive" not in alone


def test_nothing_of_a_module_is_lost() -> None:
    emitted = Emitted.of(TEXT)
    parts = [emitted.imports, *emitted.callers, *emitted.kernels.values(), emitted.types]
    assert sorted("".join(parts).split()) == sorted(TEXT.split())


def test_a_module_may_have_no_types() -> None:
    assert Emitted.of(TEXT[: TEXT.index("from layout")]).types == ""


def test_instantiations_of_a_kernel_are_of_one_kind() -> None:
    names = ["__add", "__add_7", "__add_0123456789abcdef", "__add_0123456789abcdef_7"]
    assert {kind(name) for name in names} == {"add"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_may_have_the_names_of_all_graphs_of_a_module(dtype: torch.dtype) -> None:
    suite = Suite(trained(), dtype)
    for module in modules(suite):
        names = [program.name for program in numbered(programs(suite, module))]
        assert len(set(names)) == len(names) and len("+".join(names)) < 200  # of 255, with what MAX writes behind it
