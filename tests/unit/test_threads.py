"""Kernels whose work is cut for other numbers of threads than this machine has: judged, and a wrong cut is named."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maxwhisper.network.blocks import BLOCKS
from reference.activations import BATCH, END, KINDS
from reference.blocks import TWINS
from reference.models import trained
from reference.suite import Suite
from reference.trial import THREADS, VARIABLE, cut_for, threads_for

BLOCK = BLOCKS["decoder.mlp.step"]


@pytest.fixture(scope="module")
def judged() -> Suite:
    return Suite(trained(), torch.float32)


@pytest.mark.parametrize("wrong_for", [None, "3", "5"])
def test_a_cut_that_leaves_a_column_out_is_red(
    judged: Suite, wrong_for: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(x: Tensor) -> list[Tensor]:
        (y,) = TWINS[BLOCK.name](judged.peer, 0, x=x)
        if wrong_for and os.environ.get(VARIABLE) == wrong_for:
            y = y.clone()
            y[..., -1] = 0
        return [y]

    monkeypatch.setattr(Suite, "executable", lambda *_: torch.no_grad()(run))
    found = judged.judge(next(judged.comparisons(BLOCK, ["speech"])))
    assert found.passed == (wrong_for is None)
    assert (f"with work cut for {wrong_for} threads" in found.defects) == (wrong_for is not None)
    if wrong_for:  # what is explained is that cut, not the right one
        (explanation,) = found.explanations
        last = judged.dims.n_text_state - 1
        assert (explanation.worst[-1], explanation.subject) == (last, 0.0) and explanation.errors.max() > 0.1


def test_a_cut_that_is_wrong_in_the_last_output_alone_is_red(judged: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    block = BLOCKS["decoder.attention.cached"]

    def run(**given: Tensor) -> list[Tensor]:
        *right, last = TWINS[block.name](judged.peer, 0, **given)
        return [*right, last * (2 if os.environ.get(VARIABLE) == "5" else 1)]

    monkeypatch.setattr(Suite, "executable", lambda *_: torch.no_grad()(run))
    assert "with work cut for 5 threads" in judged.judge(next(judged.comparisons(block, ["speech"]))).defects


@pytest.mark.parametrize("wrong_for", [None, *THREADS])
def test_what_a_cut_leaves_as_it_was_is_red(
    judged: Suite, wrong_for: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a run with another cut has left there what is right, as MAX gives memory out again."""
    memory: list[Tensor] = []

    def run(x: Tensor) -> list[Tensor]:
        (right,) = TWINS[BLOCK.name](judged.peer, 0, x=x)
        memory.append(right.clone() if len(memory) < 2 else memory[-1])
        n_column = -1 if os.environ.get(VARIABLE) == str(wrong_for) else None
        memory[-1][..., :n_column] = right[..., :n_column]
        return [memory[-1]]

    monkeypatch.setattr(Suite, "executable", lambda *_: torch.no_grad()(run))
    found = judged.judge(next(judged.comparisons(BLOCK, ["speech"])))
    assert found.passed == (wrong_for is None)
    assert (f"with work cut for {wrong_for} threads" in found.defects) == (wrong_for is not None)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_cut_for_all_in_every_shape(judged: Suite, block: str) -> None:
    for kinds in (["speech"], [BATCH], [END], KINDS):
        compared = list(judged.comparisons(BLOCKS[block], kinds))
        assert {n for each in compared for n in threads_for(each)} == (set(THREADS) if compared else set())
        assert all(threads_for(each) for each in compared)
    in_bfloat16 = [threads_for(replace(each, dtype=torch.bfloat16)) for each in compared]
    assert set(in_bfloat16) == {(n,) for n in THREADS}


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before: Any
    for before in (None, "2"):
        monkeypatch.setenv(VARIABLE, before) if before else monkeypatch.delenv(VARIABLE, raising=False)
        with cut_for(5):
            assert os.environ[VARIABLE] == "5"
        with cut_for(None):
            assert VARIABLE not in os.environ
        assert os.environ.get(VARIABLE) == before
