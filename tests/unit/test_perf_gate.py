"""The gate on trial: what does its work over and over must fail it, and be the only one that does."""

import shutil
from pathlib import Path

import pytest

from reference.fixtures import FIXTURES, ROOT
from reference.perf.engine import Setting
from reference.perf.gate import Trees, compare

pytestmark = pytest.mark.clock

FIVE_TIMES = """

once = Executable.__call__


def five_times(self, **inputs):
    for _ in range(4 if self.name == {graph!r} else 0):
        once(self, **inputs)
    return once(self, **inputs)


Executable.__call__ = five_times
"""


def slowed(graph: str, tmp_path: Path) -> Path:
    """Copies this tree, with one graph executed five times at each call, for a busy machine not to hide it."""
    tree = tmp_path / "slowed"
    for package in ("maxwhisper", "reference"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "fixtures").symlink_to(FIXTURES)
    runtime = tree / "maxwhisper" / "engine" / "program.py"
    runtime.write_text(runtime.read_text() + FIVE_TIMES.format(graph=graph))
    return tree


@pytest.mark.parametrize(
    ("graph", "slower", "other"),
    [
        ("encoder.attention", "encoder.attention", "encoder.layer_norm"),
        ("decoder.speculate", "decode.greedy", "decode.beams"),
    ],
)
def test_what_is_slowed_fails(graph: str, slower: str, other: str, tmp_path: Path) -> None:
    setting = Setting("fixture", "float32", "cpu")
    report = compare(setting, Trees(slowed(graph, tmp_path), ROOT, "this tree"), [slower, other], 40)
    assert len(report.tests) == 2
    assert report.failed == [slower], report.markdown()
