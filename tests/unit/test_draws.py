"""A test that fails does so again: what it draws depends on nothing but itself."""

import torch
from hypothesis import given
from hypothesis import strategies as st


def test_examples_are_the_same_in_every_run() -> None:
    drawn = []

    @given(st.integers())
    def draw(number: int) -> None:
        drawn.append((number, torch.rand(1).item()))

    draw()
    first = drawn.copy()
    draw()
    assert drawn == 2 * first


def test_a_test_draws_what_it_draws_alone() -> None:
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))
