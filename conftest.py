"""Options of both suites, what they select, and what a run says at its end."""

import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from max.driver import accelerator_count
from whisper.model import ModelDimensions

from maxwhisper.blocks import BLOCKS, Block
from maxwhisper.errors import MaxWhisperError
from maxwhisper.runtime import COMPILE_LOG
from reference.activations import KINDS, RANDOM
from reference.ahead import CompileAhead
from reference.judge import Comparison
from reference.results import Run
from reference.suite import CHECKPOINT, DTYPES, FIXTURE, SIZES, Model, Suite, comparisons, load, trained

ALL_SIZES = (FIXTURE, *SIZES)
TRAINED = (FIXTURE, CHECKPOINT)
DEFAULT_SIZES = (FIXTURE, "tiny")
DEFAULT_DTYPES = ("float32", "bfloat16")
RUN = Run()
"""What this run has found."""
AHEAD: list[CompileAhead] = []
"""The process that compiles what later tests need, once there is one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("maxwhisper").addoption
    sizes, dtypes = ", ".join(ALL_SIZES), ", ".join(DTYPES)
    add("--size", help=f"models, comma-separated, of {sizes}, or all (default: {','.join(DEFAULT_SIZES)})")
    add("--dtype", help=f"precisions, comma-separated, of {dtypes}, or all (default: {','.join(DEFAULT_DTYPES)})")
    add(
        "--device", default="cpu", choices=["cpu", "gpu", "auto"], help="what MAX and PyTorch compute on (default: cpu)"
    )
    add("--require-gpu", action="store_true", help="fail if MAX and PyTorch do not both find a GPU")
    add("--checkpoint", help="a checkpoint of your own, by path or name, in the place of every --size")
    faults = "which faults the judge must catch, in every --dtype (default: weights, in float32)"
    add("--faults", choices=["weights", "graphs", "all"], help=faults)
    add("--report", metavar="DIR", help="write report.html, report.json and summary.md there")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults(kind): tries faults of weights or of graphs on the judge")
    config.addinivalue_line("markers", "benchmarked: times MAX and PyTorch")
    config.addinivalue_line("markers", "trained: needs trained weights, the fixture's or those of --checkpoint")
    config.addinivalue_line("markers", "blocks(*words, units): judge the blocks with one of the words in their names")
    chosen(config, "--size", ALL_SIZES, DEFAULT_SIZES)
    chosen(config, "--dtype", tuple(DTYPES), DEFAULT_DTYPES)
    if config.getoption("--require-gpu") and not gpu_found():
        raise pytest.UsageError("--require-gpu: MAX and PyTorch do not both find a GPU; `maxwhisper doctor` says why")
    if config.getoption("--device") == "gpu" and not gpu_found():
        raise pytest.UsageError("--device gpu: MAX and PyTorch do not both find a GPU; `maxwhisper doctor` says why")
    if config.getoption("--checkpoint"):
        checkpoint(config)


class Progress(logging.Handler):
    """Shows what is being compiled, and for how long, which pytest would keep to itself."""

    def __init__(self, reporter: pytest.TerminalReporter):
        super().__init__(logging.INFO)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.ensure_newline()
        self.reporter.write_line(record.getMessage())


def pytest_sessionstart(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and session.config.option.verbose >= 0:
        log = logging.getLogger("maxwhisper")
        log.addHandler(Progress(reporter))
        log.setLevel(logging.INFO)


def chosen(config: pytest.Config, option: str, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """The names given with an option; a usage error for one that is not known."""
    given = config.getoption(option)
    names = default if given is None else known if given == "all" else tuple(given.split(","))
    if unknown := [name for name in names if name not in known]:
        raise pytest.UsageError(f"{option} {','.join(unknown)} is not known: expected some of {', '.join(known)}")
    return names


def gpu_found() -> bool:
    return accelerator_count() > 0 and torch.cuda.is_available()


def device(config: pytest.Config) -> str:
    name = config.getoption("--device")
    return ("gpu" if gpu_found() else "cpu") if name == "auto" else name


def checkpoint(config: pytest.Config) -> Model:
    """The user's checkpoint; a usage error if it does not load, or has not the dimensions of a --size given with it."""
    try:
        model = trained(config.getoption("--checkpoint"), CHECKPOINT)
    except MaxWhisperError as error:
        raise pytest.UsageError(f"--checkpoint: {error}") from error
    size = config.getoption("--size")
    if size and (size not in SIZES or differing(model.dims, SIZES[size])):
        expected = SIZES.get(size, f"a size of {', '.join(SIZES)}")
        raise pytest.UsageError(f"--checkpoint {config.getoption('--checkpoint')} is {model.dims}, not {expected}")
    return model


def differing(ours: ModelDimensions, theirs: ModelDimensions) -> bool:
    """Whether two models differ in anything but their numbers of layers: SIZES have one layer of most."""
    return any(getattr(ours, name) != getattr(theirs, name) for name in vars(ours) if "layer" not in name)


def sizes(config: pytest.Config) -> tuple[str, ...]:
    return (CHECKPOINT,) if config.getoption("--checkpoint") else chosen(config, "--size", ALL_SIZES, DEFAULT_SIZES)


def dtypes(config: pytest.Config) -> list[torch.dtype]:
    return [DTYPES[name] for name in chosen(config, "--dtype", tuple(DTYPES), DEFAULT_DTYPES)]


# ---- what is compared ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def model_of(config: pytest.Config, size: str) -> Model:
    return load(size, config.getoption("--checkpoint"))


@lru_cache(maxsize=2)
def suite_of(config: pytest.Config, size: str, dtype: torch.dtype) -> Suite:
    if AHEAD:
        AHEAD[0].wait(size, dtype)
    return Suite(model_of(config, size), dtype, device(config))


def kinds_of(size: str) -> tuple[str, ...]:
    """Trained models are judged on every kind of inputs, random weights on speech and on random inputs."""
    return KINDS if size in TRAINED else ("speech", RANDOM)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "comparison" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("blocks")
        blocks = named_by(*marker.args, **marker.kwargs)
        metafunc.parametrize("comparison", list(selected(config, blocks)), ids=identify)
    elif "suite" in metafunc.fixturenames:
        timed = metafunc.definition.get_closest_marker("benchmarked")
        precisions = dtypes(config) if config.getoption("--dtype") or not timed else [torch.float32]
        pairs = [(size, dtype) for size in sizes_for(config, metafunc.definition) for dtype in precisions]
        metafunc.parametrize("suite", pairs, ids=lambda pair: f"{pair[0]}-{name_of(pair[1])}", indirect=True)


def sizes_for(config: pytest.Config, test: pytest.Item) -> tuple[str, ...]:
    """The models that a test is for. Faults are tried in the fixture, whose layers differ from each other; benchmarks
    are of tiny in float32, unless options say otherwise."""
    only = sizes(config)
    if test.get_closest_marker("benchmarked") and not config.getoption("--size"):
        only = ("tiny",)
    if test.get_closest_marker("trained"):
        only = TRAINED
    if test.get_closest_marker("faults"):
        only = (FIXTURE,)
    return tuple(size for size in sizes(config) if size in only) or only[:1]


def named_by(*words: str, units: tuple[str, ...] = ()) -> list[Block]:
    """The blocks whose dotted names hold one of the words, or that are of one of the units."""
    blocks = [block for block in BLOCKS.values() if set(block.name.split(".")) & set(words) or block.unit in units]
    assert blocks, f"no block is named by {words} {units}"
    return blocks


def selected(config: pytest.Config, blocks: list[Block]) -> Iterator[Comparison]:
    """Every comparison of the blocks that the options ask for."""
    for size in sizes(config):
        dims = SIZES[size] if size in SIZES else model_of(config, size).dims
        for dtype in dtypes(config):
            for block in blocks:
                if block.name != "log_mel" or dtype == dtypes(config)[0]:  # it is float32 in every dtype
                    yield from comparisons(block, size, dims, dtype, kinds_of(size), device(config))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def identify(comparison: Comparison) -> str:
    c = comparison
    return f"{c.size}-{name_of(c.dtype)}-{c.block}-{c.layer}-{c.inputs.replace(' ', '_')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the options do not ask for, and sorts by model and dtype, so that few are in memory at a time."""
    out = [item for item in items if not wanted(config, item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]

    order = {key: number for number, key in enumerate(dict.fromkeys(tuple(models_of(item)) for item in items))}
    items.sort(key=lambda item: order[tuple(models_of(item))])


def models_of(item: pytest.Item) -> list[tuple[str, torch.dtype]]:
    """The model, as (size, dtype), that a test is about; none for a test that is about none."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "comparison" in params:
        return [(params["comparison"].size, params["comparison"].dtype)]
    return [params["suite"]] if "suite" in params else []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has the models of later tests compiled by another process while the first one is compiled here; not for
    benchmarks, which it would disturb."""
    judged = [item for item in session.items if not item.get_closest_marker("benchmarked")]
    models = list(dict.fromkeys(model for item in judged for model in models_of(item)))
    if len(models) > 1 and not session.config.getoption("collectonly"):
        AHEAD.append(CompileAhead(models[1:], session.config.getoption("--checkpoint"), device(session.config)))


def wanted(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether --size has a model for the test, and --faults its faults: those of weights in float32 by default."""
    faults, asked = item.get_closest_marker("faults"), config.getoption("--faults")
    if faults and (asked or "weights") not in ("all", faults.args[0]):
        return False
    if faults and not asked and not config.getoption("--dtype") and models_of(item)[0][1] != torch.float32:
        return False
    return "suite" not in item.fixturenames or models_of(item)[0][0] in sizes(config)  # type: ignore[attr-defined]


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Suite:
    """The suite of one --size in one --dtype."""
    return suite_of(request.config, *request.param)


@pytest.fixture
def suite_for(request: pytest.FixtureRequest):  # noqa: ANN201
    """From a size and a dtype to their suite."""
    return lambda size, dtype: suite_of(request.config, size, dtype)


@pytest.fixture
def run() -> Run:
    """Where tests leave what they found, for the report and the last lines of the run."""
    return RUN


@pytest.fixture(scope="session")
def checkpoint_path(request: pytest.FixtureRequest) -> str:
    """The checkpoint that whole transcripts are made with: the user's, or the trained fixture."""
    return request.config.getoption("--checkpoint") or str(Path(__file__).parent / "fixtures" / "nano.pt")


# ---- what a run says at its end ------------------------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/parity" in report.nodeid:
        RUN.test_seconds += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in RUN.summary_lines():
        terminalreporter.write_line(line)
    if COMPILE_LOG:
        graphs, seconds = sum(r.graphs for r in COMPILE_LOG), sum(r.seconds for r in COMPILE_LOG)
        terminalreporter.write_line(f"compile: {graphs} graphs in {len(COMPILE_LOG)} artifacts, {seconds:.1f} s")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A parity run that compared nothing has shown nothing."""
    for ahead in AHEAD:
        ahead.stop()
    if session.config.getoption("collectonly"):
        return
    parity = any("parity" in item.nodeid for item in session.items)
    if parity and not RUN.pairs and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if folder := session.config.getoption("--report"):
        RUN.exit_status = int(session.exitstatus)
        RUN.write(Path(folder))
