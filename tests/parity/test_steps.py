"""The graphs that transcribe: what they select, sum up and keep is what openai-whisper's filters make of the oracle."""

from typing import Any

import pytest

import maxwhisper
from maxwhisper.decoding.cpu import CPUStepper
from reference.judge import dtype_name
from reference.results import Run
from reference.steps import SCENES, Scene, judge_steps
from reference.suite import Suite


@pytest.fixture(scope="module")
def models(checkpoint_path: str, loading: dict[str, Any]) -> dict[str, maxwhisper.Whisper]:
    """The models that have been loaded, by dtype."""
    return {}


@pytest.mark.trained
@pytest.mark.parametrize("proposing", [True, False], ids=["as transcribed", "no proposals"])
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_steps(
    suite: Suite,
    scene: Scene,
    proposing: bool,
    models: dict[str, maxwhisper.Whisper],
    checkpoint_path: str,
    loading: dict[str, Any],
    run: Run,
) -> None:
    if not proposing and suite.device != "cpu":
        pytest.skip("tokens are proposed on a CPU alone")
    dtype = dtype_name(suite.dtype)
    if dtype not in models:
        models[dtype] = maxwhisper.load_model(checkpoint_path, dtype=dtype, **loading)
    model = models[dtype]
    stepper = model.stepper if proposing else CPUStepper(model.network, model.dims.n_text_ctx)
    judgement = judge_steps(suite, stepper, scene)
    run.judgements.append(judgement)
    if not judgement.passed:
        pytest.fail(f"\n{judgement}", pytrace=False)
