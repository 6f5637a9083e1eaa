"""A report that cannot be written, or not whole: no half of it is left, and what can be said is."""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import whisper

import reference.report.charts  # what a run inside this process imports first is not kept
from reference.report import ReportError, write
from reference.results import Run

from .reports import FILES, failing, judgement, passing, read, written


def broken(*arguments: object) -> str:
    raise ZeroDivisionError("division\nby zero")


def of_an_earlier_run(folder: Path) -> None:
    """Writes files that are not to be taken for those of the run that follows."""
    for name in FILES:
        (folder / name).write_text("an earlier run's")


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "rendering"), [*zip(FILES, ("page", "as_json", "summary"), strict=True)])
def test_a_rendering_that_fails_takes_no_other_with_it(
    name: str, rendering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_earlier_run(tmp_path)
    monkeypatch.setattr(reference.report, rendering, broken)
    with pytest.raises(ReportError) as missing:
        write(Run(), tmp_path)
    assert str(missing.value) == f"{tmp_path / name} cannot be written: ZeroDivisionError: division by zero"
    assert left_in(tmp_path) == {*FILES} - {name}
    for path in tmp_path.iterdir():
        assert "an earlier run" not in path.read_text()


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_writing_that_fails_leaves_neither_half_a_file_nor_an_earlier_runs(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_earlier_run(tmp_path)
    whole = Path.write_text

    def half(path: Path, text: str, **keywords: str) -> int:
        whole(path, text[:10], **keywords)
        return full()

    def full(*paths: Path) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, "write_text", half) if moment == "writing" else ("os.replace", full)))
    with pytest.raises(ReportError, match=r"report\.html cannot be written: No space left on device"):
        write(Run(), tmp_path)
    assert left_in(tmp_path) == set()


def test_a_disk_that_fills_up_keeps_what_there_was_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, size = Path.write_text, 200_000

    def until_full(path: Path, text: str, **keywords: str) -> int:
        whole(path, text[:size], **keywords)
        if len(text) > size:
            raise OSError(28, "No space left on device")
        return len(text)

    monkeypatch.setattr(Path, "write_text", until_full)
    with pytest.raises(ReportError) as missing:
        write(Run(judgements=[judgement(layer=n) for n in range(400)]), tmp_path)
    assert str(missing.value) == f"{tmp_path / 'report.json'} cannot be written: No space left on device"
    assert left_in(tmp_path) == {"summary.md", "report.html"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=re.escape(str(tmp_path / "file" / "report"))):
        write(passing(), tmp_path / "file" / "report")


def test_without_matplotlib_there_is_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "reference.report.charts", raising=False)
    monkeypatch.delattr(reference.report, "charts", raising=False)
    run = failing()
    page = written(run, tmp_path)[0]
    assert "FAILED" in read(page).text and "<svg" not in page
    (line,) = run.notes.values()
    assert line.startswith(f"{tmp_path / 'report.html'}: no charts: ModuleNotFoundError") and "\n" not in line


@pytest.mark.parametrize("part", ["charts.ratios", "charts.error_map", "charts.along_the_network"])
def test_a_chart_that_cannot_be_drawn_is_a_line_in_its_place(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"reference.report.{part}", broken)
    run = failing()
    text = read(written(run, tmp_path, drawn=False)[0]).text
    assert "no charts: ZeroDivisionError: division by zero" in text and "5 of 8 comparisons failed" in text
    assert list(run.notes) == [f"{tmp_path / 'report.html'}: no charts: ZeroDivisionError: division by zero"]


def test_a_section_that_cannot_be_made_is_a_line_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["reference.report.page"], "fault_section", broken)
    text = read(written(failing(), tmp_path, drawn=False)[0]).text
    assert "no faults: ZeroDivisionError" in text and "All comparisons" in text


def test_packages_without_metadata_have_the_version_that_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", without)
    page, data, _ = written(passing(), tmp_path, drawn=False)
    environment = data["environment"]
    assert (environment["torch"], environment["openai-whisper"]) == (torch.__version__, whisper.__version__)
    assert environment["max"] == "unknown: ImportError: max has no metadata and no __version__"
    assert data["passed"] and environment["max"] in read(page).text


def test_a_machine_that_does_not_say_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("processor", "gpu"):
        monkeypatch.setattr(f"reference.results.{name}", broken)
    environment = written(passing(), tmp_path, drawn=False)[1]["environment"]
    assert environment["processor"] == environment["GPU"] == "unknown: ZeroDivisionError: division by zero"


def test_a_command_that_is_not_text_is_written_all_the_same(tmp_path: Path) -> None:
    run = passing()
    run.command = f"pytest --report {os.fsdecode(bytes([255]))}"
    page, data, _ = written(run, tmp_path, drawn=False)
    assert data["command"] == run.command and r"\udcff" in page
