"""A selection of few blocks: what is compiled for it, and which process of pytest-xdist it goes to."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from maxwhisper.engine.artifacts import Artifacts
from maxwhisper.network.blocks import BLOCKS
from reference.intermediates import WITH_INTERMEDIATES
from reference.judge import Comparison
from reference.models import FIXTURE, load
from reference.precompile import suite_job
from reference.pytest_plugin.selection import compared_alone, models_of
from reference.pytest_plugin.workers import group
from reference.subject import CHOSEN
from reference.suite import Suite

from ..conftest import group_of

FEW = frozenset(["encoder.attention", "decoder.mlp.step"])


def item(file: str = "test_file", **params: object) -> Any:
    return SimpleNamespace(path=Path(f"tests/parity/{file}.py"), callspec=SimpleNamespace(params=params))


def compare(block: str, size: str = FIXTURE) -> Any:
    return item(comparison=Comparison(size, torch.float32, block, 0, "speech"))


def suite(kept: bool, held: Artifacts | None = None, only: frozenset[str] = FEW) -> Suite:
    """Returns a suite of which `kept` says whether all has been compiled earlier."""
    made = Suite(load(FIXTURE), torch.float32, held=held, only=only)
    made.subject.found_kept.update(network=kept, parts=kept)
    return made


def test_few_blocks_are_named_by_model() -> None:
    items = [compare("encoder.mlp"), compare("encoder.mlp"), compare("encoder.stem", "tiny"), item(suite=("tiny", "a"))]
    assert compared_alone([*items, item()]) == {
        (FIXTURE, torch.float32): {"encoder.mlp"},
        ("tiny", torch.float32): {"encoder.stem"},
    }


def test_more_than_half_of_the_blocks_are_not_few() -> None:
    half = len(BLOCKS) // 2
    assert compared_alone(map(compare, itertools.islice(BLOCKS, half)))
    assert not compared_alone(map(compare, itertools.islice(BLOCKS, half + 1)))


def test_few_blocks_compile_without_the_others() -> None:
    few = suite(kept=False).subject
    assert {block.name for block in BLOCKS.values() if few.unit(block) == CHOSEN} == FEW
    assert {program.name for program in few.programs(CHOSEN)} == FEW
    others = {f"{name} with intermediates" for name in WITH_INTERMEDIATES}
    assert {program.name for program in few.programs("parts")} > FEW | others
    assert CHOSEN not in few.units  # which are all that a chain takes


def test_the_spectrogram_compiles_without_the_network_that_a_transcript_takes_it_from() -> None:
    few = suite(kept=False, only=frozenset(["log_mel", "encoder"]))
    assert [few.subject.unit(BLOCKS[name]) for name in ("log_mel", "encoder")] == [CHOSEN, "network"]
    assert [program.name for program in few.subject.programs(CHOSEN)] == ["log_mel"]


@pytest.mark.parametrize(("kept", "held"), [(True, None), (False, Mock(spec=Artifacts))], ids=["kept", "artifacts"])
def test_what_is_compiled_already_is_used(kept: bool, held: Artifacts | None) -> None:
    """Artifacts hold units, and none of a selection."""
    assert {suite(kept, held).subject.unit(BLOCKS[name]) for name in FEW} == {"parts"}


def test_a_process_is_given_all_of_a_model_or_of_a_file() -> None:
    def of(item: Any) -> str:
        return group(models_of(item), item.path)

    of_model = {of(compare(name)) for name in BLOCKS} | {of(item(suite=(FIXTURE, torch.float32)))}
    assert of_model == {suite_job(FIXTURE, torch.float32)}
    assert of(compare("encoder", "tiny")) not in of_model
    assert of(item("test_one")) == "test_one" != of(item("test_other"))


def test_a_group_is_known_by_the_names_of_its_tests(request: pytest.FixtureRequest) -> None:
    """For those of this run, whichever they are."""
    pairs = {(group(models_of(test), test.path), group_of(test.nodeid)) for test in request.session.items}
    assert len(pairs) == len({by_test for by_test, _ in pairs}) == len({by_name for _, by_name in pairs})
