"""What is kept of a verdict, and when it is found anew."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from maxwhisper.network.blocks import BLOCKS
from reference import verdicts
from reference.judge import Comparison, Condition, Judgement, judge
from reference.models import FIXTURE, Model, load
from reference.results import Run
from reference.soak import pytorch_in_the_subjects_place
from reference.suite import Suite
from reference.trial import Trial
from reference.verdicts import Lenient, Memory, Verdicts, as_data, circumstances, fingerprint, from_data

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of PyTorch, where oneDNN's flags are set

BLOCK = BLOCKS["decoder.block.step"]
Outputs = list[Tensor]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(FIXTURE)


@pytest.fixture
def memory(tmp_path: Path, pytestconfig: pytest.Config) -> Memory:
    return pytest.Cache(tmp_path, pytestconfig, _ispytest=True)


def comparison(model: Model, inputs: str = "speech") -> Comparison:
    return next(Suite(model, torch.float32).comparisons(BLOCK, [inputs]))


def judged(
    model: Model,
    memory: Memory | None,
    change: Callable[[Outputs], Outputs] = lambda outputs: outputs,
    of: Comparison | None = None,
) -> Judgement:
    """Returns what a run says of PyTorch in the place of MAX, its outputs changed."""
    of = of or comparison(model)
    suite = Suite(model, torch.float32, memory=memory)
    right = pytorch_in_the_subjects_place(suite, of)
    subject = suite.subject
    subject.executables[subject.unit(BLOCK), of.layer] = {BLOCK.name: lambda **inputs: change(right(**inputs))}
    return suite.judge(of)


def test_a_verdict_is_that_of_the_earlier_run(model: Model, memory: Memory) -> None:
    first, again = judged(model, memory), judged(model, memory)
    assert (first.passed, first.recalled, again.recalled) == (True, False, True)
    assert replace(again, recalled=False) == first
    assert not judged(model, None).recalled


@pytest.mark.parametrize("place", [0, -1])
def test_outputs_of_which_one_bit_changed_are_judged(model: Model, memory: Memory, place: int) -> None:
    """The first bit of all, or the last one."""

    def one_bit_off(outputs: Outputs) -> Outputs:
        outputs[place] = outputs[place].contiguous()
        outputs[place].view(torch.int32).view(-1)[place] ^= 1
        return outputs

    judged(model, memory)
    changed = judged(model, memory, one_bit_off)
    assert changed.passed and not changed.recalled
    assert judged(model, memory, one_bit_off).recalled


def test_a_verdict_that_did_not_pass_is_not_kept(model: Model, memory: Memory) -> None:
    judged(model, memory)
    for _ in range(2):
        wrong = judged(model, memory, lambda outputs: [outputs[0] * 2])
        assert not wrong.passed and not wrong.recalled


def test_other_inputs_are_another_comparison(model: Model, memory: Memory) -> None:
    judged(model, memory)
    assert not judged(model, memory, of=replace(comparison(model, "random"), inputs="random.first")).recalled


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "version": lambda patch: patch.setattr(verdicts, "version", lambda name: f"{name} 0"),
    "sources": lambda patch: patch.setattr(verdicts, "sources", lambda: "others"),
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "instructions": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "none"),
    "precision": lambda patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
    "oneDNN's arithmetic": lambda patch: patch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
}


@pytest.mark.parametrize("changed", ["nothing", *CHANGES, "weight", "input", "entry"])
def test_a_verdict_is_found_again_when_it_may_have_changed(
    model: Model, memory: Memory, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = judged(model, memory)
    outputs: Outputs = []
    judged(model, memory, lambda right: outputs or outputs.extend(right) or outputs)
    if changed in CHANGES:
        CHANGES[changed](monkeypatch)
    if changed == "weight":  # of the block itself, whose inputs stay
        name = "decoder.blocks.0.mlp.2.bias"
        model = replace(model, tensors=model.tensors | {name: model.tensors[name] + 1}, source=None, known={})
    if changed == "input":  # and no output
        before = Suite.inputs
        monkeypatch.setattr(Suite, "inputs", lambda *of: {name: x * 1.001 for name, x in before(*of).items()})
    if changed == "entry":
        (entry,) = (path for path in tmp_path.rglob("verdicts/*") if path.is_file())
        entry.write_text(entry.read_text()[:-5])
    again = judged(model, memory, lambda _: outputs)
    assert kept.passed and again.recalled == (changed == "nothing")


def test_nothing_is_kept_of_a_gpu(model: Model, memory: Memory) -> None:
    verdict, calls = judged(model, None), []
    suite = Suite(model, torch.float32, "gpu", memory=memory)
    for _ in range(2):
        suite.recalled(verdict.comparison, {}, lambda: calls.append(1) or [verdict])
    assert len(calls) == 2


@pytest.mark.parametrize("unwritable", ["folder", "entry", "raising"])
@pytest.mark.filterwarnings("error")
def test_a_memory_that_cannot_be_written_costs_a_line_and_no_verdict(
    model: Model, memory: Memory, unwritable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    if unwritable == "folder":
        (tmp_path / "v").write_text("")
    if unwritable == "entry":
        monkeypatch.setattr(Path, "write_text", full)
    if unwritable == "raising":
        monkeypatch.setattr(pytest.Cache, "set", full)
    run = Run()
    for _ in range(2):
        verdict = judged(model, Lenient(memory, run.note))
        assert verdict.passed and not verdict.recalled
    (line,) = run.notes.values()
    reason = "Not a directory" if unwritable == "folder" else "No space left on device"
    assert line.startswith(f"pytest's cache keeps nothing for the next run ({reason})") and "\n" not in line


@pytest.mark.parametrize("kept", ["[]", "0", "{}", "null", '{"judgements": []}'])
def test_an_entry_that_is_not_of_this_form_is_none(model: Model, memory: Memory, kept: str, tmp_path: Path) -> None:
    judged(model, memory)
    (entry,) = (path for path in tmp_path.rglob("verdicts/*") if path.is_file())
    entry.write_text(kept)
    assert not judged(model, memory).recalled


def test_nothing_is_kept_where_a_version_is_not_known(
    model: Model, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(package: str) -> str:
        raise ImportError(package)

    judged(model, memory)
    monkeypatch.setattr(verdicts, "version", unknown)
    for _ in range(2):
        assert not judged(model, memory).recalled


def test_sources_are_all_of_the_judges() -> None:
    names = {path.name for path in verdicts.JUDGE.glob("*.py")}
    assert {
        "judge.py",
        "measures.py",
        "suite.py",
        "trial.py",
        "blocks.py",
        "activations.py",
        "chain.py",
        "verdicts.py",
    } <= names
    assert verdicts.TABLE.name == "blocks.py"


# ---- what an entry is of -------------------------------------------------------------------------------------------


def small(factor: float = 1.0, condition: float = 7.0) -> Judgement:
    """Returns a verdict on a tensor that is that much too large."""
    of, right = Comparison("s", torch.bfloat16, "b", 1, "i", "cpu", 5), torch.ones(3, 4)
    three = [right.double()], [right.bfloat16()], [(right * factor).bfloat16()]
    return judge(of, *three, longest_reduction=4, condition=Condition(condition))


def test_a_verdict_comes_back_as_it_was_kept() -> None:
    assert small().passed
    assert from_data(json.loads(json.dumps(as_data(small())))) == replace(small(), recalled=True)


def test_one_verdict_that_did_not_pass_keeps_those_beside_it_from_being_kept(memory: Memory) -> None:
    calls = []
    for _ in range(2):
        found = Verdicts(memory, "m").recalled("n", {}, lambda: calls.append(1) or [small(), small(2.0)])
        assert [each.passed for each in found] == [True, False]
    assert len(calls) == 2


def test_a_fingerprint_is_of_more_than_bytes() -> None:
    """Zeros are the same bytes in whatever dtype and shape, and under whatever name."""
    zeros = torch.zeros(4)
    given = [{"a": zeros}, {"b": zeros}, {"a": zeros.reshape(2, 2)}, {"a": zeros.int()}, {"a": zeros, "b": zeros[:0]}]
    found = [fingerprint(tensors, "m") for tensors in given] + [fingerprint(given[0], "n"), fingerprint({}, "m")]
    assert len(set(found)) == len(found)
    assert fingerprint({"a": zeros.clone()}, "m") == found[0]
    assert fingerprint({}, "ab", "c") != fingerprint({}, "a", "bc")


@pytest.mark.parametrize("name", ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR"])
def test_what_pytorchs_libraries_are_told_is_a_circumstance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    found = [circumstances(())]
    for value in ("a", "b"):
        monkeypatch.setenv(name, value)
        found.append(circumstances(()))
    assert len(set(map(str, found))) == 3


def test_sources_are_what_is_in_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "judge.py", tmp_path / "measures.py", tmp_path / "table" / "blocks.py"]
    files[-1].parent.mkdir()
    for file in files:
        file.write_text("K = 4.0")
    monkeypatch.setattr(verdicts, "JUDGE", tmp_path)
    monkeypatch.setattr(verdicts, "TABLE", files[-1])
    found = [verdicts.sources.__wrapped__()]
    for file in files:
        file.write_text("K = 5.0")
        found.append(verdicts.sources.__wrapped__())
    assert len(set(found)) == 4


def test_what_is_no_number_is_looked_for_again_where_outputs_may_have_changed(model: Model, memory: Memory) -> None:
    of = comparison(model)

    def finite(change: Callable[[Tensor], Tensor]) -> tuple[bool, int]:
        """Returns what is said of PyTorch in the place of MAX, and how often PyTorch was asked again for it."""
        suite = Suite(model, torch.float32, memory=memory)
        right = pytorch_in_the_subjects_place(suite, of)
        changed: Callable[[Outputs], Outputs] = lambda outputs: [*outputs[:-1], change(outputs[-1])]  # noqa: E731
        subject = suite.subject
        subject.executables[subject.unit(BLOCK), 0] = {BLOCK.name: lambda **given: changed(right(**given))}
        inputs = suite.inputs(BLOCK, of)
        x = inputs["x"].clone()
        x[0, 0, 0] = torch.nan
        with patch.object(Trial, "finite_as_pytorch", autospec=True, side_effect=Trial.finite_as_pytorch) as asked:
            return suite.finite_as_pytorch(of, inputs | {"x": x}, "NaN"), asked.call_count

    assert [finite(Tensor.clone), finite(Tensor.clone)] == [(True, 1), (True, 0)]
    assert [finite(Tensor.nan_to_num), finite(Tensor.nan_to_num)] == [(False, 1), (False, 1)]
    assert finite(Tensor.clone) == (True, 0)
