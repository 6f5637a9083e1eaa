"""A soak on trial: one false alarm in any model, of either subject, is its status."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reference import soak
from reference.judge import Comparison, Judgement, Measure, Output
from reference.tightness import smallest_failing, tightness


def judgement(used: float, defects: tuple[str, ...] = ()) -> Judgement:
    outputs = () if defects else (Output(0, (1,), (Measure("relative L2", used, 0.0, 1.0),)),)
    return Judgement(Comparison("s", torch.float32, "b", 0, "random"), outputs, defects)


@pytest.mark.parametrize(
    ("found", "n_alarm"),
    [
        ([judgement(0.2), judgement(0.9)], 0),
        ([judgement(0.2), judgement(1.1)], 2),
        ([judgement(0.2), judgement(0, ("shape",))], 2),
        ([judgement(float("nan")), judgement(0.2)], 2),
    ],
)
def test_every_verdict_that_does_not_pass_is_an_alarm(
    found: list[Judgement], n_alarm: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = []

    def repetition(suite: Any, seed: int) -> Iterator[tuple[str, Judgement]]:
        seeds.append(seed)
        yield from zip(("MAX", "PyTorch"), found, strict=True)

    monkeypatch.setattr(soak, "repetition", repetition)
    suite: Any = SimpleNamespace(model=SimpleNamespace(size="fixture"), dtype=torch.float32)
    assert soak.soak(suite, 2) == n_alarm and seeds == [1, 2], "other inputs in every repetition"
    said = capsys.readouterr().out
    assert f"{n_alarm} alarms in 4 comparisons" in said
    assert said.count("in the subject's place: ") == n_alarm


def test_what_came_nearest_to_its_budget_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = {1: 0.2, 2: 0.7, 3: 0.5}
    monkeypatch.setattr(soak, "repetition", lambda _, seed: iter([("MAX", judgement(used[seed]))]))
    soak.soak(SimpleNamespace(model=SimpleNamespace(size="fixture"), dtype=torch.float32), 3)  # type: ignore[arg-type]
    assert "MAX used 0.70 of a budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("alarms", "status"), [({}, 0), ({("tiny", "bfloat16"): 1}, 1), ({("fixture", "float32"): 3}, 1)]
)
def test_one_alarm_is_the_status(
    alarms: dict[tuple[str, str], int], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def found(suite: Any, repetitions: int) -> int:
        asked.append((*suite, repetitions))
        return alarms.get(suite, 0)

    monkeypatch.setattr(soak, "load", lambda size: size)
    monkeypatch.setattr(soak, "Suite", lambda model, dtype: (model, str(dtype).removeprefix("torch.")))
    monkeypatch.setattr(soak, "soak", found)
    assert soak.main(["--repetitions", "7"]) == status
    assert asked == [(size, dtype, 7) for size in ("fixture", "tiny") for dtype in ("float32", "bfloat16")]


# ---- tightness -----------------------------------------------------------------------------------------------------


def test_the_first_measure_that_fails_says_how_tight_a_comparison_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those of values in which PyTorch errs; where it is exact in all, in roundings."""
    few = [Measure("relative L2", 0.0, 0.25, 1.0), Measure("worst position", 0.0, 0.0, 0.125)]
    few += [Measure("worst channel", 0.0, 0.25, 1.5), Measure("KL max", 0.0, 1.0, 1.0)]
    trial = SimpleNamespace(condition=None, judged=lambda _: SimpleNamespace(measures=[(None, m) for m in few]))
    monkeypatch.setattr("reference.tightness.trial_of_pytorch", lambda *_: trial)
    comparison: Any = SimpleNamespace(dtype=torch.float32)
    suite: Any = SimpleNamespace(comparisons=lambda *_: [comparison, comparison])
    assert smallest_failing(suite, comparison) == 4.0
    found = iter([4.0, 9.0])
    monkeypatch.setattr("reference.tightness.smallest_failing", lambda *_: next(found))
    assert tightness(suite, SimpleNamespace(), "speech") == (4.0, 9.0)  # type: ignore[arg-type]
