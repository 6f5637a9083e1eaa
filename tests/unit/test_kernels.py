"""The Mojo kernels of products, on sizes that fill no vector and no tile."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue
from max.nn.layer import Module
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from torch.nn.functional import linear as linear_of_pytorch

from maxwhisper.engine import kernel_library
from maxwhisper.engine.folders import cache_folder
from maxwhisper.engine.program import Artifact, Executable, Program
from maxwhisper.engine.session import TORCH_DTYPE
from maxwhisper.errors import OptionError
from maxwhisper.network.products import convolution, convolution_by_product, linear, step_product, text_product
from reference.formulas import bound_of_sums, judge_formula
from reference.judge import UNIT_ROUNDOFF, Comparison, judge

STORED = (DType.float32, DType.float16, DType.bfloat16)


class Product(Module):
    def __call__(self, x: TensorValue, weight: TensorValue) -> list[TensorValue]:
        return [text_product(x, weight)]


@cache
def graphs() -> dict[str, Executable]:
    """Compiles all of this file, by name: most of a compilation does not depend on how many there are."""
    programs = [*products(), *convolutions(), *affine(), *step_products()]
    return Artifact("kernels", programs, "cpu").init({})


def products() -> list[Program]:
    """Returns one graph per dtype that weights are stored in, every dimension symbolic."""
    cpu = DeviceRef.CPU()

    def program(stored: DType) -> Program:
        x = TensorType(DType.float32, ["batch", "token", "n_in"], cpu)
        weight = TensorType(stored, ["n_out", "n_in"], cpu)
        return Program(stored.name, "", Product(), Product.__call__, {"x": x, "weight": weight})

    return [program(stored) for stored in STORED]


@settings(max_examples=60)
@given(
    stored=st.sampled_from(STORED),
    batch=st.integers(1, 3),
    n_token=st.integers(1, 9),
    n_in=st.integers(1, 300),
    n_out=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_value_is_the_sum_of_its_products(
    stored: DType, batch: int, n_token: int, n_in: int, n_out: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_token, n_in, generator=generator)
    weight = torch.randn(n_out, n_in, generator=generator).to(TORCH_DTYPE[stored])
    (y,) = graphs()[stored.name](x=x, weight=weight)
    exact, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= bound_of_sums(n_in, terms)).all()


def test_a_product_large_enough_for_several_threads() -> None:
    x, weight = torch.randn(2, 7, 384), torch.randn(51865, 384).half()
    (y,) = graphs()["float16"](x=x, weight=weight)
    found = judge_formula(
        "product",
        lambda given: [given["x"] @ given["weight"].T],
        {"x": x, "weight": weight.float()},
        [y],
        longest_reduction=384,
    )
    assert found.passed, f"\n{found}"


def test_a_row_is_bitwise_the_same_among_any_others() -> None:
    x, weight = torch.randn(1, 13, 1000), torch.randn(77, 1000).half()
    (together,) = graphs()["float16"](x=x, weight=weight)
    alone = [graphs()["float16"](x=row[None, None], weight=weight)[0] for row in x[0]]
    assert together.equal(torch.cat(alone, 1))


# ---- convolution ---------------------------------------------------------------------------------------------------

N_FRAME, N_IN, N_OUT = 291, 182, 80  # rows and a panel that are not full; with three taps more terms than one sum has
FORMS = {"product": (1, 1), "convolution": (3, 1), "every second frame": (3, 2)}
"""Taps and stride."""


class Convolution(Module):
    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def by_kernel(self, x: TensorValue, weight: TensorValue) -> list[TensorValue]:
        return [convolution(x, weight, self.stride)]

    def as_on_a_gpu(self, x: TensorValue, weight: TensorValue) -> list[TensorValue]:
        return [convolution_by_product(x, weight, stride=self.stride)]

    def __call__(self) -> None:
        raise NotImplementedError


def convolutions() -> list[Program]:
    cpu = DeviceRef.CPU()

    def program(
        name: str, taps: int, stride: int, how: Callable[..., list[TensorValue]], dtype: DType = DType.float32
    ) -> Program:
        x = TensorType(dtype, ["batch", N_FRAME, N_IN], cpu)
        weight = TensorType(DType.float16, [N_OUT, N_IN, taps], cpu)
        return Program(name, "", Convolution(stride), how, {"x": x, "weight": weight})

    ours = [program(name, *form, Convolution.by_kernel) for name, form in FORMS.items()]
    ours += [program(f"{name}, bfloat16", *form, Convolution.by_kernel, DType.bfloat16) for name, form in FORMS.items()]
    theirs = [program(f"{name}, as on a GPU", *form, Convolution.as_on_a_gpu) for name, form in FORMS.items()]
    return [*ours, *theirs]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", ["", ", as on a GPU"])
@pytest.mark.parametrize("batch", [1, 3])
def test_convolution(name: str, how: str, batch: int) -> None:
    taps, stride = FORMS[name]
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, N_FRAME, N_IN, generator=generator)
    weight = torch.randn(N_OUT, N_IN, taps, generator=generator).half()

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(x.transpose(1, 2), weight, stride=stride).transpose(1, 2)

    (y,) = graphs()[name + how](x=x, weight=weight)
    expected, terms = exact(x.double(), weight.double()), exact(x.double().abs(), weight.double().abs())
    assert y.shape == expected.shape
    assert ((y - expected).abs() <= bound_of_sums(N_IN * taps, terms)).all()


@pytest.mark.parametrize("name", FORMS)
def test_convolution_in_bfloat16(name: str) -> None:
    taps, stride = FORMS[name]
    x, weight = torch.randn(2, N_FRAME, N_IN).bfloat16(), torch.randn(N_OUT, N_IN, taps).half()

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(x.transpose(1, 2), weight, stride=stride).transpose(1, 2)

    (y,) = graphs()[f"{name}, bfloat16"](x=x, weight=weight)
    rounded = weight.bfloat16().double()
    expected, terms = exact(x.double(), rounded), exact(x.double().abs(), rounded.abs())
    assert y.dtype == torch.float32
    assert ((y - expected).abs() <= bound_of_sums(N_IN * taps, terms)).all()


@pytest.mark.parametrize("name", FORMS)
def test_a_window_is_bitwise_the_same_in_a_batch(name: str) -> None:
    x, weight = torch.randn(3, N_FRAME, N_IN), torch.randn(N_OUT, N_IN, FORMS[name][0]).half()
    (together,) = graphs()[name](x=x, weight=weight)
    assert together.equal(torch.cat([graphs()[name](x=window[None], weight=weight)[0] for window in x]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-30])
def test_one_value_reaches_the_sums_of_its_own_row_alone(value: float) -> None:
    """Whether it is a number or none: AMX multiplies parts of numbers, of which most are 0."""
    x, weight = torch.zeros(1, N_FRAME, N_IN), torch.randn(N_OUT, N_IN, 1).clamp(-1, 1).half()
    x[0, 100, 33] = value
    (y,) = graphs()["product"](x=x, weight=weight)
    expected = value * weight[:, 33, 0].double()
    if math.isfinite(value):
        assert ((y[0, 100] - expected).abs() <= bound_of_sums(N_IN, expected.abs())).all()
    else:
        assert y[0, 100].isnan().equal(expected.isnan())
        assert y[0, 100].double().nan_to_num(nan=0).equal(expected.nan_to_num(nan=0))
    y[0, 100] = 0
    assert not y.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_so(value: float) -> None:
    x = torch.zeros(1, 1, 40)
    x[0, 0, 39] = value
    (y,) = graphs()["float32"](x=x, weight=torch.ones(5, 40))
    assert not y.isfinite().any()


def test_sources_that_do_not_compile_are_reported_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, kept = tmp_path / "wrong", tmp_path / "kept"
    wrong.mkdir()
    (wrong / "__init__.mojo").write_text("def f():\n    return nowhere\n")
    monkeypatch.setattr(kernel_library, "KERNELS", wrong)
    with pytest.raises(RuntimeError, match=r"(?s)wrong does not compile:.*nowhere"):
        kernel_library.compile_kernels(kept / "a.mojoc")
    assert not list(kept.iterdir())


def test_a_folder_that_cannot_keep_kernels_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=f"{tmp_path / 'file'}: compiled kernels cannot be kept there"):
        kernel_library.compile_kernels(tmp_path / "file" / "a.mojoc")


def test_kernels_are_known_by_one_path_wherever_they_are_kept() -> None:
    """Or a cache of MAX's that was copied or mounted elsewhere would know none of them."""
    [package] = kernel_library.kernel_library().library_paths()
    assert package.parent == Path(f"/proc/self/fd/{kernel_library.FOLDER_DESCRIPTOR}")
    assert package.resolve() == cache_folder("kernels").resolve() / package.name


# ---- products with a bias ------------------------------------------------------------------------------------------

HALVES = (DType.float16, DType.bfloat16)


class Affine(Module):
    def __call__(self, x: TensorValue, weight: TensorValue, bias: TensorValue) -> list[TensorValue]:
        return [linear(x, weight, bias)]


def affine() -> list[Program]:
    """Returns programs in each dtype, for texts, whose length is symbolic, and for audio."""
    cpu = DeviceRef.CPU()
    weights = {"weight": TensorType(DType.float16, [N_OUT, N_IN], cpu), "bias": TensorType(DType.float32, [N_OUT], cpu)}

    def program(dtype: DType, name: str, n_row: str | int) -> Program:
        x = TensorType(dtype, ["batch", n_row, N_IN], cpu)
        return Program(f"{name}, {dtype.name}", "", Affine(), Affine.__call__, {"x": x, **weights})

    rows: list[tuple[str, str | int]] = [("text", "token"), ("audio", N_FRAME)]
    return [program(dtype, *row) for dtype in HALVES for row in rows]


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("rows", ["text", "audio"])
def test_a_product_is_rounded_once_with_its_bias(rows: str, dtype: DType) -> None:
    half = TORCH_DTYPE[dtype]
    x, weight, bias = torch.randn(2, N_FRAME, N_IN).to(half), torch.randn(N_OUT, N_IN).half(), torch.randn(N_OUT)
    (y,) = graphs()[f"{rows}, {dtype.name}"](x=x, weight=weight, bias=bias)
    exact, terms = (
        f(x.double()) @ f(weight.to(half).double()).T + f(bias.double()) for f in (torch.positive, torch.abs)
    )
    added = bound_of_sums(N_IN + 1, terms)
    assert y.dtype == half
    assert ((y - exact).abs() <= added + UNIT_ROUNDOFF[half] * (exact.abs() + added)).all()


# ---- products of a step --------------------------------------------------------------------------------------------

N_STATE, N_WIDE = 136, 77
"""Not as many terms as a warp of a GPU takes at once, nor outputs as a block has."""
WITH = {"norm and GELU": {"activated": True}, "residual": {}, "norm alone": {"dtype": DType.float32}}
"""What stands around a product."""


class StepProduct(Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __call__(self, norm_weight: TensorValue, norm_bias: TensorValue, **given: TensorValue) -> list[TensorValue]:
        if self.name == "residual":
            return [step_product(**given)]
        del given["residual"]
        bias = None if "alone" in self.name else given["bias"]
        norm = SimpleNamespace(weight=norm_weight, bias=norm_bias)
        return [step_product(**{**given, "bias": bias, **WITH[self.name]}, norm=norm)]


def step_products() -> list[Program]:
    def program(name: str, dtype: DType) -> Program:
        def of(dtype: DType, *shape: str | int) -> TensorType:
            return TensorType(dtype, shape, DeviceRef.CPU())

        x, residual = of(dtype, "batch", 1, N_STATE), of(dtype, "batch", 1, N_WIDE)
        vectors = {each: of(DType.float32, N_STATE) for each in ("norm_weight", "norm_bias")}
        types = {"x": x, "weight": of(dtype, N_WIDE, N_STATE), "bias": of(DType.float32, N_WIDE), **vectors}
        types["residual"] = residual
        return Program(f"{name}, {dtype.name}", "", StepProduct(name), StepProduct.__call__, types)

    return [program(name, dtype) for name in WITH for dtype in STORED]


@pytest.mark.parametrize("dtype", STORED, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", WITH)
@pytest.mark.parametrize("n_row", [1, 2, 8, 9, 21])
def test_a_product_of_a_step_with_what_stands_around_it(name: str, dtype: DType, n_row: int) -> None:
    """Tries few rows, which a kernel of ours takes, and more."""
    generator, low = torch.Generator().manual_seed(n_row), TORCH_DTYPE[dtype]
    shapes = [(n_row, 1, N_STATE), (N_WIDE, N_STATE), (N_WIDE,), (N_STATE,), (N_STATE,), (n_row, 1, N_WIDE)]
    random = [torch.randn(shape, generator=generator) for shape in shapes]
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")
    given = dict(zip(names, random, strict=True))
    given |= {each: given[each].to(low) for each in ("x", "weight", "residual")}

    def formula(given: dict[str, Tensor]) -> list[Tensor]:
        x, weight, dtype = given["x"], given["weight"], given["x"].dtype
        if "norm" in name:
            wide = x if dtype == torch.float64 else x.float()
            x = layer_norm(wide, (N_STATE,), given["norm_weight"], given["norm_bias"]).to(dtype)
        y = linear_of_pytorch(x, weight, None if "alone" in name else given["bias"].to(dtype))
        if "GELU" in name:
            y = gelu(y)
        if name == "residual":
            y = y + given["residual"]
        return [y.float() if "alone" in name and dtype != torch.float64 else y]

    (ours,) = graphs()[f"{name}, {dtype.name}"](**given)
    assert ours.dtype == (torch.float32 if "alone" in name else low)
    comparison = Comparison("a kernel", low, f"a step's product, {name}", 0, "random", "cpu")
    oracle, peer = formula({name: x.double() for name, x in given.items()}), formula(given)
    found = judge(comparison, oracle, peer, [ours], longest_reduction=N_STATE, roundings=3, n_vocab=0)
    assert found.passed, f"\n{found}"
