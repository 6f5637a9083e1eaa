"""The compile gate: it names the blocks that do not lower, with MAX's message, and ends with all artifacts or none."""

import io
import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from max.dtype import DType
from max.graph import DeviceRef, TensorType
from max.nn.layer import Module

from maxwhisper.compiled import DECODING, programs_of, units_on
from maxwhisper.engine import precompile
from maxwhisper.engine.artifacts import HOST, MANIFEST, Artifacts
from maxwhisper.engine.program import Program
from maxwhisper.engine.session import Policy
from maxwhisper.errors import OptionError
from maxwhisper.network.model import LayerNorm
from maxwhisper.whisper import load_model
from reference import lowering
from reference.fixtures import NANO, ROOT
from reference.lowering import Lowering, graphs, lower
from reference.lowering import main as lowering_main
from reference.models import FIXTURE, load, trained
from reference.perf.worker import LOOPS, Blocks
from reference.suite import Suite

from .compiling import nothing_compiles

FLOAT32 = [(FIXTURE, torch.float32)]
GRAPHS = graphs(HOST, "tiny", torch.float32)


def run(*options: str) -> tuple[int, str]:
    """Returns exit status and output of a run inside this process."""
    said, before = io.StringIO(), {*sys.modules}
    with redirect_stdout(said), redirect_stderr(said):
        status = pytest.main(["-q", "-s", "-p", "no:cacheprovider", str(ROOT / "tests" / "parity"), *options])
    for name in {*sys.modules} - before:  # whose parameters are of the blocks that there are now
        if name.startswith("tests.parity"):
            del sys.modules[name]
    return status, said.getvalue()


class Empty(Module):
    def __call__(self) -> None:
        raise NotImplementedError


def program(name: str, dtype: DType, *, weighted: bool = False) -> Program:
    """Returns a program from x to x + x, or to a product that needs weights which are not there."""
    inputs = {"x": TensorType(dtype, ["n"], DeviceRef.CPU())}
    return Program(name, name, Empty(), lambda m, x: (x @ m.weight if weighted else x + x,), inputs)


def with_weights(name: str) -> Program:
    inputs = {"x": TensorType(DType.float32, ["n", 3], DeviceRef.CPU())}
    norm = LayerNorm(3, Policy(DeviceRef.CPU(), DType.float32, DType.float32))
    return Program(name, name, norm, lambda m, x: (m(x),), inputs)


def test_what_does_not_lower_is_named_with_maxs_message() -> None:
    """And nothing else is, which is built once more to find out."""
    wrong = [program("unbuilt", DType.float32, weighted=True), program("uncompiled", DType.float8_e4m3fn)]
    artifact, failures = lower("some wrong", [with_weights("right"), *wrong], "cpu")
    assert artifact is None and failures.keys() == {"unbuilt", "uncompiled"}
    assert "'Empty' object has no attribute 'weight'" in failures["unbuilt"]
    assert "f8e4m3fn data type is not supported on device 'cpu:0'" in failures["uncompiled"]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder in which a gate has left this machine's artifacts of the fixture."""
    out = tmp_path_factory.mktemp("gate")
    status, output = run("--compile-only", HOST, "--size", FIXTURE, "--dtype", "float32", "--artifacts", str(out))
    assert status == pytest.ExitCode.OK, output
    assert f"{len(graphs(HOST, *FLOAT32[0]))} passed" in output
    assert f"host: 1 of 1 models compiled, 0 graphs do not lower; artifacts in {out / HOST}" in output
    return out / HOST


@pytest.mark.nightly
def test_a_gate_compiles_every_graph_and_leaves_artifacts(gated: Path) -> None:
    names = {name for each in Artifacts(gated, "cpu").held for name in each.identity.blocks}
    assert names == {*graphs(HOST, *FLOAT32[0])} > {*GRAPHS}
    assert load_model(NANO, artifacts=gated).dims.n_audio_state == 128


@pytest.mark.nightly
def test_decode_loops_are_timed_from_its_artifacts(gated: Path) -> None:
    held, dims = Artifacts(gated, "cpu"), trained().dims
    blocks = Blocks(Suite(trained(), torch.float32, held=held))
    assert {*LOOPS} < {*blocks.takes()}
    with nothing_compiles():
        for loop in LOOPS.values():
            blocks.decoding(loop, torch.randn(1, dims.n_audio_ctx, dims.n_audio_state), "MAX")()


@pytest.mark.nightly
def test_decode_loops_are_not_timed_from_artifacts_that_select_no_tokens(gated: Path) -> None:
    """Such artifacts are of another model, or of none."""
    held = Artifacts(gated, "cpu")
    tiny = Blocks(Suite(load("tiny"), torch.float32, held=held))
    assert tiny.suite.dims != trained().dims and not {*LOOPS} & {*tiny.takes()}
    held.held = [each for each in held.held if each.identity.unit != DECODING]
    assert not {*LOOPS} & {*Blocks(Suite(trained(), torch.float32, held=held)).takes()}


def test_a_gate_asks_for_what_transcribes_on_a_gpu_too() -> None:
    """By what `load_model` takes there."""
    suite = Suite(load(FIXTURE, None), torch.float32)
    policy = replace(suite.policy, device=DeviceRef.GPU())
    taken = {program.name for unit in units_on("gpu") for program in programs_of(unit, suite.dims, policy)}
    assert taken - {*GRAPHS} == {*graphs("sm_80", *FLOAT32[0])} - {*GRAPHS}
    assert graphs("sm_80", FIXTURE, torch.float16) == graphs("sm_80", *FLOAT32[0])
    assert graphs("sm_80", "tiny", torch.float32) == graphs(HOST, FIXTURE, torch.float16) == GRAPHS


def test_a_process_that_ends_early_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho some words >&2; echo "the last of $*" >&2; exit 3')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    lowering = Lowering("sm_1", FLOAT32, tmp_path / "out", None)
    reason = lowering.failure(*FLOAT32[0], "encoder")
    assert not lowering.finish()
    lowering.stop()
    words = f"some words\nthe last of -P -m reference.lowering sm_1 {FIXTURE}:float32 --out {tmp_path / 'out'}"
    assert reason == f"the process that compiles ended with status 3\n{words}"
    assert lowering.summary() == "sm_1: 0 of 1 models compiled, 0 graphs do not lower; no artifacts written"


@pytest.mark.parametrize("options", [(), ("--artifacts", "there")], ids=["as by default", "into a folder"])
def test_a_gate_reads_no_artifacts_where_it_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Of what compiles, which here says at once that all does, a second process begins at the other end. In whatever
    folder the gate is started, both find the sources."""
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $*" >> {called}; echo {{}}')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(precompile, "has_room", lambda: True)
    monkeypatch.chdir(tmp_path)
    status, output = run("--compile-only", HOST, "--size", FIXTURE, "--dtype", "float32", *options, "-k", "lowers")
    assert status == pytest.ExitCode.OK, output
    assert f"{len(graphs(HOST, *FLOAT32[0]))} passed" in output
    started = [line.partition(" ") for line in called.read_text().splitlines() if "lowering" in line]
    assert all(str(ROOT) in paths.split(os.pathsep) for paths, _, _ in started)
    out = Path(options[1] if options else "build/artifacts", HOST)
    command = f"-P -m reference.lowering {HOST} {FIXTURE}:float32"
    assert sorted(each for _, _, each in started) == [command, f"{command} --out {out}"]


def test_a_second_process_is_ended_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which says all there is to know; of the same checkpoint they compile both."""
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\necho "$*" >> {called}\ncase "$*" in *--out*) echo {{}};; *) exec sleep 60;; esac')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(precompile, "has_room", lambda: True)
    lowering = Lowering(HOST, FLOAT32, tmp_path / "out", "a.pt")
    assert lowering.finish() and lowering.second.process is not None
    while not called.exists() or called.read_text().count("\n") < 2:
        time.sleep(0.01)
    lowering.stop()
    assert lowering.second.process.returncode < 0
    assert all(line.endswith("--checkpoint a.pt") for line in called.read_text().splitlines())


def test_a_second_process_compiles_from_the_end_what_lowers_and_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []

    def compiles(name: str, programs: list[str], device: str) -> None:
        compiled.append((name, programs))
        if "decoding" in name:
            raise ValueError("does not lower")

    room = iter([True] * 5 + [False])
    monkeypatch.setattr(lowering, "has_room", lambda: next(room))
    monkeypatch.setattr(lowering, "Artifact", compiles)
    monkeypatch.setattr(lowering, "units", lambda suite: [(unit, [unit]) for unit in ("network", "parts", "decoding")])
    monkeypatch.setattr(sys, "argv", ["lowering", HOST, f"{FIXTURE}:float32", "tiny:float32"])
    assert lowering_main() == 0
    models = (f"{size}, float32, {unit}" for size in ("tiny", FIXTURE) for unit in ("decoding", "parts", "network"))
    assert [name for name, _ in compiled] == [*models][:5]


def test_a_target_that_is_not_known_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["lowering", "sm_1", f"{FIXTURE}:float32", "--out", str(out)])
    with pytest.raises(OptionError, match="target 'sm_1' is not known"):
        lowering_main()
    assert not list(tmp_path.iterdir())


def test_stopping_it_leaves_nothing_behind(tmp_path: Path) -> None:
    lowering = Lowering(HOST, FLOAT32, tmp_path / HOST, None)
    while not list(tmp_path.iterdir()) and lowering.process.poll() is None:
        time.sleep(0.05)
    lowering.stop()
    assert lowering.process.returncode < 0 and not list(tmp_path.iterdir())


def test_artifacts_reach_the_suite(tmp_path: Path) -> None:
    """Those of a folder that holds nothing are missed."""
    (tmp_path / MANIFEST).write_text("{}")
    status, output = run("--artifacts", str(tmp_path))
    assert status == pytest.ExitCode.USAGE_ERROR
    assert f"--artifacts: {tmp_path / MANIFEST}: is no manifest of artifacts" in output
