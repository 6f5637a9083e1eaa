"""Text in files is UTF-8, whatever the locale says."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from maxwhisper.cli.outputs import write
from maxwhisper.compare.material import read_text
from maxwhisper.compare.race.lanes import race_of
from maxwhisper.compare.race.page import write_picture
from maxwhisper.subtitles import FORMATS
from reference.kernel_diff import __main__ as kernel_diff
from reference.report import not_written

from .test_race import record, row

SAID = "Größe, 大きさ"


@pytest.fixture(autouse=True)
def locale_without_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has what names no encoding be ASCII: what `pathlib` asks for the one that the locale has."""
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")


def test_transcripts(tmp_path: Path) -> None:
    result = {"text": SAID, "segments": [{"id": 0, "start": 0.0, "end": 1.0, "text": SAID}], "language": "de"}
    assert write(result, "talk.mp3", str(tmp_path), "all", {}) == []
    written = {path.suffix[1:]: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written.keys() == set(FORMATS)
    assert [ending for ending, text in written.items() if SAID not in text] == ["json"]


def test_a_picture_of_a_race(tmp_path: Path) -> None:
    """Its page has what is no ASCII escaped."""
    race = race_of(record(row("fast", (2.0, [(0.5, SAID)])), text=SAID), "talk.json")
    write_picture(race, tmp_path / "race.svg")
    assert "Größe" in (tmp_path / "race.svg").read_text(encoding="utf-8")


def test_what_was_said_and_what_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talk.txt").write_text(SAID, encoding="utf-8")
    assert read_text(tmp_path / "talk.txt") == SAID
    assert not_written(tmp_path / "summary.md", lambda: SAID) is None
    monkeypatch.setattr(kernel_diff, "read", lambda folder: folder)
    monkeypatch.setattr(kernel_diff, "compare", lambda base, head: SimpleNamespace(markdown=lambda: SAID))
    assert kernel_diff.main(["head", "base", "--output", str(tmp_path / "diff.md")]) == 0
    assert {(tmp_path / name).read_text(encoding="utf-8") for name in ("summary.md", "diff.md")} == {SAID}
