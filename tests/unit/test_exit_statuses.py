"""What a command finds is its status, for `make` and for a gate of merges: none that is run by its name forgets it."""

import ast
from pathlib import Path

import pytest

from reference.fixtures import ROOT

COMMANDS = [
    path
    for package in ("maxwhisper", "reference")
    for path in sorted((ROOT / package).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_status_that_is_returned_is_that_of_the_process(path: Path) -> None:
    lines = path.read_text().splitlines()
    (main,) = (each for each in ast.parse("\n".join(lines)).body if getattr(each, "name", "") == "main")
    assert isinstance(main, ast.FunctionDef) and main.returns is not None
    returned = ast.unparse(main.returns)
    assert lines[-1].strip() == {"int": "sys.exit(main())", "None": "main()"}[returned]
