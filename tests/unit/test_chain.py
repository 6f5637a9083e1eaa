"""The whole network in a row: what is judged of it is what transcribes, not only what shows its insides."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reference import chain
from reference.activations import speech
from reference.blocks import TWINS
from reference.chain import ENDS, Chain, first_divergence, judge_chain, pytorch_chain, run_chain
from reference.judge import Comparison, Judgement
from reference.models import FIXTURE, SIZES, load
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


def test_every_submodule_is_judged_in_its_own_dtype_and_by_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spectrogram is of float32; of the decoder's outputs those as wide as the vocabulary are logits."""
    x, given = torch.ones(2, 3), list[tuple[Any, ...]]()
    names = ["log_mel", "encoder.stem", "encoder", "decoder.embedding", "step decoder"]
    outputs = {name: x * n for n, name in enumerate(names)}

    def judged(comparison: Comparison, oracle: Any, peer: Any, subject: Any, **options: Any) -> Judgement:
        given.append((comparison, oracle, peer, subject, options))
        return Judgement(comparison, (), ())

    monkeypatch.setattr(chain, "references", lambda *_: (outputs, {name: y + 1 for name, y in outputs.items()}))
    monkeypatch.setattr(chain, "judge", judged)
    model, dims = SimpleNamespace(size="fixture"), SIZES["tiny"]
    suite: Any = SimpleNamespace(model=model, dtype=torch.bfloat16, device="cpu", dims=dims)
    ours = {name: y + 2 for name, y in outputs.items() if name != "encoder"}
    assert [name for name, _ in judge_chain(suite, "click", ours)] == names
    for name, (comparison, oracle, peer, subject, options) in zip(names, given, strict=True):
        assert (comparison.block, comparison.inputs) == (name, "chained, click")
        assert comparison.dtype == (torch.float32 if name == "log_mel" else torch.bfloat16)
        assert oracle[0].equal(outputs[name]) and peer[0].equal(oracle[0] + 1)
        assert not subject if name == "encoder" else subject[0].equal(oracle[0] + 2)
        part = TWINS["log_mel" if name == "log_mel" else "encoder" if "encoder" in name else "decoder.prefill"]
        assert options["roundings"] == part.roundings(dims)
        assert options["longest_reduction"] == TWINS["decoder.prefill"].longest_reduction(dims)
        assert options["n_vocab"] == dims.n_vocab and options["chained"]
