"""The judge of steppers on trial: a right stepper passes, and each of these wrong ones does not."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maxwhisper import load_model
from maxwhisper.decoding.cache import KeyValueCache
from maxwhisper.decoding.rules import Rules
from maxwhisper.decoding.speculative import SpeculativeStepper
from maxwhisper.decoding.stepper import Advanced, Stepper, Texts
from reference.fixtures import NANO
from reference.models import trained
from reference.steps import (
    FIRST_GO,
    SCENES,
    Scene,
    advanced_twice,
    broken_promises,
    forward,
    given,
    judge_steps,
    kept,
)
from reference.suite import Suite

from .memory import Remembering

BEGIN = 50364
GREEDY = Scene("2 windows", (9, 20), (7, 7))
BEAMS = Scene("3 beams of 2 windows", (8, 15), (1, 1), n_text=3, n_best=4)


@pytest.fixture(scope="module")
def judged() -> Suite:
    """Returns a suite that remembers what has passed: what is wrong must not be taken for it."""
    return Suite(trained(), torch.float32, memory=Remembering())


@pytest.fixture(scope="module")
def stepper() -> Stepper:
    return load_model(NANO).stepper


@dataclass
class Wrong:
    """A stepper that another one takes the steps of: with other texts or rules, or a result that is changed."""

    inner: Stepper
    given: Callable[[Texts, KeyValueCache, Rules], tuple[Texts, Rules]] = lambda texts, cache, rules: (texts, rules)
    found: Callable[[Advanced, KeyValueCache], Advanced] = lambda advanced, cache: advanced
    max_candidates: int | None = field(default=None, init=False)
    tokens_first: bool = field(default=False, init=False)
    searches: bool = field(default=False, init=False)

    def advance(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: torch.Tensor) -> Advanced:
        texts, rules = self.given(texts, cache, rules)
        return self.found(self.inner.advance(texts, cache, rules, n_token), cache)


def test_a_right_one_passes(judged: Suite, stepper: Stepper) -> None:
    assert all(judge_steps(judged, Wrong(stepper), scene).passed for scene in (GREEDY, BEAMS))


def test_scenes_have_tokens_proposed_for_one_text_and_for_several(
    judged: Suite, stepper: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most texts that nobody has said end before."""
    found, propose = set(), SpeculativeStepper._propose

    def noted(self: SpeculativeStepper, texts: Texts, *others: Any) -> Advanced:
        found.add(len(texts.tokens))
        return propose(self, texts, *others)

    monkeypatch.setattr(SpeculativeStepper, "_propose", noted)
    for scene in SCENES:
        if max(scene.n_token) > FIRST_GO:
            advanced_twice(stepper, given(judged, scene, torch.nan))
    assert found == {1, 2, 3}


@pytest.mark.parametrize("scene", [GREEDY, BEAMS, Scene("2 beams", (9,), (1,), n_text=2, n_best=3, latest=7)], ids=str)
def test_a_scene_is_what_it_says(judged: Suite, scene: Scene) -> None:
    """Every text has the oracle's keys and values of its own, in several rows where a window has several texts, and
    nothing behind them that could be right."""
    made = given(judged, scene, torch.nan)
    n_window, n = len(scene.lengths), scene.n_text * len(scene.lengths)
    assert len(made.texts.tokens) == n
    assert made.texts.lengths.equal(torch.tensor(scene.lengths).repeat_interleave(scene.n_text))
    for text in range(n):
        past = int(made.texts.lengths[text]) - 1
        tokens = made.texts.tokens[text, : past + 1]
        right = forward(judged.model.oracle, made, tokens[:-1], text, [past - 1])[1:]
        ours = kept(made.cache, text, past)
        assert all(kv.equal(true[0].transpose(0, 1).to(kv)) for kv, true in zip(ours, right, strict=True))
        assert len(made.cache.rows[text, :past].unique()) == scene.n_text
        assert made.cache.own[0][text, :, past:].isnan().all() and not ours[0].isnan().any()
        if scene.latest is not None:
            assert tokens[-1] == BEGIN + scene.latest
    totals = made.texts.totals
    assert totals.all() and len(totals.unique()) == (n if n_window > 1 else n - 1)
    first, *others = made.cache.cross[0]
    assert len(made.cache.cross[0]) == n_window and not any(each.equal(first) for each in others)
    assert n_window > 1 or made.texts.tokens[0].equal(made.texts.tokens[1])


def other_audio(texts: Texts, cache: KeyValueCache, rules: Rules) -> tuple[Texts, Rules]:
    cache.cross[:] = [kv.flip(0) for kv in cache.cross]  # and leaves the scene's as it is, for other tests
    cache.inputs().clear()
    return texts, rules


def another_texts_row(texts: Texts, cache: KeyValueCache, rules: Rules) -> tuple[Texts, Rules]:
    cache.rows[3:6, 13] = cache.rows[3:6, 13].flip(0)
    return texts, rules


def anything_allowed(texts: Texts, cache: KeyValueCache, rules: Rules) -> tuple[Texts, Rules]:
    return texts, rules._replace(suppressed=torch.zeros_like(rules.suppressed))


def timestamps_like_text(texts: Texts, cache: KeyValueCache, rules: Rules) -> tuple[Texts, Rules]:
    return texts, rules._replace(limits=torch.tensor([len(rules.suppressed), rules.eot]))


def sums_begin_at_nothing(texts: Texts, cache: KeyValueCache, rules: Rules) -> tuple[Texts, Rules]:
    return texts._replace(totals=torch.zeros_like(texts.totals)), rules


def one_place_back(texts: Texts, cache: KeyValueCache, rules: Rules) -> tuple[Texts, Rules]:
    return texts._replace(tokens=texts.tokens[:, 1:], lengths=texts.lengths - 1), rules


def token_changed(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    tokens = advanced.texts.tokens.clone()
    tokens[0, advanced.texts.lengths[0] - 2] += 1
    return advanced._replace(texts=advanced.texts._replace(tokens=tokens))


def sum_off(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    return advanced._replace(texts=advanced.texts._replace(totals=advanced.texts.totals * (1 - 1e-4)))


def candidates_swapped(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    advanced.candidates.tokens[4] = advanced.candidates.tokens[4].flip(0)
    return advanced


def another_candidate(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    advanced.candidates.tokens[2, -1] += 1
    return advanced


def log_probability_off(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    advanced.candidates.logprobs[1, 1] += 1e-3
    return advanced


def earlier_key_overwritten(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    cache.own[2][0, 1, 3] *= 1 + 1e-6
    return advanced


def new_value_lost(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    cache.own[-1][1, :, advanced.texts.lengths[1] - 2] = 0
    return advanced


def another_texts_new_keys(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    cache.own[0][0, :, advanced.texts.lengths[0] - 2] = cache.own[0][1, :, advanced.texts.lengths[1] - 2]
    return advanced


def shorter_by_one(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    return advanced._replace(texts=advanced.texts._replace(lengths=advanced.texts.lengths - 1))


def cache_shorter_by_one(advanced: Advanced, cache: KeyValueCache) -> Advanced:
    cache.n_token -= 1
    return advanced


@pytest.mark.parametrize(
    ("fault", "scene"),
    [
        (other_audio, GREEDY),
        (other_audio, BEAMS),
        (another_texts_row, BEAMS),
        (anything_allowed, GREEDY),
        (timestamps_like_text, Scene("one text", (9,), (9,))),
        (sums_begin_at_nothing, GREEDY),
        (one_place_back, GREEDY),
    ],
)
def test_what_is_given_wrongly_fails(judged: Suite, stepper: Stepper, fault: Callable, scene: Scene) -> None:
    assert judge_steps(judged, Wrong(stepper), scene).passed
    assert not judge_steps(judged, Wrong(stepper, given=fault), scene).passed


@pytest.mark.parametrize(
    ("fault", "scene"),
    [
        (token_changed, GREEDY),
        (sum_off, GREEDY),
        (candidates_swapped, BEAMS),
        (another_candidate, BEAMS),
        (log_probability_off, BEAMS),
        (earlier_key_overwritten, GREEDY),
        (new_value_lost, GREEDY),
        (another_texts_new_keys, BEAMS),
        (another_texts_new_keys, GREEDY),
        (cache_shorter_by_one, GREEDY),
        (shorter_by_one, GREEDY),
    ],
)
def test_what_is_found_wrongly_fails(judged: Suite, stepper: Stepper, fault: Callable, scene: Scene) -> None:
    assert judge_steps(judged, Wrong(stepper), scene).passed
    assert not judge_steps(judged, Wrong(stepper, found=fault), scene).passed


# ---- what a stepper promises ---------------------------------------------------------------------------------------

EOT = 9
CHANGES: dict[str, tuple[list[int], int, str]] = {
    "right": ([1, 2, 3, 4, 5], 5, ""),
    "ended": ([1, 2, 3, 4, EOT], 5, ""),
    "one token": ([1, 2, 3, 4, EOT], 4, ""),
    "an earlier token": ([7, 2, 3, 4, 5], 5, "its tokens have changed"),
    "the last one given": ([1, 2, 7, 4, 5], 5, "its tokens have changed"),
    "none": ([1, 2, 3, EOT, EOT], 3, "0 tokens more, expected 1 to 2"),
    "too many": ([1, 2, 3, 4, 5, 6], 6, "3 tokens more, expected 1 to 2"),
    "behind the end": ([1, 2, 3, 4, 5, 6], 5, "tokens behind its end"),
    "behind an end of text": ([1, 2, 3, EOT, 5], 5, "tokens behind its end"),
}
"""The text that a stepper makes of 1 2 3 where it may add two tokens, how long it says that is, and what is said."""


def promises(tokens: list[int], length: int, n_token: int = 2, change: Callable[[Any], object] = id) -> list[str]:
    cache = KeyValueCache()
    cache.append([torch.ones(1, 1, length - 1, 2)] * 2, n_position=9)
    before = [kept(cache, 0, 2)]
    change(cache)
    given = Texts(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.zeros(1))
    made: Any = SimpleNamespace(
        texts=given, n_token=torch.tensor([n_token]), rules=SimpleNamespace(eot=EOT), cache=cache
    )
    found: Any = SimpleNamespace(texts=Texts(torch.tensor([tokens]), torch.tensor([length]), torch.zeros(1)))
    return list(broken_promises(made, found, before))


@pytest.mark.parametrize("change", CHANGES)
def test_a_promise_that_is_not_kept_is_named(change: str) -> None:
    tokens, length, said = CHANGES[change]
    assert promises(tokens, length) == ([f"text 0: {said}"] if said else [])


def test_what_a_cache_promises() -> None:
    right = [1, 2, 3, 4, 5]
    assert promises([1, 2, 3], 3, n_token=0) == []
    assert promises([1, 2, 3, 4], 4, n_token=0) == ["text 0: 1 tokens more, expected 1 to 0"]
    assert promises(right, 5, change=lambda cache: setattr(cache, "n_token", 5)) == [
        "the cache says that it holds 5 tokens, expected all but the last"
    ]
    assert promises(right, 5, change=lambda cache: cache.own[1][0, 0, 1].add_(1)) == [
        "text 0: keys and values of its earlier tokens have changed"
    ]
    assert promises(right, 5, change=lambda cache: cache.own[1][0, 0, 2].add_(1)) == []


def test_a_scene_keeps_no_suite_in_memory() -> None:
    suite = Suite(trained(), torch.float32)
    given(suite, SCENES[0], torch.nan)
    gone = weakref.ref(suite)
    del suite
    gc.collect()
    assert gone() is None
