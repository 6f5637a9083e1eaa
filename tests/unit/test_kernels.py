"""The Mojo kernel of matrix products over a text, on sizes that fill no vector and no tile."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue
from max.nn.layer import Module

from maxwhisper.model import text_product
from maxwhisper.runtime import TORCH_DTYPE, Artifact, Executable, Program

STORED = (DType.float32, DType.float16, DType.bfloat16)


class Product(Module):
    def __call__(self, x: TensorValue, weight: TensorValue) -> list[TensorValue]:
        return [text_product(x, weight)]


@cache
def products() -> dict[str, Executable]:
    """One graph per dtype that weights are stored in, every dimension symbolic."""
    cpu = DeviceRef.CPU()

    def program(stored: DType) -> Program:
        x = TensorType(DType.float32, ["batch", "token", "n_in"], cpu)
        weight = TensorType(stored, ["n_out", "n_in"], cpu)
        return Program(stored.name, "", Product(), Product.__call__, {"x": x, "weight": weight})

    return Artifact("products", map(program, STORED), "cpu").init({})


@settings(max_examples=60, deadline=None)
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
    (y,) = products()[stored.name](x, weight)
    exact, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    # The bound of any order of n additions of n products, in float32.
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= n_in * torch.finfo(torch.float32).eps / 2 * terms).all()


def test_a_product_large_enough_for_several_threads() -> None:
    x, weight = torch.randn(2, 7, 384), torch.randn(51865, 384).half()
    (y,) = products()["float16"](x, weight)
    exact = x.double() @ weight.double().T
    assert float((y - exact).norm() / exact.norm()) < 384**0.5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_so(value: float) -> None:
    x = torch.zeros(1, 1, 40)
    x[0, 0, 39] = value
    (y,) = products()["float32"](x, torch.ones(5, 40))
    assert not y.isfinite().any()
