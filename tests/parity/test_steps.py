"""The graphs that transcribe: what they select, sum up and keep is what openai-whisper's filters make of the oracle."""

from collections.abc import Iterator
from typing import Any

import pytest

import maxwhisper
from maxwhisper.decoding.cpu import CPUStepper
from maxwhisper.decoding.gpu import GPUStepper
from reference.judge import dtype_name
from reference.results import Run
from reference.steps import SCENES, Scene, judge_steps
from reference.suite import Suite
from reference.trial import THREADS, cut_for


@pytest.fixture(scope="module")
def models(checkpoint_path: str, loading: dict[str, Any]) -> dict[str, maxwhisper.Whisper]:
    """Returns the models that have been loaded, by dtype."""
    return {}


def cases() -> Iterator[Any]:
    """Yields every scene as it is transcribed and without proposals, one of both with work cut for other threads."""
    for number, scene in enumerate(SCENES):
        n_thread = THREADS[number % len(THREADS)]
        for proposing, way in ((True, "as transcribed"), (False, "no proposals")):
            others = proposing == number % 2
            name = f"{scene}, {way}{f', cut for {n_thread} threads' * others}"
            yield pytest.param(scene, proposing, n_thread if others else None, id=name)


@pytest.mark.trained
@pytest.mark.parametrize(("scene", "proposing", "n_thread"), list(cases()))
def test_steps(
    suite: Suite,
    scene: Scene,
    proposing: bool,
    n_thread: int | None,
    models: dict[str, maxwhisper.Whisper],
    request: pytest.FixtureRequest,
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
    with cut_for(n_thread):
        judgement = judge_steps(suite, stepper, scene, request.node.name)
    run.judgements.append(judgement)
    if not judgement.passed:
        pytest.fail(f"\n{judgement}", pytrace=False)


@pytest.mark.trained
@pytest.mark.parametrize("name", ["one text", "5 beams"])
def test_a_captured_step_launches_the_kernels_of_an_executed_one(
    suite: Suite, name: str, checkpoint_path: str, loading: dict[str, Any]
) -> None:
    """Or what is replayed is not what the judge has seen pass elsewhere."""
    if suite.device == "cpu":
        pytest.skip("steps are captured on a GPU alone")
    stepper = maxwhisper.load_model(checkpoint_path, dtype=dtype_name(suite.dtype), **loading).stepper
    assert isinstance(stepper, GPUStepper)
    (scene,) = (each for each in SCENES if each.name == name)
    assert judge_steps(suite, stepper, scene, name).passed
    assert stepper.verify() == 1
