"""A wheel of `make wheel`, in a new user's hands: text at once, and this CPU's own graphs some minutes later."""

import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import pytest

from maxwhisper.engine.instructions import PORTABLE_CPU
from reference.fixtures import FIXTURES, NANO, ROOT

CLIP = FIXTURES / "clips" / "english-4.ogg"
UNITS = ("network", "decoding", "alignment")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns what a wheel installs, with graphs of the fixture."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["make", "wheel", f"MODELS={NANO}", f"BIN={Path(sys.executable).parent}", f"WHEELS={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    [wheel] = folder.glob("*.whl")
    assert wheel.name.endswith(f"{platform.machine()}.whl")
    ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.mark.nightly
@pytest.mark.skipif(platform.machine() not in PORTABLE_CPU, reason="graphs are compiled for x86-64-v3 alone")
def test_a_wheel_transcribes_at_once(unpacked: Path, tmp_path: Path) -> None:
    def transcribe() -> str:
        """Transcribes with word times, and returns what was said of it."""
        command = ["maxwhisper", "transcribe", str(CLIP), "--model", str(NANO), "--word_timestamps", "True"]
        places = {"MAXWHISPER_CACHE_DIR": str(tmp_path / "kept"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        environ = {**os.environ, "PYTHONPATH": str(unpacked), **places}
        run = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return run.stderr

    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    first = transcribe()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "another process compiles" in first
    assert ended.ru_utime - started.ru_utime < 30, "compiling takes minutes"
    text = (tmp_path / "english-4.txt").read_text()
    artifacts, give_up = tmp_path / "kept" / "artifacts", time.monotonic() + 1800
    while not all([*artifacts.glob(f"{unit}-*/manifest.json")] for unit in UNITS):
        assert time.monotonic() < give_up, sorted(artifacts.iterdir())
        time.sleep(1)
    assert not transcribe()
    assert (tmp_path / "english-4.txt").read_text() == text
