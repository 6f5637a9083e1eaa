"""The whole network in a row: what is judged of it is what transcribes, not only what shows its insides."""

from typing import Any

import pytest
import torch

from reference import chain
from reference.activations import speech
from reference.chain import ENDS, Chain, first_divergence, pytorch_chain, run_chain
from reference.judge import Comparison
from reference.models import FIXTURE, load
from reference.subject import Subject
from reference.suite import Suite


@pytest.fixture(scope="module")
def trained() -> Suite:
    return Suite(load(FIXTURE), torch.float32)


@pytest.mark.parametrize("wrong", [None, *ENDS])
def test_the_graphs_without_intermediates_are_judged(
    trained: Suite, wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch stands in for MAX, and for its graphs without intermediates PyTorch with one end a hundredth off."""
    right = (
        trained.chains["speech"][1]
        if trained.chains
        else pytorch_chain(trained.peer, *speech(trained.dims), trained.dtype)
    )

    def max_chain(*_: Any, intermediates: bool = True) -> dict[str, torch.Tensor]:
        ends = {name: right[name] * (1.01 if name == wrong else 1) for name in ENDS}
        return right if intermediates else {"log_mel": right["log_mel"], **ends}

    monkeypatch.setattr(chain, "max_chain", max_chain)
    monkeypatch.setattr(Subject, "graphs", {})
    found = run_chain(trained)
    assert found.first_divergence == wrong
    assert [effect.output for effect in found.effects if not effect.identical] == ([wrong] if wrong else [])


def test_a_submodule_that_max_does_not_put_out_is_the_first_divergence(
    trained: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = chain.references(trained, "speech")[1]
    lost = list(right)[3]
    monkeypatch.setattr(chain, "max_chain", lambda *_: {name: x for name, x in right.items() if name != lost})
    assert first_divergence(trained, {}) == lost


def test_a_chain_of_nothing_has_not_passed() -> None:
    assert not Chain(Comparison("s", torch.float32, "chain", 0, "speech"), {}, ()).passed
