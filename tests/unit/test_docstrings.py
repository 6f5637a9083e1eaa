"""Docstrings of functions are sentences that start with a verb: "Returns ...", "Raises ..."."""

import ast
import re

from reference.fixtures import ROOT

NOUNS = "As|Its|This|Others|Bytes|Digests|Inputs|Keys|Outputs|Pairs|Scores|Values|Weights"
VERB = re.compile(rf"(?!({NOUNS})\b)[A-Z][a-z]+s\b(?!')")


def test_a_docstring_starts_with_a_verb() -> None:
    docstrings = [
        f"{text} ({path.relative_to(ROOT)}:{node.lineno})"
        for package in ("maxwhisper", "reference")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node))
    ]
    assert docstrings
    assert not [text for text in docstrings if not VERB.match(text)]
