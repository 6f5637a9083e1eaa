"""What tests are run with: every comparison, every graph to be compiled, every suite that the options ask for."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from maxwhisper.network.blocks import BLOCKS

from ..activations import KINDS, RANDOM
from ..inputs import comparisons
from ..judge import Comparison, dtype_name
from ..lowering import graphs
from ..models import FIXTURE, SIZES, TRAINED
from .models import Models
from .options import Options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "comparison" in metafunc.fixturenames:
        rows = [marked(config, (each.size, each.dtype), each) for each in compared(config)]
        metafunc.parametrize("comparison", rows, ids=identify)
    elif "lowering" in metafunc.fixturenames:
        names = ["lowering", "size", "dtype", "graph"]
        if "graph" not in metafunc.fixturenames:  # of all that is compiled together
            names.pop()
        models_of_targets = dict.fromkeys(row[: len(names)] for row in lowered(config))
        metafunc.parametrize(names, list(models_of_targets), ids=in_test_name, indirect=["lowering"])
    elif "suite" in metafunc.fixturenames:
        timed = metafunc.definition.get_closest_marker("benchmarked")
        precisions = Options.of(config).dtypes if config.getoption("--dtype") or not timed else [torch.float32]
        pairs = itertools.product(sizes_for(config, metafunc.definition), precisions)
        rows = [marked(config, pair, pair) for pair in pairs]
        metafunc.parametrize("suite", rows, ids=lambda pair: f"{pair[0]}-{dtype_name(pair[1])}", indirect=True)


def marked(config: pytest.Config, model: tuple[str, torch.dtype], value: object) -> Any:
    """Returns a parameter of a test, which runs at night where its model does."""
    return pytest.param(value, marks=[pytest.mark.nightly] if Options.of(config).is_nightly(*model) else [])


def sizes_for(config: pytest.Config, test: pytest.Item) -> tuple[str, ...]:
    """Returns the models that a test is for. Faults are tried in the fixture, whose layers differ from each other;
    benchmarks are of tiny in float32 unless options say otherwise, and of the fixture where nothing is timed."""
    options = Options.of(config)
    only = options.sizes
    if test.get_closest_marker("benchmarked") and not (config.getoption("--size") or options.checkpoint):
        only = ("tiny",) if options.times else (FIXTURE,)
    if test.get_closest_marker("trained"):
        only = TRAINED
    if test.get_closest_marker("faults"):
        only = (FIXTURE,)
    return tuple(size for size in options.sizes if size in only) or only[:1]


def kinds_of(size: str) -> tuple[str, ...]:
    """Returns the inputs to judge a model on: all kinds if it is trained, else speech and random inputs."""
    return KINDS if size in TRAINED else ("speech", RANDOM)


def models(options: Options, name: str) -> Iterator[tuple[str, torch.dtype]]:
    """Yields every size and dtype that a block or graph is taken in: the log-mel spectrogram is always float32."""
    return itertools.product(options.sizes, options.dtypes[:1] if name == "log_mel" else options.dtypes)


def compared(config: pytest.Config) -> Iterator[Comparison]:
    """Yields every comparison of every block that the options ask for."""
    options = Options.of(config)
    for size in options.sizes:
        dims = SIZES[size] if size in SIZES else Models.of(config).model(size).dims
        for dtype in options.dtypes:
            for block in BLOCKS.values():
                if (size, dtype) in models(options, block.name):
                    yield from comparisons(block, size, dims, dtype, kinds_of(size), options.device)


def lowered(config: pytest.Config) -> Iterator[tuple[str, str, torch.dtype, str]]:
    """Yields every target, size, dtype and graph that --compile-only asks for."""
    options = Options.of(config)
    for target, size, dtype in itertools.product(options.targets, options.sizes, options.dtypes):
        for graph in graphs(target, size, dtype):
            if (size, dtype) in models(options, graph):
                yield target, size, dtype, graph


def in_test_name(value: torch.dtype | str) -> str:
    return value.replace(" ", "_") if isinstance(value, str) else dtype_name(value)


def identify(comparison: Comparison) -> str:
    c = comparison
    return f"{c.size}-{dtype_name(c.dtype)}-{c.block}-{c.layer}-{c.inputs.replace(' ', '_')}"
