"""Processes that this one starts find its modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxwhisper.children import python_path
from maxwhisper.engine.precompile import started
from reference.fixtures import ROOT


@pytest.mark.parametrize("entry", [Path("a"), b"a", None])
def test_what_import_passes_over_in_the_path_is_passed_over(entry: object, monkeypatch: pytest.MonkeyPatch) -> None:
    before = python_path()
    monkeypatch.setattr(sys, "path", [entry, *sys.path])
    assert python_path() == before


def test_a_package_is_found_that_was_found_in_the_folder_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `python -c`, by a program from standard input, and in a notebook; no other file there is."""
    others = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", ["", *others])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('of the folder')")
    look = "import json, importlib.util as u; print(u.find_spec('maxwhisper').origin)"
    child = started(["-P", "-c", look], stdout=subprocess.PIPE)
    assert child.communicate()[0].strip() == os.fspath(ROOT / "maxwhisper" / "__init__.py")
