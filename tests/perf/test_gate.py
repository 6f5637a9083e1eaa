"""The gate on trial: a block that does its work over and over must fail it, and be the only one that does."""

import shutil
from pathlib import Path

import pytest

from reference.perf.engine import ROOT, Setting
from reference.perf.gate import Trees, compare

pytestmark = pytest.mark.clock

SLOWED = "encoder.attention"


@pytest.fixture
def slowed_tree(tmp_path: Path) -> Path:
    """This tree, with one block executed five times at each call, for a busy machine not to hide it."""
    tree = tmp_path / "slowed"
    for package in ("maxwhisper", "reference"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "fixtures").symlink_to(ROOT / "fixtures")
    runtime = tree / "maxwhisper" / "runtime.py"
    call = "    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:\n"
    source = runtime.read_text()
    assert call in source
    more = f"        for _ in range(4 if self.name == {SLOWED!r} else 0):\n            self.model.execute(*inputs)\n"
    runtime.write_text(source.replace(call, call + more))
    return tree


def test_a_slowed_block_fails(slowed_tree: Path) -> None:
    setting = Setting("fixture", "float32", "cpu")
    report = compare(setting, Trees(slowed_tree, ROOT, "this tree"), [SLOWED, "encoder.layer_norm"], 40)
    assert len(report.verdicts) == 2
    assert report.failed == [SLOWED], report.markdown()
