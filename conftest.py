"""Options of both suites, what they select, and what a run says at its end."""

# ruff: noqa: E402 - something must be set before torch is imported

import itertools
import logging
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

from reference.older_cpu import AS_ON, as_on, asked_for, heeded
from reference.quiet import keep_quiet, times_nothing

if times_nothing(sys.argv[1:]):  # what is timed is PyTorch as its users have it
    keep_quiet()
as_on(asked_for())

import torch
from whisper.model import ModelDimensions

from maxwhisper.engine.artifacts import TARGETS, Artifacts
from maxwhisper.engine.folders import cache_folder
from maxwhisper.engine.precompile import Ahead
from maxwhisper.engine.session import device_named, gpu_found
from maxwhisper.errors import ArtifactError, MaxWhisperError
from maxwhisper.network.blocks import BLOCKS, Block
from reference.activations import KINDS, RANDOM
from reference.ahead import TRANSCRIBING, WhenCompiling, compile_ahead, suite_job
from reference.distributed import group, is_distributed, is_worker
from reference.judge import Comparison, dtype_name
from reference.lowering import Lowering, graphs
from reference.pytest_plugin import CHOSEN, Chosen, Ending, Progress
from reference.results import Run
from reference.selection import compared_alone, compares, judges_itself, left_out, make_findable, models_of
from reference.suite import CHECKPOINT, DTYPES, FIXTURE, SIZES, TRAINED, Model, Suite, comparisons, load, trained
from reference.verdicts import Lenient

ALL_SIZES = (FIXTURE, *SIZES)
DEFAULT_SIZES = (FIXTURE, "tiny")
DEFAULT_DTYPES = ("float32", "bfloat16")
RUN = Run()
"""What this run has found."""
AHEAD: list[Ahead] = []
"""What compiles ahead of later tests, once it is known which there are."""
LOWERING: dict[str, Lowering] = {}
"""By target, the process that compiles for it, once there is one."""
ENDING = pytest.StashKey[Ending]()
ASKED = pytest.StashKey[dict[tuple[str, torch.dtype], frozenset[str]]]()
"""By model, `compared_alone`."""
COMPARES = pytest.StashKey[bool]()
"""Whether anything was compared if -k and -m left all that they choose from."""
ARTIFACTS = Path("build", "artifacts")
"""Where --compile-only writes unless --artifacts says otherwise."""


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("maxwhisper").addoption
    sizes, dtypes = ", ".join(ALL_SIZES), ", ".join(DTYPES)
    add("--size", help=f"models, comma-separated, of {sizes}, or all (default: {','.join(DEFAULT_SIZES)})")
    add("--dtype", help=f"precisions, comma-separated, of {dtypes}, or all (default: {','.join(DEFAULT_DTYPES)})")
    add(
        "--device", default="cpu", choices=["cpu", "gpu", "auto"], help="what MAX and PyTorch compute on (default: cpu)"
    )
    add("--require-gpu", action="store_true", help="fail if MAX and PyTorch do not both find a GPU")
    peers = "fail where a test is skipped, as those of engines are that are not installed"
    add("--require-peers", action="store_true", help=peers)
    add("--cpu", choices=AS_ON, help="compute as on a CPU with fewer instructions (default: with all of this one's)")
    add("--checkpoint", help="a checkpoint of your own, by path or name, in the place of every --size")
    faults = "which faults the judge must catch, in every --dtype (default: weights, in float32)"
    add("--artifacts", metavar="DIR", help="use the graphs compiled there, or fail, naming what does not fit")
    only = f"compile for targets, comma-separated, of {', '.join(TARGETS)}, or all, and compare nothing; the graphs go"
    add("--compile-only", metavar="TARGETS", help=f"{only} into --artifacts (default: {ARTIFACTS}), by target")
    add("--or-compile", action="store_true", help="compile what does not fit in --artifacts instead of failing")
    add("--nightly", action="store_true", help="run what is too slow for every merge as well")
    add("--faults", choices=["weights", "graphs", "all"], help=faults)
    add("--report", metavar="DIR", help="write report.html, report.json and summary.md there")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults(kind): tries faults of weights or of graphs on the judge")
    config.addinivalue_line("markers", "benchmarked: times MAX and PyTorch")
    if not config.pluginmanager.has_plugin("benchmark"):
        config.addinivalue_line("markers", "benchmark(timer): an option of pytest-benchmark, which is not here")
    config.addinivalue_line("markers", "clock: is about times, so it does not run with --benchmark-disable")
    config.addinivalue_line("markers", "compiles_for(target): reads code for it, so runs with --compile-only TARGET")
    config.addinivalue_line("markers", "nightly: is too slow for every merge, so it runs with --nightly")
    config.addinivalue_line("markers", "trained: needs trained weights, the fixture's or those of --checkpoint")
    config.addinivalue_line("markers", "compares(*words, units): judge the blocks with one of the words in their names")
    chosen(config, "--size", ALL_SIZES, DEFAULT_SIZES)
    chosen(config, "--dtype", tuple(DTYPES), DEFAULT_DTYPES)
    if config.getoption("--require-gpu") and not gpu_found():
        raise pytest.UsageError("--require-gpu: MAX and PyTorch do not both find a GPU; `maxwhisper doctor` says why")
    if config.getoption("--device") == "gpu" and not gpu_found():
        raise pytest.UsageError("--device gpu: MAX and PyTorch do not both find a GPU; `maxwhisper doctor` says why")
    if (cpu := config.getoption("--cpu")) and not heeded(cpu):
        raise pytest.UsageError(f"--cpu {cpu}: needs x86-64, and to stand on the command line or in PYTEST_ADDOPTS")
    if config.getoption("--checkpoint"):
        checkpoint(config)
    if config.getoption("--report"):
        check_folder("--report", Path(config.getoption("--report")))
    if targets(config):
        if config.getoption("--report"):
            raise pytest.UsageError("--report: --compile-only compares nothing that could be reported")
        if is_distributed(config):
            raise pytest.UsageError("--compile-only: one process compiles for a target, so leave out -n, or give -n 0")
        check_folder("--artifacts", Path(config.getoption("--artifacts") or ARTIFACTS))
    else:
        artifacts(config)
    config.stash[ENDING] = ending = Ending(config, RUN)
    config.pluginmanager.register(ending)
    if cache := getattr(config, "cache", None):
        config.cache = Lenient(cache, RUN.note)


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    logging.getLogger("maxwhisper").setLevel(logging.INFO)
    if plugins.has_plugin("terminalreporter") and session.config.option.verbose >= 0:
        logging.getLogger("maxwhisper").addHandler(progress := Progress(plugins))
        # Or it would write to the terminal of a run inside a test, which is closed by then.
        session.config.add_cleanup(lambda: logging.getLogger("maxwhisper").removeHandler(progress))


def chosen(config: pytest.Config, option: str, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """The names given with an option; a usage error for one that is not known."""
    given = config.getoption(option)
    names = default if given is None else known if given == "all" else tuple(given.split(","))
    if unknown := [name for name in names if name not in known]:
        raise pytest.UsageError(f"{option} {','.join(unknown)} is not known: expected some of {', '.join(known)}")
    return names


def check_folder(option: str, folder: Path) -> None:
    """Makes the folder if it is not there; a usage error if no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise pytest.UsageError(f"{option} {folder}: cannot be written to: {error.strerror or error}") from error


def device(config: pytest.Config) -> str:
    return device_named(config.getoption("--device"))


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


def targets(config: pytest.Config) -> tuple[str, ...]:
    return chosen(config, "--compile-only", TARGETS, ())


def dtypes(config: pytest.Config) -> list[torch.dtype]:
    return [DTYPES[name] for name in chosen(config, "--dtype", tuple(DTYPES), DEFAULT_DTYPES)]


@lru_cache(maxsize=1)
def artifacts(config: pytest.Config) -> Artifacts | None:
    """What --artifacts holds; a usage error if it is not for this machine."""
    folder, or_compile = config.getoption("--artifacts"), config.getoption("--or-compile")
    if folder is None:
        if or_compile:
            raise pytest.UsageError("--or-compile: there is nothing to compile instead of without --artifacts")
        return None
    try:
        return Artifacts(folder, device(config), or_compile)
    except ArtifactError as error:
        raise pytest.UsageError(f"--artifacts: {error}") from error


# ---- what is compared ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def model_of(config: pytest.Config, size: str) -> Model:
    return load(size, config.getoption("--checkpoint"))


@lru_cache(maxsize=2)
def suite_of(config: pytest.Config, size: str, dtype: torch.dtype) -> Suite:
    only = config.stash[ASKED].get((size, dtype), frozenset())
    wait_for(suite_job(size, dtype, only))
    return Suite(model_of(config, size), dtype, device(config), artifacts(config), getattr(config, "cache", None), only)


def kinds_of(size: str) -> tuple[str, ...]:
    """Trained models are judged on every kind of inputs, random weights on speech and on random inputs."""
    return KINDS if size in TRAINED else ("speech", RANDOM)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "comparison" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("compares")
        blocks = named_by(*marker.args, **marker.kwargs)
        metafunc.parametrize("comparison", list(selected(config, blocks)), ids=identify)
    elif "lowering" in metafunc.fixturenames:
        names = ("lowering", "size", "dtype", "graph")
        metafunc.parametrize(names, list(lowered(config)), ids=in_test_name, indirect=["lowering"])
    elif "suite" in metafunc.fixturenames:
        timed = metafunc.definition.get_closest_marker("benchmarked")
        precisions = dtypes(config) if config.getoption("--dtype") or not timed else [torch.float32]
        pairs = [(size, dtype) for size in sizes_for(config, metafunc.definition) for dtype in precisions]
        metafunc.parametrize("suite", pairs, ids=lambda pair: f"{pair[0]}-{dtype_name(pair[1])}", indirect=True)


def sizes_for(config: pytest.Config, test: pytest.Item) -> tuple[str, ...]:
    """The models that a test is for. Faults are tried in the fixture, whose layers differ from each other; benchmarks
    are of tiny in float32 unless options say otherwise, and of the fixture where nothing is timed."""
    only = sizes(config)
    if test.get_closest_marker("benchmarked") and not config.getoption("--size"):
        only = ("tiny",) if times(config) else (FIXTURE,)
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


def lowered(config: pytest.Config) -> Iterator[tuple[str, str, torch.dtype, str]]:
    """Every target, size, dtype and graph that --compile-only asks for."""
    for target in targets(config):
        for size, dtype in itertools.product(sizes(config), dtypes(config)):
            for graph in graphs(target, size, dtype):
                if graph != "log_mel" or dtype == dtypes(config)[0]:  # it is float32 in every dtype
                    yield target, size, dtype, graph


def in_test_name(value: torch.dtype | str) -> str:
    return value.replace(" ", "_") if isinstance(value, str) else dtype_name(value)


def identify(comparison: Comparison) -> str:
    c = comparison
    return f"{c.size}-{dtype_name(c.dtype)}-{c.block}-{c.layer}-{c.inputs.replace(' ', '_')}"


def pytest_itemcollected(item: pytest.Item) -> None:
    if is_worker(item.config):  # before pytest-xdist looks, which is first of all that see the whole list
        item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the options do not ask for, has -k find blocks by every word for them, and sorts by model and
    dtype, so that few are in memory at a time."""
    out = [item for item in items if not wanted(config, item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
    make_findable(items, config.option.keyword)
    config.stash[COMPARES] = any(compares(item) for item in items)

    config.stash[ASKED] = compared_alone(items)
    order = {key: number for number, key in enumerate(dict.fromkeys(tuple(models_of(item)) for item in items))}
    items.sort(key=lambda item: order[tuple(models_of(item))])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has what later tests need compiled by other processes while the first model compiles here; not for benchmarks,
    which they would disturb."""
    config = session.config
    if is_worker(config):  # which has others beside it that compile
        return
    judged = [item for item in session.items if not item.get_closest_marker("benchmarked")]
    models = list(dict.fromkeys(model for item in judged for model in models_of(item)))
    jobs = [suite_job(*model, config.stash[ASKED].get(model, ())) for model in models[1:]]
    transcribing = any("checkpoint_path" in item.fixturenames for item in judged)  # type: ignore[attr-defined]
    if transcribing and models and device(config) == "cpu":
        jobs.append(TRANSCRIBING)
    if not jobs or config.getoption("collectonly") or artifacts(config):
        return
    for some in filter(None, (jobs[::2], jobs[1::2])):
        AHEAD.append(compile_ahead(some, config.getoption("--checkpoint"), device(config)))
        logging.getLogger("maxwhisper").addHandler(WhenCompiling(AHEAD[-1]))


def times(config: pytest.Config) -> bool:
    """Whether anything is timed: not beside other workers of pytest-xdist, nor without pytest-benchmark."""
    return not config.getoption("benchmark_disable", True) and not is_worker(config)


def wait_for(job: str) -> None:
    for ahead in AHEAD:
        ahead.wait(job, job)


def wanted(config: pytest.Config, item: pytest.Item) -> bool:
    """Whether the test is of the kind that the run is, --size has a model for it, and --faults its faults: those of
    weights in float32 by default."""
    target = item.get_closest_marker("compiles_for")
    if bool(targets(config)) != bool(target or "lowering" in item.fixturenames):  # type: ignore[attr-defined]
        return False
    if target and target.args[0] not in targets(config):
        return False
    if item.get_closest_marker("clock") and not times(config):
        return False
    if item.get_closest_marker("nightly") and not config.getoption("--nightly"):
        return False
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
def lowering(request: pytest.FixtureRequest) -> Lowering:
    """The process that compiles for a target of --compile-only."""
    config, target = request.config, request.param
    if target not in LOWERING:
        stop_lowering()  # one at a time: two would take as long, and twice the memory
        out = Path(config.getoption("--artifacts") or ARTIFACTS) / target
        models = list(itertools.product(sizes(config), dtypes(config)))
        LOWERING[target] = Lowering(target, models, out, config.getoption("--checkpoint"))
    return LOWERING[target]


def stop_lowering() -> None:
    for each in LOWERING.values():
        each.stop()


@pytest.fixture
def run() -> Run:
    """Where tests leave what they found, for the report and the last lines of the run."""
    return RUN


@pytest.fixture(scope="session", autouse=True)
def own_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder with all that the user's holds, but for the artifacts: what `load_model` keeps is of this run, so
    that nothing is judged which an earlier one compiled."""
    users, own = cache_folder("kernels").parent, tmp_path_factory.mktemp("cache")
    for shared in ("kernels", "graphs", "locks"):
        (users / shared).mkdir(parents=True, exist_ok=True)
    for entry in set(users.iterdir()) - {users / "artifacts"}:
        (own / entry.name).symlink_to(entry.absolute())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAXWHISPER_CACHE_DIR", str(own))
        yield


@pytest.fixture(scope="session")
def checkpoint_path(request: pytest.FixtureRequest) -> str:
    """The checkpoint that whole transcripts are made with: the user's, or the trained fixture."""
    wait_for(TRANSCRIBING)
    return request.config.getoption("--checkpoint") or str(Path(__file__).parent / "fixtures" / "nano.pt")


@pytest.fixture(scope="session")
def loading(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the options have `load_model` do beside loading a checkpoint."""
    config = request.config
    options = {"artifacts": config.getoption("--artifacts"), "or_compile": config.getoption("--or-compile")}
    return {"device": device(config), **options}


# ---- what a run says at its end ------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for each in LOWERING.values():
        terminalreporter.write_line(each.summary())


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A parity run that compared nothing has shown nothing, and neither has one of whose blocks -k left none."""
    config = session.config
    for ahead in AHEAD:
        ahead.stop()
    stop_lowering()
    if config.getoption("collectonly"):
        return
    reason = left_out(config, session.items) if config.stash.get(COMPARES, False) else None
    chosen = Chosen(reason, any(judges_itself(item) for item in session.items))
    if is_worker(config):
        config.workeroutput[CHOSEN] = vars(chosen)  # type: ignore[attr-defined]
        return
    ending = config.stash[ENDING]
    chosen = ending.chosen_by_workers or chosen
    if chosen.nothing:
        ending.fail(session, chosen.nothing)
    parity = any("parity" in name for name in ending.selected(session))
    if parity and not (RUN.compared or LOWERING or chosen.judges_itself):
        ending.fail(session)
