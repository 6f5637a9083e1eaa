"""The machine that makes mutants: what it changes, what it leaves, and what is said of those that stay green."""

import ast
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from maxwhisper.engine import artifacts
from maxwhisper.engine.artifacts import source_hash
from reference.fixtures import ROOT
from reference.mutants import controller, mojo_sources, python_sources, switch, tree
from reference.mutants.__main__ import main
from reference.mutants.controller import Outcome, Trials, tried_alone
from reference.mutants.mutant import RIGHT_TESTS, UNIT_TESTS, Mutant, next_digit
from reference.mutants.report import enough, report


def changes(instrumented: Callable[..., str], text: str) -> dict[str, set[str]]:
    """Returns, by operator, what the code of a source becomes."""
    found: dict[str, set[str]] = {}

    def note(file: str, line: int, operator: str, before: str, after: str) -> None:
        found.setdefault(operator, set()).add(after)

    assert instrumented(text, "a", note) == text
    return found


@pytest.mark.parametrize(
    ("code", "operator", "after"),
    [
        ("y = a < b", "comparison", "a <= b"),
        ("y = a + b", "arithmetic", "a - b"),
        ("y = a + b", "term dropped", "a"),
        ("y = a - 1e-05", "constant", "2e-05"),
        ("y = x[i, j]", "index swapped", "x[j, i]"),
        ("y = f(a, b)", "arguments swapped", "f(b, a)"),
        ("y = x.cast(d)", "cast left out", "x"),
        ("y = min(a, 3)", "min, max", "max(a, 3)"),
        ("y = a and b", "and, or", "a or b"),
        ("y = -a", "sign", "a"),
        ("y = not a", "not dropped", "a"),
        ("f(a)", "call skipped", "pass"),
        ("y += a", "arithmetic", "y -= a"),
    ],
)
def test_python_operators(code: str, operator: str, after: str) -> None:
    assert after in changes(python_sources.instrumented, code)[operator]


@pytest.mark.parametrize(
    "code",
    [
        "def f(x: dict[str, int] = 3) -> tuple[int, 2]:\n    '''Adds 1.'''",
        "if a < 3:\n    raise ValueError(f'{a + 1}')",
        "@dataclass(frozen=True)\nclass A:\n    x: int",
        "y: dict[str, int]",
        "y = f(a, a)",
    ],
)
def test_python_that_is_left_alone(code: str) -> None:
    assert not changes(python_sources.instrumented, code)


@pytest.mark.parametrize(
    ("code", "operator", "after"),
    [
        ("    var n = a + b * c", "arithmetic", "a - b * c"),
        ("    var n = a + b * c", "term dropped", "a"),
        ("    while a + W <= end:", "comparison", "a + W < end"),
        ("    for i in range(0, n, W):", "constant", "1"),
        ("    return x.lt(y)", "lane comparison", "x.le(y)"),
        ("    var n = ceildiv(a, b) + 1", "remainder dropped", "((a) // (b)) + 1"),
        ("    var y = ks.fma(a, b)", "arguments swapped", "b, a"),
        ("    total += x[i]", "arithmetic", "total -= x[i]"),
        ("    total += x[i]", "statement skipped", "pass"),
        ("    y.unsafe_store(i, x)", "statement skipped", "pass"),
        ("    x.unsafe_store(\n        i,\n        1.5,\n    )", "constant", "1.6"),
        ("    if a and not b:", "and, or", "a or not b"),
        ("    if a and not b:", "not dropped", "a and b"),
        ("    var y = max(-a, b)", "min, max", "min(-a, b)"),
        ("    var y = max(-a, b)", "sign", "a"),
        ("    var y = x.cast[Self.dtype]().cast[DType.float32]()", "cast left out", "x"),
    ],
)
def test_mojo_operators(code: str, operator: str, after: str) -> None:
    assert {" ".join(after.split())} <= {
        " ".join(a.split()) for a in changes(mojo_sources.instrumented, code)[operator]
    }


@pytest.mark.parametrize(
    "code",
    [
        "comptime WIDTH = 3 + 4",
        "    comptime for i in range(3):",
        '    """Adds 1 + 2."""',
        "    # total += 1",
        "def scale[n: Int](x: Int = 3) -> Float32:",
        "    raise Error(1)",
        "    var x: Int",
        "    var sums = Floats()",
        "def add_on_gpu(\n    x: Int,\n):\n    y = x + 1",
    ],
)
def test_mojo_that_is_left_alone(code: str) -> None:
    assert not changes(mojo_sources.instrumented, code)


def test_parameters_of_mojo_types_are_left_alone() -> None:
    assert changes(mojo_sources.instrumented, "    var ws = Array[Floats, 2 * 3](fill=0)") == {"constant": {"1"}}


def test_python_does_what_it_did_until_a_mutant_is_in_force() -> None:
    text = "def f(a, b):\n    a += 1\n    return a < b or a + b == 3"
    numbers = iter(range(1, 100))
    mutated = python_sources.instrumented(text, "a", lambda *_: next(numbers))
    right: dict = {}
    wrong: dict = {}
    exec(text, right)
    exec(compile(ast.parse(mutated), "mutated", "exec"), wrong)
    given = [(a, b) for a in range(4) for b in range(4)]
    switch.reached()
    assert [wrong["f"](*each) for each in given] == [right["f"](*each) for each in given]
    seen = switch.reached()
    different = set()
    for number in range(1, next(numbers)):
        switch.put_in_force(number)
        if [wrong["f"](*each) for each in given] != [right["f"](*each) for each in given]:
            different.add(number)
    switch.put_in_force(0)
    assert seen == different and len(seen) > 5


@pytest.fixture(scope="module")
def all_mutants() -> list[Mutant]:
    return tree.all_mutants()


def test_every_component_has_its_share_of_a_sample(all_mutants: list[Mutant]) -> None:
    chosen = tree.sample(all_mutants, 70, seed=1)
    assert len(chosen) == 70 == len({mutant.number for mutant in chosen})
    assert chosen == tree.sample(all_mutants, 70, seed=1) != tree.sample(all_mutants, 70, seed=2)
    by_component = [sum(other.component == mutant.component for other in chosen) for mutant in chosen]
    assert set(by_component) == {10}


def test_a_change_elsewhere_leaves_a_sample_as_it_was(all_mutants: list[Mutant]) -> None:
    """Or a merge would be red over a mutant of code that it has not touched."""
    fewer = [replace(mutant, number=mutant.number + 1) for mutant in all_mutants if mutant.file != "network/model.py"]
    before, after = (
        [str(replace(each, number=0)) for each in tree.sample(some, 70, seed=1) if each.component != "network"]
        for some in (all_mutants, fewer)
    )
    assert before == after and len(before) == 60


@pytest.mark.parametrize("operator", ["constant", "arguments swapped", "statement skipped", "arithmetic"])
def test_a_kernel_has_one_mutant_and_no_switch(operator: str) -> None:
    text = (ROOT / "maxwhisper" / "kernels" / "softmax.mojo").read_text()
    places: list[tuple[int, str]] = []

    def first(file: str, line: int, of: str, before: str, after: str) -> int | None:
        if of != operator or places:
            return None
        places.append((line, after))
        return 1

    mutated = mojo_sources.instrumented(text, "a", first)
    pairs = enumerate(zip(text.split("\n"), mutated.split("\n"), strict=True), 1)
    changed = {number: new for number, (old, new) in pairs if old != new}
    ((line, after),) = places
    assert changed.keys() == {line} and after in " ".join(changed[line].split())


def test_a_checkout_has_the_mutants_and_is_as_here_elsewhere(all_mutants: list[Mutant], tmp_path: Path) -> None:
    kernel = next(each for each in all_mutants if each.in_kernel)
    some = [kernel, *[each for each in all_mutants if not each.in_kernel][::200]]
    tree.plant(some, tmp_path)
    package, planted = ROOT / "maxwhisper", tmp_path / "maxwhisper"
    files = [path.relative_to(package) for path in package.rglob("*") if path.suffix in (".py", ".mojo")]
    changed = {file.as_posix() for file in files if (package / file).read_text() != (planted / file).read_text()}
    assert changed == {mutant.file for mutant in some}


@pytest.mark.parametrize(("literal", "after"), [("0.5", "0.6"), ("1e-05", "2e-05"), ("0.39", "0.38"), ("0x1F", None)])
def test_last_digit(literal: str, after: str | None) -> None:
    assert next_digit(literal) == after


def test_what_stays_green_is_counted_and_named() -> None:
    mutants = [Mutant(n, "kernels/linear.mojo", n, "constant", "1", str(n)) for n in range(1, 21)]
    outcomes = {mutant.number: Outcome(mutant.number, "test", "a test", True) for mutant in mutants}
    assert enough(mutants, outcomes)
    outcomes[3], outcomes[4] = Outcome(3, "survived"), Outcome(4, "unreached")
    assert not enough(mutants, outcomes)
    text = "\n".join(report(mutants, outcomes))
    assert "| kernels | 20 | 0 | 18 (90%) | 18 (90%) | 1 | 1 |" in text
    assert "3 kernels/linear.mojo:3 constant: 1 -> 3" in text


def test_no_mutants_show_nothing(
    all_mutants: list[Mutant], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reference.mutants.__main__.all_mutants", lambda: all_mutants)
    refused = Mutant(1, "kernels/linear.mojo", 1, "constant", "1", "2")
    assert not enough([], {})
    assert not enough([refused], {1: Outcome(1, "refused")})
    for arguments, said in (
        (["--only", "no_such_file"], "--only no_such_file: no file"),
        (["--number", "0"], "above 0"),
        (["--size", "tiny"], "usage: python -m reference.mutants ["),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert said in capsys.readouterr().err


def test_a_tree_is_one_in_the_folder_that_it_is_named_in(
    all_mutants: list[Mutant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tests run inside it, and start processes elsewhere."""
    plant, trials = Mock(), Mock(side_effect=KeyboardInterrupt)
    for name, stand_in in (("all_mutants", lambda: all_mutants), ("plant", plant), ("Trials", trials)):
        monkeypatch.setattr(f"reference.mutants.__main__.{name}", stand_in)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        main(["--tree", "mine"])
    assert plant.call_args[0][1] == trials.call_args[0][0] == tmp_path / "mine"


def test_graphs_of_one_mutant_are_not_found_by_another(
    all_mutants: list[Mutant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a mutant that is in force while graphs are built would survive wherever these are kept."""
    mutants = [each for each in all_mutants if each.file == "network/products.py"][:2]
    tree.plant(mutants, tmp_path)
    hashes: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        hashes.append(source_hash())
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(artifacts, "PACKAGE", tmp_path / "maxwhisper")
    monkeypatch.setattr(subprocess, "run", run)
    without = source_hash()
    for mutant in (*mutants, mutants[0]):
        assert tried_alone(mutant, tmp_path, [["tests"]], []).how == "survived"
    assert hashes[0] == hashes[2] and len({*hashes, without}) == 3 and source_hash() == without


def test_kernels_are_tried_one_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the compiler refuses are known as such; of the others the smallest blocks come first."""
    planted: dict[Path, Mutant] = {}
    chosen: list[list[str]] = []

    def plant(mutants: list[Mutant], checkout: Path) -> None:
        assert checkout not in planted and len(planted) < controller.KERNELS_AT_A_TIME
        (planted[checkout],) = mutants

    def tried(mutant: Mutant, checkout: Path, right: list[list[str]], others: list[list[str]]) -> Outcome:
        assert planted.pop(checkout) is mutant
        chosen.append(right[0])
        return Outcome(mutant.number, "test", "a test", True)

    def compiles(checkout: Path) -> bool:
        return planted[checkout].number != 2 or not planted.pop(checkout)

    for name, stub in (("plant", plant), ("compiles", compiles), ("tried_alone", tried)):
        monkeypatch.setattr(controller, name, stub)
    monkeypatch.setattr(Trials, "check", lambda self, files: None)
    trials = Trials(tmp_path, [], tmp_path / "record")
    trials.try_kernels([Mutant(n, "kernels/tiles.mojo", n, "constant", "1", "2") for n in range(1, 6)])
    assert {n: outcome.how for n, outcome in trials.found.items()} == dict.fromkeys(range(1, 6), "test") | {
        2: "refused"
    }
    assert chosen == [["tests/parity/test_isolated.py", "-k", "encoder.mlp"]] * 4 and not planted


def test_right_tests_among_a_files_unit_tests_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU's steps compile for minutes, behind others that take seconds."""
    tried: list[list[list[str]]] = []
    monkeypatch.setattr(controller, "tried_alone", lambda _, __, right, others: tried.append(right))
    monkeypatch.setattr(controller, "compiles", lambda checkout: True)
    monkeypatch.setattr(controller, "plant", lambda *_: None)
    monkeypatch.setattr(Trials, "check", lambda self, files: [*files])
    rating, gpu = (Mutant(1, file, 1, "sign", "-a", "a") for file in ("kernels/device_rating.mojo", "decoding/gpu.py"))
    controller.tried_in_kernel(rating, tmp_path)
    Trials(tmp_path, [], tmp_path / "record").tried_alone(gpu, with_parity=True)
    assert tried == [[rating.unit_tests]] * 2 and rating.unit_tests[-1] == rating.right_file


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same sources alone: in others a mutant's number is another's."""
    record, outcome = tmp_path / "record", Outcome(3, "test", "a test", True)
    kernel = Mutant(3, "kernels/tiles.mojo", 1, "constant", "1", "2")
    Trials(tmp_path, [], record).note(outcome)
    again = Trials(tmp_path, [kernel], record)
    again.try_kernels([kernel])
    assert again.found == {3: outcome} and not again.left
    with record.open("a") as file:
        file.write('{"mutant": 4, "ho')  # it is cut off as it writes
    Trials(tmp_path, [], record).note(Outcome(5, "survived"))
    assert [*Trials(tmp_path, [], record).found] == [3, 5]
    monkeypatch.setattr(controller, "sources_hash", lambda: "of others")
    assert not Trials(tmp_path, [], record).found
    assert not Trials(tmp_path, [], record).found
    record.write_text("")
    assert not Trials(tmp_path, [], record).found


def test_any_source_and_any_test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    hashes = set()
    for name in ("maxwhisper/a.py", "maxwhisper/kernels/a.mojo", "reference/a.py", "tests/unit/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        hashes.add(tree.sources_hash())
        (tmp_path / name).write_text("2")
        hashes.add(tree.sources_hash())
    (tmp_path / "maxwhisper/a.pyc").write_text("3")
    assert len(hashes) == 8 and tree.sources_hash() in hashes


def test_what_fails_without_a_mutant_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every test passes and the status is not 0: each mutant would count as killed there."""
    (tmp_path / "maxwhisper" / "network").mkdir(parents=True)

    def run(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=int("tests/parity/test_loading.py" in command), stdout="16 passed", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    loader = Mutant(1, "checkpoint/stored.py", 1, "sign", "-a", "a")
    with pytest.raises(RuntimeError, match=r"test_loading\.py fails without a mutant: 16 passed"):
        Trials(tmp_path, [loader], tmp_path / "record").tried_alone(loader, with_parity=True)


def test_a_block_that_fails_without_a_mutant_kills_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(tmp_path, [], tmp_path / "record")
    monkeypatch.setattr(Trials, "blocks_of", lambda self, mutant: ["decoder.step"])
    asked: list[list[tuple[int, str]]] = []

    def ask(do: str, patience: float, pairs: list[tuple[int, str]]) -> dict[str, list[str | None]]:
        asked.append(pairs)
        return {"said": ["CheckpointError: no tensor" for _ in pairs]}

    monkeypatch.setattr(trials.session, "ask", ask)
    mutant = Mutant(3, "network/model.py", 1, "sign", "-a", "a")
    with pytest.raises(RuntimeError, match=r"decoder\.step fails without a mutant: CheckpointError"):
        trials.try_graphs([mutant])
    assert asked == [[(0, "decoder.step"), (3, "decoder.step")]] and not trials.found


def test_the_tests_of_every_file_are_there() -> None:
    files = [Mutant(1, files.split()[0], 1, "sign", "-a", "a").unit_tests for files, _ in UNIT_TESTS]
    assert not [name for name in (*RIGHT_TESTS.values(), *sum(files, [])) if not (ROOT / name).is_file()]
