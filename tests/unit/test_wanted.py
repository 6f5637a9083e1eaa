"""Which tests a run takes, by their markers and its options, and with which models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reference.models import FIXTURE
from reference.pytest_plugin.options import Options
from reference.pytest_plugin.parameters import models, sizes_for
from reference.pytest_plugin.selection import wanted

NOT_GIVEN = {"--device": "cpu", "--nightly": False, "benchmark_disable": True}


def config(**given: Any) -> Any:
    """Returns the config of a run with options, whose names are without their dashes."""
    options = NOT_GIVEN | {f"--{name}": value for name, value in given.items()}
    if given.get("timed"):
        options["benchmark_disable"] = False
    return SimpleNamespace(stash=pytest.Stash(), getoption=lambda name, default=None: options.get(name, default))


def item(*fixtures: str, suite: tuple[str, torch.dtype] = (FIXTURE, torch.float32), **markers: str) -> Any:
    """Returns a test with these fixtures and markers."""
    marked = {name: SimpleNamespace(args=(argument,)) for name, argument in markers.items()}
    params = {"suite": suite} if "suite" in fixtures else {}
    callspec = SimpleNamespace(params=params)
    return SimpleNamespace(fixturenames=fixtures, callspec=callspec, get_closest_marker=marked.get)


COMPARED, LOWERED = item("suite"), item("lowering")
NIGHTLY, CLOCK = item(nightly=""), item(clock="")
WEIGHTS, GRAPHS = item("suite", faults="weights"), item("suite", faults="graphs")
IN_BFLOAT16 = item("suite", suite=(FIXTURE, torch.bfloat16), faults="weights")
OF_TINY, OF_SMALL = (item("suite", suite=(size, torch.float32)) for size in ("tiny", "small"))
FOR_SM_80, FOR_HOST = item(compiles_for="sm_80"), item(compiles_for="host")
ALL = {
    "compared": COMPARED,
    "lowered": LOWERED,
    "nightly": NIGHTLY,
    "clock": CLOCK,
    "weights": WEIGHTS,
    "graphs": GRAPHS,
    "in bfloat16": IN_BFLOAT16,
    "of tiny": OF_TINY,
    "of small": OF_SMALL,
    "for sm_80": FOR_SM_80,
    "for host": FOR_HOST,
}
ALWAYS = {"compared", "weights", "of tiny"}


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, ALWAYS),
        ({"nightly": True}, ALWAYS | {"nightly"}),
        ({"timed": True}, ALWAYS | {"clock"}),
        ({"faults": "weights"}, ALWAYS | {"in bfloat16"}),
        ({"faults": "graphs"}, ALWAYS - {"weights"} | {"graphs"}),
        ({"faults": "all"}, ALWAYS | {"in bfloat16", "graphs"}),
        ({"dtype": "bfloat16"}, ALWAYS | {"in bfloat16"}),
        ({"size": "small,tiny"}, {"of tiny", "of small"}),
        ({"compile-only": "sm_80"}, {"lowered", "for sm_80"}),
        ({"compile-only": "all"}, {"lowered", "for sm_80", "for host"}),
    ],
)
def test_options_take_what_they_say(options: dict[str, Any], taken: set[str]) -> None:
    given = config(**options)
    assert {name for name, each in ALL.items() if wanted(given, each)} == taken


@pytest.mark.parametrize(
    ("options", "marker", "sizes"),
    [
        ({}, "", ("fixture", "tiny")),
        ({"size": "small"}, "", ("small",)),
        ({"size": "all"}, "trained", ("fixture",)),
        ({"size": "small,tiny"}, "trained", ("fixture",)),  # which `wanted` leaves out then
        ({"size": "small,tiny"}, "faults", ("fixture",)),
        ({"checkpoint": "x.pt"}, "", ("checkpoint",)),
        ({"checkpoint": "x.pt"}, "trained", ("checkpoint",)),
        ({"checkpoint": "x.pt"}, "faults", ("fixture",)),
        ({}, "benchmarked", ("fixture",)),
        ({"timed": True}, "benchmarked", ("tiny",)),
        ({"timed": True, "size": "small"}, "benchmarked", ("small",)),
        ({"timed": True, "checkpoint": "x.pt"}, "benchmarked", ("checkpoint",)),
        ({"checkpoint": "x.pt"}, "benchmarked", ("checkpoint",)),
    ],
)
def test_models_that_a_test_is_for(options: dict[str, Any], marker: str, sizes: tuple[str, ...]) -> None:
    test = item(**({marker: ""} if marker else {}))
    assert sizes_for(config(**options), test) == sizes


def test_what_is_compared_unless_options_say_otherwise() -> None:
    options = Options.of(config())
    both = [torch.float32, torch.bfloat16]
    assert options.dtypes == both and options.targets == () and options.artifacts is None
    assert list(models(options, "encoder")) == [(size, dtype) for size in ("fixture", "tiny") for dtype in both]
    assert list(models(options, "log_mel")) == [(size, torch.float32) for size in ("fixture", "tiny")]
