"""What the gate on speed says of its tests, on the terminal and in a file."""

from pathlib import Path

import pytest

from reference.perf import gate
from reference.perf.gate import Report
from reference.perf.rank_test import RankTest

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
