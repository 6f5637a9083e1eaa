"""A block of the table is judged, compiled ahead, benchmarked and reported, whatever it is called."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maxwhisper.network.blocks import BLOCKS, Block
from reference.blocks import TWINS
from reference.pytest_plugin.selection import block_of
from reference.suite import Suite

from .compiling import nothing_compiles
from .test_selection import PARITY, PERF, Collected, collect  # noqa: F401 - a fixture

pytest_plugins = ["pytester"]

ODD, LIKE = "oddity", "encoder.mlp"


def on_pytorch(suite: Suite, block: Block, layer: int) -> Callable[..., list[Tensor]]:
    """Returns what MAX would compute, without compiling it."""
    assert block.name == ODD
    return torch.no_grad()(lambda x: TWINS[LIKE](suite.peer, layer, x=x))


@pytest.fixture(autouse=True)
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a block under a name that shares no word with any other."""
    monkeypatch.setitem(BLOCKS, ODD, replace(BLOCKS[LIKE], name=ODD))
    monkeypatch.setitem(TWINS, ODD, TWINS[LIKE])
    monkeypatch.setattr(Suite, "executable", on_pytorch)


@pytest.mark.parametrize(
    "options",
    [[PARITY], [PERF / "test_speed.py"], [PARITY, "--compile-only", "sm_80"]],
    ids=["judged", "timed", "lowered"],
)
def test_it_is_collected(options: list[str], collect: Callable[..., Collected]) -> None:  # noqa: F811
    found = collect(*options, "--size", "fixture", "--dtype", "float32")
    ours, like = ([item for item in found.items if block_of(item) == name] for name in (ODD, LIKE))
    faults = [item for item in like if item.get_closest_marker("faults")]
    assert ours and len(ours) == len(like) - len(faults)
    assert found.blocks(ODD) == {ODD}


def test_it_is_judged_and_reported(pytester: pytest.Pytester, tmp_path: Path) -> None:
    options = ["--size", "fixture", "--dtype", "float32", "--report", str(tmp_path)]
    with nothing_compiles():
        done = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", PARITY, "-k", f"{ODD} and speech", *options)
    assert done.ret == pytest.ExitCode.OK, done.stdout.str()
    report = json.loads((tmp_path / "report.json").read_text())
    assert {judgement["comparison"]["block"] for judgement in report["judgements"]} == {ODD}
    assert report["passed"]
    assert ODD in (tmp_path / "report.html").read_text() and ODD in (tmp_path / "summary.md").read_text()
