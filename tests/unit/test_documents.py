"""Every command in the documents is one that there is, and takes what stands behind it."""

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from maxwhisper.cli import build_parser
from reference.fixtures import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
WORDS_BEFORE = re.compile(r".*\| |\$ |\.venv/bin/|[A-Z_]+=\S+ ")
"""What stands before a command in its line: a prompt, where it is, its environment, what is piped into it."""


def code(text: str) -> Iterator[str]:
    """Yields the lines of a document's blocks of code, and the code within its lines."""
    blocks = [*FENCED.findall(text), *re.findall(r"^    (\S.*)", text, re.M)]
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    yield from (each.replace("\n", " ") for each in re.findall(r"`([^`]+)`", FENCED.sub("", text)))


def commands(program: str) -> set[tuple[str, str]]:
    """Returns the names of documents, and what stands in them behind the name of a program."""
    found = set()
    for document in DOCUMENTS:
        for line in code(document.read_text()):
            while before := WORDS_BEFORE.match(line):
                line = line[before.end() :]
            line = re.sub(r"\s+#.*|<\(.*?\)", "", line).split(" | ")[0]
            if line.startswith(f"{program} "):
                found.add((document.name, line.removeprefix(f"{program} ")))
    return found


def test_maxwhisper_takes_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """But for what a part of a command leaves out, as in `maxwhisper compile --target`."""
    parser = build_parser()
    (subcommands,) = (each.choices for each in parser._actions if isinstance(each.choices, dict))
    found = {(document, words) for document, words in commands("maxwhisper") if words != "batched"}  # an engine's name
    for document, words in found:
        name, *options = shlex.split(words)
        unknown = {each.partition("=")[0] for each in options if each.startswith("--")}
        assert name in subcommands, f"{document}: {words}"
        assert unknown <= subcommands[name]._option_string_actions.keys(), f"{document}: {words}"
        try:
            parser.parse_args([name, *options])
        except SystemExit:
            said = capsys.readouterr().err
            assert "are required" in said or "expected one argument" in said, f"{document}: {words}: {said}"
    assert len(found) > 50


def test_every_target_and_variable_of_make_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))
    words = {word for _, words in commands("make") for word in shlex.split(words)}
    asked = {word for word in words if "=" not in word}
    variables = {word.partition("=")[0] for word in words - asked}
    assert len(asked) > 15 and asked <= targets
    assert variables and all(f"$({name})" in makefile for name in variables)


def test_modules_know_their_options() -> None:
    found = 0
    for document, words in commands("python -m"):
        module, *options = words.split()
        if not module.startswith(("maxwhisper", "reference")):
            continue
        spec = find_spec(module)
        assert spec and spec.origin, f"{document}: {module}"
        path = Path(spec.origin)
        source = (path.with_name("__main__.py") if spec.submodule_search_locations else path).read_text()
        unknown = [option for option in options if option.startswith("--") and f'"{option}"' not in source]
        assert not unknown, f"{document}: {words}"
        found += 1
    assert found > 10


def test_pytest_takes_every_command(pytestconfig: pytest.Config) -> None:
    asked = {words for _, words in commands("pytest") if words != "-k"}
    unknown = {words: pytestconfig._parser.parse_known_and_unknown_args(shlex.split(words))[1] for words in asked}
    assert len(asked) > 20 and not any(unknown.values())
    paths = {word.partition("::")[0] for words in asked for word in shlex.split(words) if word.startswith("tests/")}
    assert len(paths) > 5 and not [path for path in paths if not [*ROOT.glob(path)]]
