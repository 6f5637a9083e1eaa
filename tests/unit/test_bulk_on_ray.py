"""`maxwhisper bulk` on Ray, and what is left of it when a part of it, or all, is killed."""

# ruff: noqa: E402 - what is imported below the skips is installed by the extra

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxwhisper.whisper import Whisper
from reference.fixtures import ROOT

from .bulk import ALONE, OPTIONS, assert_each_once, bulk, command, lone_runs, result_of, short_files, transcripts

pytestmark = pytest.mark.nightly  # Ray takes a quarter of a minute to start

FILES = 200


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder of 200 short files, ten of which cannot be decoded."""
    folder = tmp_path_factory.mktemp("bulk") / "archive"
    assert len(short_files(folder, FILES)) == FILES
    return folder


@pytest.fixture(scope="module")
def expected(model: Whisper, archive: Path) -> dict[str, dict[str, Any] | None]:
    found = lone_runs(model, sorted(archive.iterdir()), **ALONE)
    assert sum(result is None for result in found.values()) == 10
    return found


@contextmanager
def running(*arguments: Any, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """Runs the command while the block does, and kills what is left of it."""
    with subprocess.Popen(
        command(*arguments, **how), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(seen: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 600) -> Any:
    """Returns what is seen once something is; fails if the process ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := seen():
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def committed(output: Path) -> list[Path]:
    folder = output / "parts" / "checkpoint"
    return [path for path in folder.glob("*.parquet") if not path.name.endswith(".pending.parquet")]


def actor_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    """Returns the process of Ray's that holds the model."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "Transcriber" in " ".join(child.cmdline()):
                return child
        except psutil.Error:  # it has ended meanwhile
            continue
    return None


def test_an_archive_with_a_worker_killed(
    archive: Path, expected: dict[str, dict[str, Any] | None], tmp_path: Path
) -> None:
    with running(archive, tmp_path / "out", *OPTIONS) as process:
        wait_for(lambda: committed(tmp_path / "out"), process)
        actor = wait_for(lambda: actor_of(process), process)
        assert "decode" not in " ".join(actor.cmdline())  # audio is decoded elsewhere
        actor.kill()
        said, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    assert f"{FILES} files, 10 of them with errors" in said and " x real time" in said
    assert_each_once(tmp_path / "out", expected)

    again = bulk(archive, tmp_path / "out", *OPTIONS)
    assert again.returncode == 0 and "no audio was left to transcribe" in again.stdout, again
    assert_each_once(tmp_path / "out", expected)


def test_the_driver_killed_between_writing_and_committing(
    archive: Path, expected: dict[str, dict[str, Any] | None], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with running(archive, output, *OPTIONS, faulty="stall_before_commit") as process:
        wait_for((output / "parts" / "stalled").exists, process)
        children = psutil.Process(process.pid).children(recursive=True)
        writers = [child for child in children if "Agent" not in child.name()]  # Ray's agents take minutes to notice
        os.kill(process.pid, signal.SIGKILL)
    assert not psutil.wait_procs(writers, timeout=60)[1]  # the others end with the one that started them
    [pending] = (output / "parts" / "checkpoint").glob("*.pending.parquet")
    part = pending.name.removesuffix(".pending.parquet")
    assert pq.read_metadata(output / "parts" / "rows" / f"{part}-0.parquet").num_rows > 0
    assert len(committed(output)) >= 2 and not list(output.glob("transcripts*"))

    resumed = bulk(archive, output, *OPTIONS)
    assert resumed.returncode == 0, resumed
    assert_each_once(output, expected)


def test_a_disk_that_fills(archive: Path, expected: dict[str, dict[str, Any] | None], tmp_path: Path) -> None:
    output = tmp_path / "out"
    stopped = bulk(archive, output, *OPTIONS, faulty="fill_the_disk")
    assert stopped.returncode == 1, stopped
    assert f"maxwhisper: error: OUTPUT {output}: stopped by OSError: " in stopped.stderr
    assert "File too large" in stopped.stderr and "the same command goes on" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert len(committed(output)) >= 2 and not list(output.glob("transcripts*"))

    resumed = bulk(archive, output, *OPTIONS)
    assert resumed.returncode == 0, resumed
    assert_each_once(output, expected)


def test_parquet_of_bytes_resumed_in_what_is_no_disk_to_ray(model: Whisper, tmp_path: Path) -> None:
    files = short_files(tmp_path / "archive", 14)
    audio = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    source, url = tmp_path / "audio.parquet", f"dir::file://{tmp_path}/out"
    output = Path(f"{tmp_path}/out/{tmp_path}/out")  # by fsspec's way of joining the two
    pq.write_table(pa.table({"audio": audio[:8], "speaker": list(range(8))}), source)
    first = bulk(source, url)
    assert first.returncode == 0, first
    pq.write_table(pa.table({"audio": [*audio, audio[0]], "speaker": list(range(15))}), source)
    resumed = bulk(source, url)
    assert resumed.returncode == 0, resumed
    rows = {row["path"]: row for row in transcripts(output)}
    assert len(rows) == len(transcripts(output)) == 14 and len(committed(output)) == 2
    expected = lone_runs(model, files, temperature=0.0, beam_size=5)
    for file in files:
        row, alone = rows[file.name], expected[str(file)]
        assert row["error"] if alone is None else result_of(row) == alone


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    archive, wrong = tmp_path / "archive", tmp_path / "wrong.pt"
    short_files(archive, 12)
    wrong.write_bytes(b"no checkpoint")
    found = bulk(archive, tmp_path / "out", "--model", str(wrong))
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert f"maxwhisper: error: {wrong}: " in found.stderr
