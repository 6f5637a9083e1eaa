"""pytest-benchmark's own options, on a benchmark whose times come from another process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reference.fixtures import ROOT

pytestmark = pytest.mark.clock

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs one small benchmark with the given options."""
    command = [sys.executable, "-m", "pytest", "tests/perf/test_speed.py", "--size=fixture", "-k=layer_norm and MAX"]
    command += [f"--benchmark-storage={tmp_path}", "--benchmark-max-time=0.1", "-p", "no:cacheprovider"]
    return lambda *options: subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)


def test_autosave_compare_and_compare_fail(run: Run, tmp_path: Path) -> None:
    done = run("--benchmark-autosave")
    assert done.returncode == 0, done.stdout
    assert "encoder.layer_norm" in done.stdout.partition("% read")[2].splitlines()[1]
    (saved,) = tmp_path.rglob("*.json")
    machine = json.loads(saved.read_text())
    (benchmark,) = machine["benchmarks"]
    assert benchmark["extra_info"]["engine"] == "MAX"
    assert benchmark["extra_info"]["GB/s"] > 0
    assert benchmark["extra_info"]["read ceiling, GB/s"] > 0

    # No two true figures are asked to be near each other: what was saved is made faster than any block can be.
    stats = {name: x / 1000 if isinstance(x, float) else x for name, x in benchmark["stats"].items()}
    saved.write_text(json.dumps({**machine, "benchmarks": [{**benchmark, "stats": stats}]}))
    done = run("--benchmark-compare", "--benchmark-compare-fail=median:10%")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Comparing against benchmarks from" in done.stdout + done.stderr
    assert "Performance has regressed" in done.stdout + done.stderr
