"""Which tests a run takes: what the options leave out, what -k finds, and whether any of it compares."""

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from maxwhisper.network.blocks import BLOCKS
from maxwhisper.network.log_mel import LOG_MEL

from ..precompile import TRANSCRIBING, suite_job
from .compiling import Compiling
from .models import Models
from .options import Options
from .words import all_words, finds
from .workers import group, is_worker

COMPARES = pytest.StashKey[bool]()
"""Whether anything was compared if -k and -m left all that they choose from."""


def pytest_itemcollected(item: pytest.Item) -> None:
    if is_worker(item.config):  # before pytest-xdist looks, which is first of all that see the whole list
        item.add_marker(pytest.mark.xdist_group(group(models_of(item), item.path)))


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Leaves out what the options do not ask for, has -k find blocks by every word for them, and sorts what that leaves
    by model and dtype, so that few are in memory at a time, and within one by what is compiled first."""
    out = [item for item in items if not wanted(config, item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    make_findable(items, config.option.keyword)
    config.stash[COMPARES] = any(compares(item) for item in items)

    yield  # to pytest's own -k and -m; its --failed-first sorts after this
    alone = Models.of(config).alone = compared_alone(items)
    order = {key: number for number, key in enumerate(dict.fromkeys(tuple(models_of(item)) for item in items))}
    items.sort(key=lambda item: (order[tuple(models_of(item))], not takes_few_graphs(item, alone)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has what later tests need compiled by other processes while the first model compiles here; not for benchmarks,
    which they would disturb."""
    config = session.config
    if is_worker(config) or config.getoption("collectonly") or Options.of(config).artifacts:
        return  # a worker has others beside it that compile
    if lowered := next((item for item in session.items if "lowering" in item.fixturenames), None):  # type: ignore[attr-defined]
        Compiling.of(config).for_target(parameters(lowered)["lowering"])  # while other tests compile what they read
        return
    jobs = jobs_of_others(config, session.items)
    for some in filter(None, (jobs[::2], jobs[1::2])):
        Compiling.of(config).start(some)


def jobs_of_others(config: pytest.Config, items: Iterable[pytest.Item]) -> list[str]:
    """Returns what other processes can compile while the blocks of the first model compile here, in the order in which
    it will be needed."""
    judged = [item for item in items if not item.get_closest_marker("benchmarked")]
    models, alone = list(dict.fromkeys(model for item in judged for model in models_of(item))), Models.of(config).alone
    jobs = [suite_job(*model, alone.get(model, ())) for model in models[1:]]
    for first in models[:1]:
        if any(not takes_few_graphs(item, alone) for item in judged if models_of(item) == [first]):
            jobs.insert(0, suite_job(*first))
    transcribing = any("checkpoint_path" in item.fixturenames for item in judged)  # type: ignore[attr-defined]
    if transcribing and models and Options.of(config).device == "cpu":
        jobs.append(TRANSCRIBING)
    return jobs


def wanted(config: pytest.Config, item: pytest.Item) -> bool:
    """Tells whether the test is of the kind that the run is, --size has a model for it, and --faults its faults: those
    of weights in float32 by default."""
    options, fixtures = Options.of(config), item.fixturenames  # type: ignore[attr-defined]
    target = item.get_closest_marker("compiles_for")
    if bool(options.targets) != bool(target or "lowering" in fixtures):
        return False
    if target and target.args[0] not in options.targets:
        return False
    if item.get_closest_marker("clock") and not options.times:
        return False
    if item.get_closest_marker("nightly") and not config.getoption("--nightly"):
        return False
    faults, asked = item.get_closest_marker("faults"), config.getoption("--faults")
    if faults and (asked or "weights") not in ("all", faults.args[0]):
        return False
    if faults and not asked and not config.getoption("--dtype") and models_of(item)[0][1] != torch.float32:
        return False
    return "suite" not in fixtures or models_of(item)[0][0] in options.sizes


# ---- what a test is about ------------------------------------------------------------------------------------------


def parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def block_of(item: pytest.Item) -> str | None:
    """Returns the block that a test compares, times, compiles or puts a fault into; None for any other test."""
    params = parameters(item)
    named = [getattr(params.get(name), "block", None) for name in ("comparison", "fault")]
    named += [params.get("block"), str(params.get("graph")).removesuffix(" with intermediates")]
    return next((name for name in named if name in BLOCKS), None)


def make_findable(items: Iterable[pytest.Item], expression: str) -> None:
    """Has -k with this expression find the tests of every block that one of its words means."""
    typed = set(re.findall(r"[\w.-]+", expression))
    for item in items:
        if block := block_of(item):
            item.extra_keyword_matches.update(word for word in typed if finds(word, block))
            # What transcribes is compared by itself and, in test_network.py, in a row.
            if "comparison" in parameters(item) and BLOCKS[block].unit != "parts" and block != LOG_MEL:
                item.extra_keyword_matches.add("network")


def compares(item: pytest.Item) -> bool:
    """Tells whether a test leaves a comparison of MAX with PyTorch behind: of a block, a chain or a whole transcript.

    What is tried on the judge is of wrong models, and properties are of one graph on made-up inputs.
    """
    return "run" in item.fixturenames and not item.get_closest_marker("faults")  # type: ignore[attr-defined]


def models_of(item: pytest.Item) -> list[tuple[str, torch.dtype]]:
    """Returns the model, as (size, dtype), that a test is about; nothing for a test that is about none."""
    params = parameters(item)
    if "comparison" in params:
        return [(params["comparison"].size, params["comparison"].dtype)]
    return [params["suite"]] if "suite" in params else []


def compared_alone(items: Iterable[pytest.Item]) -> dict[tuple[str, torch.dtype], frozenset[str]]:
    """Returns, by model, as (size, dtype), the blocks that tests compare, where these are so few that to compile them
    without the others takes less than half the time: whoever selects a few waits for them alone."""
    compared: dict[tuple[str, torch.dtype], set[str]] = {}
    for item in items:
        if comparison := parameters(item).get("comparison"):
            compared.setdefault((comparison.size, comparison.dtype), set()).add(comparison.block)
    return {model: frozenset(names) for model, names in compared.items() if len(names) <= len(BLOCKS) // 2}


def takes_few_graphs(item: pytest.Item, alone: Container[tuple[str, torch.dtype]]) -> bool:
    """Tells whether a test takes none but graphs that are compiled before all others: those of what audio and the start
    of a text go through, or of the blocks that are compared alone. Not a fault's, which is looked for in every block.

    alone: the models of which some blocks are compared alone.
    """
    if (comparison := parameters(item).get("comparison")) is None:
        return False
    return BLOCKS[comparison.block].unit == "network" or models_of(item)[0] in alone


def leaves_no_verdict(item: pytest.Item) -> bool:
    """Tells whether a test of tests/parity leaves no verdict, as of properties, loaders and compiled code."""
    return of_parity(item.nodeid) and "run" not in item.fixturenames  # type: ignore[attr-defined]


def of_parity(nodeid: str) -> bool:
    """Tells whether a test stands in tests/parity, whatever words are in its name."""
    return "tests/parity" in nodeid.partition("::")[0]


def left_out(config: pytest.Config, selected: Sequence[pytest.Item]) -> str | None:
    """Says so where -k or -m left nothing that compares, though what they chose from did; None where they left
    something, or tests of other things alone."""
    asked = {"-k": config.option.keyword, "-m": config.option.markexpr}
    given = " ".join(f"{option} '{expression}'" for option, expression in asked.items() if expression)
    parity = not selected or any(map(of_parity, (item.nodeid for item in selected)))
    if not given or not parity or any(compares(item) for item in selected):
        return None
    return f"no block was compared with PyTorch: {given} selects none. Words that do: {', '.join(all_words())}"
