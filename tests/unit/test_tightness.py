"""How small an error the judge finds. Of the fixture's parts by day, of everything else at night."""

from collections.abc import Callable, Iterator

import pytest
import torch

import reference.tightness
from maxwhisper.engine.surroundings import one_torch_thread
from maxwhisper.network.blocks import BLOCKS, Block
from reference import soak
from reference.judge import K
from reference.measures import DTYPES, Condition
from reference.models import FIXTURE, load
from reference.suite import Suite
from reference.tightness import KINDS, smallest_failing, tightness, trial_of_pytorch
from reference.trial import Trial

PARTS = [block for block in BLOCKS.values() if block.unit == "parts"]
ONE_NUMBER = "decoder.logits.step"
"""The fixture has one vector for nearly all tokens, so its logits of one position are little more than one number, in
which PyTorch is lucky: it errs by less than a sum in pairs is expected to."""


@pytest.fixture(scope="module")
def trained() -> Iterator[Suite]:
    with one_torch_thread():
        yield Suite(load(FIXTURE), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", PARTS, ids=lambda block: block.name)
def test_k_times_pytorchs_error_is_the_most_that_passes(trained: Suite, block: Block, kind: str) -> None:
    found = (smallest_failing(trained, comparison) for comparison in trained.comparisons(block, [kind]))
    assert any(factor <= K for factor in found) or block.name == ONE_NUMBER


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_block_is_judged_tightly(dtype: torch.dtype) -> None:
    """Whole networks in float32 alone, for the roundings inside them count less than their budgets have it."""
    whole, blocks = Suite(load(FIXTURE), dtype), BLOCKS.values() if dtype == torch.float32 else PARTS
    loose = {block.name for block in blocks for kind in KINDS if tightness(whole, block, kind)[0] > K}
    assert loose <= {ONE_NUMBER}


def test_the_judge_passes_less_and_fails_more(trained: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """And looks for the condition where a comparison would fail without, only."""
    comparison = next(trained.comparisons(BLOCKS["decoder.mlp.step"], ["speech"]))
    factor = smallest_failing(trained, comparison)
    trials = [trial_of_pytorch(trained, comparison, times * factor) for times in (0.9, 1.1)]
    assert [trial.judge().passed for trial in trials] == [True, False]
    monkeypatch.setattr(Trial, "condition", property(lambda _: Condition(50.0)))
    assert [trial.judge().condition for trial in trials] == [1, 50]


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (reference.tightness.main, ["--size", "huge"], "invalid choice: 'huge'"),
        (soak.main, ["--size", "huge"], "invalid choice: 'huge'"),
        (soak.main, ["--repetitions", "0"], "must be a whole number above 0"),
    ],
)
def test_an_option_under_which_nothing_is_compared_is_refused(
    main: Callable[[list[str]], int], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err
