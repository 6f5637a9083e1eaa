"""The images' files: that what they call and name is there."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from maxwhisper.cli import build_parser

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "container"


@pytest.fixture(params=["Containerfile", "Containerfile.gpu"])
def containerfile(request: pytest.FixtureRequest) -> str:
    return (FOLDER / request.param).read_text().replace("\\\n", " ")


def test_the_extras_that_an_image_installs_exist(containerfile: str) -> None:
    [extras] = re.findall(r"install\.sh /source \S+ (\S+)", containerfile)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)


def test_the_commands_of_an_image_have_options_that_exist(containerfile: str) -> None:
    [served] = re.findall(r"(?m)^CMD (\[.*\])", containerfile)
    options = vars(build_parser().parse_args(json.loads(served)))
    assert options["host"] == "0.0.0.0"
    for command in re.findall(r"bin/maxwhisper ((?:convert|compile) [^&\n]*)", containerfile):
        words = re.sub(r'"\$(\w+)"', r"\1", command).replace("TARGET", "sm_90a").split()
        build_parser().parse_args(words)


def test_an_image_runs_as_nobody_in_particular_and_is_asked_how_it_is(containerfile: str) -> None:
    assert re.search(r"(?m)^USER 65532:65532$", containerfile)
    [check] = re.findall(r"(?m)^HEALTHCHECK .*?CMD (\[.*\])$", containerfile)
    assert "/health" in json.loads(check)[-1]
