"""What the gate on speed says of its tests, on the terminal and in a file."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from reference.perf import gate
from reference.perf.engine import Setting
from reference.perf.gate import Report, Trees
from reference.perf.rank_test import RankTest

SETTING, TREES = Setting("fixture", "float32", "cpu"), Trees(Path("head"), Path("base"), "main")
SLOWER, EQUAL = RankTest("encoder", 0.1, 0.12, 1e-9), RankTest("decoder.step", 0.002, 0.002, 0.7)


def test_report_is_a_table_with_every_block() -> None:
    report = Report("MAX", [SLOWER, EQUAL], ["decoder.new"], ["decoder.old"], ["decoder.step"])
    assert report.failed == ["encoder"]
    text = report.markdown()
    assert "| encoder | 100 ms | 120 ms | 1.20 | 1.0e-09 | FAILED: slower |" in text
    assert "| decoder.step | 2 ms | 2 ms | 1.00 | 7.0e-01 | ok; each on inputs of its own, for they differ |" in text
    assert "| decoder.new | | | | | new |" in text
    assert "| decoder.old | | | | | removed |" in text
    assert "2 blocks timed, 1 failed: encoder." in text


@pytest.mark.parametrize(("tests", "status"), [([EQUAL], 0), ([EQUAL, SLOWER], 1)])
def test_exit_status(
    tests: list[RankTest], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gate, "compare", lambda *_: Report("MAX", tests, [], [], []))
    output = tmp_path / "build" / "gate.md"
    assert gate.main(["HEAD", "--output", str(output)]) == status
    assert output.read_text().strip() == capsys.readouterr().out.strip()


@pytest.mark.parametrize("reason", ["File exists", "No space left on device"])
def test_a_table_that_cannot_be_written_is_printed(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*of: object, **keywords: object) -> None:
        raise OSError(28, reason)

    monkeypatch.setattr(gate, "compare", lambda *_: Report("MAX", [EQUAL], [], [], []))
    output = tmp_path / "build" / "gate.md"
    if reason == "File exists":
        output.parent.write_text("")
    else:
        monkeypatch.setattr(Path, "write_text", full)
    assert gate.main(["HEAD", "--output", str(output)]) == 1
    printed = capsys.readouterr()
    assert "decoder.step" in printed.out and not output.exists()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"perf-gate: --output {output.parent}") and line.endswith(f": {reason}")


def test_a_block_fails_where_two_more_pairs_of_processes_find_it_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on head's inputs, but for a block that takes others in base."""
    slower, equal = (0.2, 1e-9), (0.1, 0.7)
    found = {"a": [slower, slower, equal], "b": [slower, slower, slower], "c": [equal]}
    asked, started = [], []

    def rounds(pair: object, block: str, files: tuple[Path, Path], n_round: int) -> RankTest:
        asked.append((block, *(file.name for file in files)))
        head, p = found[block].pop(0)
        return RankTest(block, 0.1, head, p)

    monkeypatch.setattr(gate, "save_inputs", lambda *_: None)
    monkeypatch.setattr(gate, "workers", lambda *_: started.append(1) or nullcontext())
    monkeypatch.setattr(gate, "rounds", rounds)
    tests = gate.timed(SETTING, TREES, ["a", "b", "c"], ["b"], 40)
    assert [test.block for test in tests if test.failed] == ["b"] and len(tests) == len(started) == 3
    again = [("a", "a.head", "a.head"), ("b", "b.base", "b.head")]
    assert asked == [*again, ("c", "c.head", "c.head"), *again, *again]


def test_rounds_of_base_and_head_are_not_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PAUSE", 0)
    pair: Any = [Mock(ask=lambda do, s=seconds, **_: [s, 9 * s, s] if do == "time" else None) for seconds in (1.0, 2.0)]
    found = gate.rounds(pair, "a", (Path("base"), Path("head")), 20)
    assert (found.base, found.head, found.failed) == (1.0, 2.0, True)
