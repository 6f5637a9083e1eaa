"""What the judge of steppers takes from each side: a token that is not the likeliest, and reckoning, are compared."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maxwhisper.decoding.cache import KeyValueCache
from maxwhisper.decoding.stepper import Advanced, Candidates, Texts
from reference import steps
from reference.blocks import TWINS
from reference.models import SIZES
from reference.steps import Found, three

RIGHT = torch.tensor([[1.0, 4.0, 2.0], [5.0, 3.0, 0.0]], dtype=torch.float64)


def test_each_side_is_held_against_its_own_likeliest_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text 1 2 is given the likeliest token, and then another one."""
    cache = KeyValueCache()
    cache.append([torch.randn(1, 1, 3, 2) for _ in range(2)], 9)
    scene, window = SimpleNamespace(n_best=2), SimpleNamespace(filters=[])
    texts = Texts(torch.tensor([[1, 2]]), torch.tensor([2]), torch.tensor([-8.0]))
    made: Any = SimpleNamespace(scene=scene, texts=texts, cache=cache, window=lambda text: window)
    logprobs = torch.tensor([[-0.25, -2.0]])
    given = Texts(torch.tensor([[1, 2, 1, 2]]), torch.tensor([4]), torch.tensor([-9.0]))
    advanced = Advanced(given, Candidates(torch.tensor([[0, 2]]), logprobs))
    logits = {"oracle": RIGHT, "peer": RIGHT.float() + torch.tensor([[1.0], [2.0]])}
    kv = torch.randn(1, 1, 3, 2)
    monkeypatch.setattr(steps, "forward", lambda model, *_: [logits[model][None], kv, kv])
    suite: Any = SimpleNamespace(model=SimpleNamespace(oracle="oracle"), peer="peer")
    oracle, peer, ours = three(suite, made, advanced, 0)
    assert oracle.selected.tolist() == peer.selected.tolist() == [4.0, 5.0] and ours.selected.tolist() == [4.0, 0.0]
    scale = RIGHT.logsumexp(1)
    assert ours.candidates.equal(logprobs[0] + scale[-1]) and ours.of_candidates.tolist() == [5.0, 0.0]
    assert oracle.candidates.tolist() == oracle.of_candidates.tolist() == peer.of_candidates.tolist() == [5.0, 3.0]
    assert float(oracle.total) == -8.0 + 4.0 + 0.0 and float(ours.total) == -9.0 + float(scale.sum())
    assert all(map(torch.equal, ours.kv, [x[0, :, 1:3].transpose(0, 1).flatten(1) for x in cache.own[:2]]))


@pytest.mark.parametrize("n_best", [1, 2])
def test_all_that_is_found_of_every_text_is_judged_by_the_budget_of_a_step(
    n_best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three texts the one in the middle waits."""
    asked: list[Any] = []

    def three(suite: Any, made: Any, advanced: Any, text: int) -> list[Found]:
        """Returns what is found of a text, numbered: from 0 on of the first text's oracle."""
        numbers = [10.0 * text + torch.arange(10) + 100 * side for side in range(3)]
        return [Found(x[:1], x[1], x[2:3], x[3:4], list(x[4:, None])) for x in numbers]

    monkeypatch.setattr(steps, "three", three)
    monkeypatch.setattr(steps, "judge", lambda *given, **options: asked.extend([given, options]))
    dims, twin = SIZES["tiny"], TWINS["decoder.step"]
    suite: Any = SimpleNamespace(dims=dims)
    made: Any = SimpleNamespace(scene=SimpleNamespace(n_best=n_best), n_token=torch.tensor([2, 0, 1]))
    steps.judged_steps(suite, made, None, "of")  # type: ignore[arg-type]
    (of, *sides), options = asked
    reduction, roundings = twin.longest_reduction(dims), twin.roundings(dims)
    assert (of, options) == ("of", {"longest_reduction": reduction, "roundings": roundings, "chained": True})
    of_text = [n for n in range(10) if n_best > 1 or n not in (2, 3)]
    for side, found in enumerate(sides):
        assert [x.tolist() for x in found] == [[100 * side + n, 100 * side + 20 + n] for n in of_text]
    assert all(x.dtype == torch.float64 for x in sides[0])


@pytest.mark.parametrize("tokens_first", [False, True])
def test_what_is_not_written_yet_is_no_number_that_could_be_right(
    tokens_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def given(suite: Any, scene: Any, unwritten: float) -> Any:
        asked.append(unwritten)
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "given", given)
    with pytest.raises(KeyboardInterrupt):
        steps.judge_steps(None, SimpleNamespace(tokens_first=tokens_first), None)  # type: ignore[arg-type]
    assert str(asked) == ("[10000.0]" if tokens_first else "[nan]")
