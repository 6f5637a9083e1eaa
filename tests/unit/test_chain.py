"""The whole network in a row: what is judged of it is what transcribes, not only what shows its insides."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reference import chain
from reference.activations import CLIPS, speech
from reference.blocks import TWINS
from reference.chain import (
    ENDS,
    Chain,
    first_divergence,
    judge_chain,
    max_chain,
    pytorch_chain,
    run_chain,
    teacher_forced,
)
from reference.judge import Comparison, Judgement
from reference.models import FIXTURE, SIZES, load
from reference.subject import Subject
from reference.suite import Suite

from .memory import Remembering


@pytest.fixture(scope="module")
def trained() -> Suite:
    """Returns the suite of a trained model, which remembers what has passed: what is wrong must not be taken for it."""
    return Suite(load(FIXTURE), torch.float32, memory=Remembering())


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


@pytest.mark.parametrize("intermediates", [True, False])
def test_each_graph_of_the_chain_is_fed_what_the_one_before_has_made(intermediates: bool) -> None:
    """Without intermediates by the graphs that transcribe."""
    asked: dict[str, dict[str, torch.Tensor]] = {}
    n_output = {"log_mel": 1, "encoder": 1, "decoder.keys_values": 4, "decoder.prefill": 5, "decoder.step": 5}

    class Graphs(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            block = name.removesuffix(" with intermediates")
            assert (name != block) == (intermediates and block not in ("log_mel", "decoder.keys_values"))
            place, inside = list(n_output).index(block), [torch.full((1,), -1.0)] * (name != block)

            def run(**given: torch.Tensor) -> list[torch.Tensor]:
                asked[block] = given
                return [torch.full((1, 1, 3, 1), 10.0 * place + n) for n in range(n_output[block])] + inside

            return run

    subject = SimpleNamespace(intermediate_names=lambda block: [f"inside {block}"])
    suite: Any = SimpleNamespace(subject=subject, torch_device=torch.device("cpu"), dtype=torch.float32)
    audio, tokens = torch.zeros(5), torch.tensor([[1, 2, 3, 4]])
    found = max_chain(suite, Graphs(), audio, tokens, intermediates)
    cross = {"k_cross.0": 20, "v_cross.0": 21, "k_cross.1": 22, "v_cross.1": 23}
    cache = {"k_cache.0": 31, "v_cache.0": 32, "k_cache.1": 33, "v_cache.1": 34}
    step = {"tokens": [[4]], "offset": 3}
    fed: dict[str, dict[str, Any]] = {
        "log_mel": {"audio": [0] * 5},
        "encoder": {"mel": 0},
        "decoder.keys_values": {"audio_features": 10},
        "decoder.prefill": {"tokens": [[1, 2, 3]], **cross},
        "decoder.step": {**step, **cache, **cross},
    }
    whole = {
        name: {key: x.tolist() if x.ndim < 3 else int(x.flatten()[0]) for key, x in given.items()}
        for name, given in asked.items()
    }
    assert whole == fed
    ends = {"log_mel": 0.0, "encoder": 10.0, "decoder": 30.0, "step decoder": 40.0}
    inside = ["inside encoder", "inside decoder.prefill", "step inside decoder.step"] if intermediates else []
    assert {name: float(x.flatten()[0]) for name, x in found.items()} == {**ends, **dict.fromkeys(inside, -1.0)}


def test_a_submodule_that_max_does_not_put_out_is_the_first_divergence(
    trained: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = chain.references(trained, "speech")[1]
    lost = list(right)[3]
    monkeypatch.setattr(chain, "max_chain", lambda *_: {name: x for name, x in right.items() if name != lost})
    assert first_divergence(trained, {}) == lost


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (1.01, False)])
def test_logits_given_the_text_are_maxs_own(
    trained: Suite, factor: float, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the graph without intermediates, for that clip's text."""
    oracle, peer = chain.references(trained, "speech")
    clip = next(clip for clip in CLIPS if "english-2" in clip["file"])

    def pytorch_logits(model: Any, audio: Any, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert tokens.equal(speech(trained.dims)[1])
        return (oracle if dtype == torch.float64 else peer)["decoder"]

    def max_chain(*given: Any, intermediates: bool) -> dict[str, torch.Tensor]:
        assert given[3].equal(speech(trained.dims)[1]) and not intermediates
        return {"decoder": peer["decoder"] * factor}

    monkeypatch.setattr(chain, "pytorch_logits", pytorch_logits)
    monkeypatch.setattr(chain, "max_chain", max_chain)
    monkeypatch.setattr(Subject, "graphs", {})
    found = teacher_forced(trained, clip)
    assert (found.passed, found.comparison.inputs, found.pairs > 0) == (passed, clip["file"], True)


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
