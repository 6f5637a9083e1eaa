"""The gate's rank test and what surrounds it, the counts of a block's work, and processes that do not start."""

import math
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maxwhisper.errors import MaxWhisperError, OptionError
from maxwhisper.network.blocks import BLOCKS
from reference.fixtures import ROOT
from reference.models import SIZES, load, trained
from reference.perf import compile_base, gate, worker
from reference.perf.costs import Cost, costs
from reference.perf.engine import ENGINES, Setting, Worker, WorkerError
from reference.perf.gate import Trees, checked_out, compare
from reference.perf.rank_test import FACTOR, P, RankTest, rank_test
from reference.perf.table import Row, table
from reference.perf.worker import LOOPS, MATRIX, Blocks
from reference.suite import Suite
from tests.perf.conftest import Timing
from tests.perf.test_speed import Timed

SETTING = Setting("fixture", "float32", "cpu")
SECONDS = st.floats(1e-6, 10, allow_nan=False)
ROUNDS = st.lists(SECONDS, min_size=1, max_size=60)


# ---- rank test -----------------------------------------------------------------------------------------------------


@given(ROUNDS)
def test_a_sample_passes_against_itself(rounds: list[float]) -> None:
    assert not rank_test("block", rounds, rounds).failed


@given(st.lists(SECONDS, min_size=20, max_size=60), st.floats(1.0, 10.0))
def test_every_round_slower_than_every_other_fails_beyond_the_factor(base: list[float], times: float) -> None:
    head = [max(base) * times + 1e-6] * len(base)
    found = rank_test("block", base, head)
    assert found.significant
    assert found.failed == (found.ratio > FACTOR)
    assert not rank_test("block", head, base).failed, "faster is no failure"


@given(ROUNDS, ROUNDS, st.sampled_from([2.0**-10, 2.0**10]))
def test_the_scale_of_time_does_not_matter(base: list[float], head: list[float], scale: float) -> None:
    found = rank_test("block", base, head)
    scaled = rank_test("block", [x * scale for x in base], [x * scale for x in head])
    assert scaled.ratio == found.ratio


def test_a_large_slowdown_in_few_rounds_is_not_significant() -> None:
    assert not rank_test("block", [1.0, 1.1, 1.2], [9.0, 9.1, 9.2]).failed


def test_a_significant_slowdown_within_the_factor_passes() -> None:
    found = rank_test("block", [1 + i / 1000 for i in range(40)], [1.09 + i / 1000 for i in range(40)])
    assert found.p < P
    assert not found.failed


def test_rounds_of_one_distribution_fail_hardly_ever() -> None:
    draw = random.Random(0)
    sample = [[draw.lognormvariate(0, 0.5) for _ in range(40)] for _ in range(2000)]
    alarms = sum(rank_test("block", a, b).failed for a, b in zip(sample[::2], sample[1::2], strict=True))
    assert alarms <= 5, "0.001 of 1000 are expected"


@pytest.mark.parametrize(("base", "head"), [([], [1.0]), ([1.0], [])])
def test_no_rounds_are_no_test(base: list[float], head: list[float]) -> None:
    with pytest.raises(ValueError, match="no rounds of"):
        rank_test("block", base, head)


# ---- trees and processes -------------------------------------------------------------------------------------------


def worktrees() -> str:
    return subprocess.run(["git", "worktree", "list"], cwd=gate.ROOT, capture_output=True, text=True, check=True).stdout


def test_unknown_revision_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert gate.main(["no-such-revision"]) == 1
    assert capsys.readouterr().err == (
        "perf-gate: BASE 'no-such-revision' is not known to git: expected a branch, tag or commit\n"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_worktree_is_gone_however_it_ends(error: type[BaseException]) -> None:
    before = worktrees()
    with pytest.raises(error), checked_out("HEAD") as trees:
        assert (trees.base / "maxwhisper" / "network" / "model.py").is_file()
        assert str(trees.base) in worktrees()
        raise error
    assert not trees.base.exists()
    assert worktrees() == before


@pytest.mark.nightly
def test_base_that_does_not_compile_is_named_and_its_worktree_is_gone(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    before = worktrees()
    assert compile_base.main(["HEAD", "sm_1", "--out", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert "--compile-only sm_1 is not known" in out + err
    assert re.search(r"^compile-base: base HEAD \(.*\): its graphs were not compiled: pytest ended with", err, re.M)
    assert worktrees() == before and not list(tmp_path.iterdir())


def test_base_is_compiled_by_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Mock(return_value=SimpleNamespace(returncode=0))
    monkeypatch.setattr(subprocess, "run", run)
    compile_base.compile_base(TREES, "host", tmp_path, "fixture", "float32")
    (command,), options = run.call_args
    assert command[1:] == [
        *("-m", "pytest", "tests/parity", "--compile-only", "host", "--artifacts", str(tmp_path)),
        *("--size", "fixture", "--dtype", "float32"),
    ]
    assert options["cwd"] == TREES.base and options["env"]["PYTHONPATH"] == str(TREES.base)


class StandIn:
    """In a worker's place: a tree with these blocks, each with inputs."""

    def __init__(self, takes: dict[str, list[str]]):
        self.takes = takes

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def blocks_of(monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """Puts trees with the given blocks, base's and head's, in the place of the real ones; timing them takes no time."""

    def put(base: dict[str, list[str]], head: dict[str, list[str]]) -> None:
        monkeypatch.setattr(gate, "Worker", lambda _, tree, name: StandIn(base if tree.name == "base" else head))
        equal = lambda setting, trees, blocks, own, n_round: [RankTest(block, 0.002, 0.002, 0.7) for block in blocks]  # noqa: E731
        monkeypatch.setattr(gate, "timed", equal)

    return put


TREES = Trees(Path("head"), Path("base"), "main")


def test_new_removed_and_changed_blocks_are_listed(blocks_of) -> None:  # noqa: ANN001
    blocks_of({"a": ["x"], "old": ["x"], "c": ["x"]}, {"a": ["x"], "new": ["x"], "c": ["x", "k_cache"]})
    report = compare(SETTING, TREES, [], 40)
    assert [v.block for v in report.tests] == ["a", "c"]
    assert (report.added, report.removed, report.own_inputs) == (["new"], ["old"], ["c"])
    assert not report.failed


def test_nothing_timed_is_an_error(blocks_of) -> None:  # noqa: ANN001
    blocks_of({"old": ["x"]}, {"new": ["x"]})
    with pytest.raises(MaxWhisperError, match="nothing was timed: no block of new, old is in both"):
        compare(SETTING, TREES, [], 40)


def test_unknown_block_is_named(blocks_of) -> None:  # noqa: ANN001
    blocks_of({"a": ["x"]}, {"a": ["x"]})
    with pytest.raises(OptionError, match="--block b is not known: expected some of a"):
        compare(SETTING, TREES, ["b"], 40)


def test_a_tree_without_the_api_is_named(tmp_path: Path) -> None:
    """What the worker imports before that is empty here."""
    for module in ("maxwhisper/network/blocks", "torch/nn", "whisper/decoding", "whisper/tokenizer"):
        file = tmp_path / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("BLOCKS = DecodingOptions = DecodingResult = get_tokenizer = None")
        for package in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / package / "__init__.py").touch()
    with pytest.raises(WorkerError, match=r"^base v0: .* ModuleNotFoundError: No module named 'reference'"):
        Worker(SETTING, tmp_path, "base v0")


@pytest.mark.skipif(sys.platform != "linux", reason="a process can ask for that on Linux alone")
def test_a_stopped_process_ends_with_the_one_that_started_it() -> None:
    program = f"""
import os, signal
from reference.perf.engine import Setting, Worker
worker = Worker(Setting{tuple(vars(SETTING).values())})
worker.ask("takes")
print(worker.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    state, deadline = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline


def test_paths_are_those_of_the_folder_that_this_process_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is in the folder of its tree. A name of a model is no path."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nshift 5\necho "{\\"result\\": {\\"tree\\": \\"$PWD\\", \\"takes\\": \\"$*\\"}}"')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    for name in ("mine.pt", "compiled"):
        (tmp_path / name).touch()
    for checkpoint, found in (("mine.pt", tmp_path / "mine.pt"), ("tiny", "tiny")):
        with Worker(replace(SETTING, checkpoint=checkpoint, artifacts="compiled")) as other:
            assert other.takes == f"--checkpoint {found} --artifacts {tmp_path / 'compiled'}"


# ---- graphs compiled ahead -----------------------------------------------------------------------------------------


def test_each_tree_is_given_its_own_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    started = lambda setting, tree, name: given.update({tree.name: setting.artifacts}) or StandIn({})  # noqa: E731
    monkeypatch.setattr(gate, "Worker", started)
    with gate.workers(replace(SETTING, artifacts="ours"), replace(TREES, base_artifacts="theirs")):
        assert given == {"head": "ours", "base": "theirs"}


@pytest.mark.parametrize("option", ["--artifacts", "--base_artifacts"])
def test_a_folder_of_artifacts_that_is_missing_is_named(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gate.main(["HEAD", option, "no-such-folder"])
    assert f"argument {option}: no-such-folder: expected a folder of artifacts" in capsys.readouterr().err


SUITE_WITHOUT_ARTIFACTS = """
from dataclasses import dataclass

DTYPES = {"float32": None}
load = lambda *_: None


@dataclass
class Suite:
    model: object
    dtype: object
    device: str
"""


@pytest.mark.nightly
def test_a_tree_that_cannot_read_artifacts_is_named(tmp_path: Path) -> None:
    files = {
        **dict.fromkeys(["maxwhisper/__init__.py", "reference/__init__.py"], ""),
        "maxwhisper/engine/artifacts.py": "Artifacts = lambda *_: None",
        "maxwhisper/network/blocks.py": "BLOCKS = {}",
        "reference/suite.py": SUITE_WITHOUT_ARTIFACTS,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(WorkerError, match="^base v0: .*: the code of this tree cannot read artifacts: .* 'held'"):
        Worker(replace(SETTING, artifacts=str(tmp_path)), tmp_path, "base v0")


# ---- decode loops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_loops_are_timed_in_float32(dtype: torch.dtype) -> None:
    taken = Blocks(Suite(load("tiny"), dtype)).takes()
    assert list(taken) == [*BLOCKS, *(LOOPS if dtype == torch.float32 else [])]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_decode_loop_finds_as_many_tokens_in_every_window(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "N_TOKEN", 5)
    blocks = Blocks(Suite(trained(), torch.float32))
    features = torch.randn(2, blocks.suite.dims.n_audio_ctx, blocks.suite.dims.n_audio_state)
    for loop in LOOPS.values():
        found = blocks.decoding(loop, features, engine)()
        assert [len(result.tokens) for result in found] == [5] * loop.n_window


# ---- time on a GPU -------------------------------------------------------------------------------------------------


class Queue:
    """In the place of a GPU's: events hold the milliseconds at which they were recorded."""

    def __init__(self) -> None:
        self.now = 0.0

    def record_event(self, event: "Event") -> None:
        event.at = self.now


class Event:
    """synchronized: those that somebody has waited for."""

    synchronized: ClassVar[list["Event"]] = []
    at = math.nan

    def synchronize(self) -> None:
        self.synchronized.append(self)

    def elapsed_time(self, end: "Event") -> float:
        assert self.synchronized, "the GPU is still at it"
        return end.at - self.at


@pytest.mark.parametrize("engine", ENGINES)
def test_time_on_a_gpu_is_that_between_two_events(tiny: Suite, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, asked = Queue(), []
    monkeypatch.setattr(worker, "gpu_queue", lambda engine: asked.append(engine) or (queue, Event))
    monkeypatch.setattr(Event, "synchronized", [])
    blocks = Blocks(tiny)
    on_gpu = replace(blocks.comparison("encoder"), device="gpu")
    monkeypatch.setattr(blocks, "comparison", lambda block: on_gpu)

    def call() -> None:
        queue.now += 500 if queue.now == 0 else 4  # the first is slow

    blocks.calls["encoder"] = call
    assert blocks.device_time("encoder", engine, 3) == [0.004] * 3
    assert asked == [engine] and len(Event.synchronized) == 1


def test_nothing_on_a_cpu_is_timed_on_a_gpu(tiny: Suite) -> None:
    blocks = Blocks(tiny)
    assert all(blocks.device_time(block, "MAX", 3) == [] for block in (*BLOCKS, *LOOPS))


class Benchmark:
    """In the place of pytest-benchmark's: every call took two seconds."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=2.0))

    def __call__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("device", [[], [0.25, 0.5, 0.75]])
def test_time_on_a_gpu_is_in_the_data_and_in_the_table(tiny: Suite, device: list[float], tmp_path: Path) -> None:
    answers = {"device_time": device, "product": {"matmul": 1e12}, "bandwidth": {"copy": 1e9, "read": 1e9}}
    timing, benchmark = Timing(None, None), Benchmark()
    timing.worker = lambda *_: SimpleNamespace(ask=lambda do, **_: answers.get(do))  # type: ignore[method-assign]
    timed = Timed(benchmark, tiny, timing, tmp_path)  # type: ignore[arg-type]
    timed.run("encoder", "MAX", Cost(4_000_000_000, 1_000_000_000))
    assert benchmark.extra_info.get("device seconds") == (0.5 if device else None)
    assert benchmark.extra_info["GFLOP/s"] == 2
    (setting,) = timing.rows
    *_, head, encoder = table(timing.rows[setting], timing.ceilings(setting))
    assert head.count("on GPU") == (2 if device else 0)
    on_gpu = ["500", "-", "-"] if device else []
    assert encoder.split() == ["encoder", "2e+03", "-", "-", *on_gpu, "2.0", "0%", "0.5", "50%"]


# ---- costs and their table -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Suite:
    return Suite(load("tiny"), torch.float32)


def cost_of(suite: Suite, block: str) -> dict[str, Cost]:
    return costs(suite, list(suite.comparisons(BLOCKS[block], ["speech"]))[-1])


def test_costs_of_an_mlp(tiny: Suite) -> None:
    width, frames = SIZES["tiny"].n_audio_state, SIZES["tiny"].n_audio_ctx
    weights, biases, activations = 2 * width * 4 * width, 4 * width + width, 2 * frames * width
    found = cost_of(tiny, "encoder.mlp")
    assert found["MAX"] == Cost(2 * frames * weights, 2 * weights + 4 * (biases + activations))
    assert found["PyTorch"] == Cost(2 * frames * weights, 4 * (weights + biases + activations))


def test_an_embedding_reads_the_rows_that_are_looked_up(tiny: Suite) -> None:
    comparison = list(tiny.comparisons(BLOCKS["decoder.embedding"], ["speech"]))[-1]
    n_token, width = tiny.inputs(BLOCKS["decoder.embedding"], comparison)["tokens"].shape[1], tiny.dims.n_text_state
    rows, out = n_token * width, n_token * width
    tokens_and_offset = 8 * (n_token + 1)
    assert cost_of(tiny, "decoder.embedding")["MAX"] == Cost(0, 2 * rows + 4 * rows + 4 * out + tokens_and_offset)


def test_a_step_reads_every_weight_of_the_decoder_once(tiny: Suite) -> None:
    found = cost_of(tiny, "decoder.step")
    matrices = sum(x.numel() for name, x in tiny.model.tensors.items() if name.startswith("decoder") and x.ndim > 1)
    unread = sum(
        x.numel()
        for name, x in tiny.model.tensors.items()
        if name == "decoder.positional_embedding" or name.endswith(("cross_attn.key.weight", "cross_attn.value.weight"))
    )
    assert found["MAX"].n_bytes > 2 * (matrices - unread)
    assert 2 * (matrices - unread) < found["MAX"].flops < 2.5 * (matrices - unread)


@pytest.mark.nightly
def test_the_ceiling_is_that_of_a_whole_product(tiny: Suite) -> None:
    """Or a block would seem far from it that is near."""
    blocks = Blocks(tiny)
    (found,) = blocks.product_on_max(torch.ones(MATRIX, MATRIX))()
    assert found.shape == (1, MATRIX, MATRIX) and (found == MATRIX).all()
    assert all(blocks.product(engine)["matmul"] > 0 for engine in ENGINES)


def test_table_shows_rates_against_ceilings() -> None:
    cost = Cost(flops=4_000_000_000, n_bytes=100_000_000)
    rows = [Row("encoder", "MAX", 0.1, cost), Row("encoder", "PyTorch", 0.2, cost), Row("log_mel", "PyTorch", 1, cost)]
    rows += [Row("decode.greedy", "MAX", 0.5, None), Row("decode.greedy", "PyTorch", 1, None)]
    *_, head, encoder, log_mel, decode = table(rows, {"matmul": 400e9, "copy": 9e9, "read": 10e9})
    assert head.split()[0] == "block"
    assert decode.split() == ["decode.greedy", "500", "1e+03", "0.50"]
    assert encoder.split() == ["encoder", "100", "200", "0.50", "40.0", "10%", "1.0", "10%"]
    assert log_mel.split() == ["log_mel", "-", "1e+03", "-"]
    assert not any("GPU" in line for line in table(rows, {"matmul": 400e9, "copy": 9e9, "read": 10e9}))


def test_table_shows_times_on_a_gpu_beside_the_others() -> None:
    cost = Cost(flops=4_000_000_000, n_bytes=100_000_000)
    rows = [Row("encoder", "MAX", 0.1, cost, 0.05), Row("encoder", "PyTorch", 0.2, cost, 0.1)]
    rows += [Row("log_mel", engine, 1, cost) for engine in ENGINES]
    *_, head, encoder, log_mel = table(rows, {"matmul": 400e9, "copy": 9e9, "read": 10e9})
    assert "ratio  MAX on GPU  PyTorch on GPU  ratio  GFLOP/s" in head
    assert encoder.split() == ["encoder", "100", "200", "0.50", "50", "100", "0.50", "40.0", "10%", "1.0", "10%"]
    assert log_mel.split() == ["log_mel", "1e+03", "1e+03", "1.00", "-", "-", "-", "4.0", "1%", "0.1", "1%"]
    assert len(head) == len(encoder) == len(log_mel)
