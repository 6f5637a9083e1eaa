"""The gate on trial: a block that does its work over and over must fail it, and be the only one that does."""

import shutil
from pathlib import Path

import pytest

from reference.perf.engine import ROOT, Setting
from reference.perf.gate import Trees, compare

pytestmark = pytest.mark.clock

SLOWED = "encoder.attention"
FIVE_TIMES = f"""

once = Executable.__call__


def five_times(self, *inputs):
    for _ in range(4 if self.name == {SLOWED!r} else 0):
        once(self, *inputs)
    return once(self, *inputs)


Executable.__call__ = five_times
"""


@pytest.fixture
def slowed_tree(tmp_path: Path) -> Path:
    """This tree, with one block executed five times at each call, for a busy machine not to hide it."""
    tree = tmp_path / "slowed"
    for package in ("maxwhisper", "reference"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "fixtures").symlink_to(ROOT / "fixtures")
    runtime = tree / "maxwhisper" / "runtime.py"
    runtime.write_text(runtime.read_text() + FIVE_TIMES)
    return tree


def test_a_slowed_block_fails(slowed_tree: Path) -> None:
    setting = Setting("fixture", "float32", "cpu")
    report = compare(setting, Trees(slowed_tree, ROOT, "this tree"), [SLOWED, "encoder.layer_norm"], 40)
    assert len(report.verdicts) == 2
    assert report.failed == [SLOWED], report.markdown()
