"""python -m reference.perf.bulk: what `maxwhisper bulk` needs for an hour of audio, and so for an archive.

Copies of the fixture's two long recordings, each with a name of its own, are transcribed as users would have it. What
is measured: the run, the model's time, the decoding of audio, the memory of the process that holds the model, and the
lines of JSON; Parquet of copies would be smaller than that of an archive. What Ray takes to start and stop is in the
time of the run alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from maxwhisper.compare.run import machine

from ..fixtures import FIXTURES, NANO

CLIPS = [FIXTURES / "clips" / name for name in ("english-longer.ogg", "english-long.mp3")]


def main() -> None:
    """Measures, prints the figures, and writes them to `--json`."""
    parser = argparse.ArgumentParser("python -m reference.perf.bulk", description="Measure `maxwhisper bulk`.")
    parser.add_argument("--model", default=str(NANO), help="as of bulk (default: the trained fixture)")
    parser.add_argument("--copies", type=int, default=20, help="of 161 s of audio (default: 20)")
    parser.add_argument("--archive_hours", type=int, default=100_000, help="to reckon for (default: 100000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive, output = Path(folder, "archive"), Path(folder, "output")
        archive.mkdir()
        for copy in range(options.copies):
            for clip in CLIPS:
                shutil.copy(clip, archive / f"{copy:04}-{clip.name}")
        seconds, memory = timed(archive, output, options.model)
        figures = of_hours(output, seconds, memory)
    figures |= reckoned(figures, options.archive_hours)
    figures = {"machine": machine(), "model": Path(options.model).name} | figures
    for name, value in figures.items():
        print(f"{name:44} {value:.3f}" if isinstance(value, float) else f"{name:44} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def timed(archive: Path, output: Path, model: str) -> tuple[float, int]:
    """Runs the command, and returns its seconds, and the most memory that the process with the model has held."""
    command = [sys.executable, "-m", "maxwhisper", "bulk", str(archive), str(output), "--model", model]
    start, most = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            most = max(most, held_by_actors(psutil.Process(process.pid)))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, most


def held_by_actors(process: psutil.Process) -> int:
    most = 0
    try:
        for child in process.children(recursive=True):
            if "Transcriber" in " ".join(child.cmdline()):
                most = max(most, child.memory_full_info().uss)  # what is shared is Ray's, of all its processes
    except psutil.Error:  # one that has ended meanwhile
        pass
    return most


def of_hours(output: Path, seconds: float, memory: int) -> dict[str, Any]:
    """Returns what the rows say of an hour of audio."""
    rows = pq.read_table(output / "transcripts.parquet").to_pylist()
    if wrong := [row["error"] for row in rows if row["error"]]:
        raise SystemExit(wrong[0])
    audio, model, decoding = (
        sum(row[name] for row in rows) for name in ("duration", "transcribe_seconds", "decode_seconds")
    )
    hours = audio / 3600
    return {
        "files": len(rows),
        "hours of audio": hours,
        "seconds of the run": seconds,
        "seconds without the model": seconds - model,
        "times real time, all": audio / seconds,
        "times real time, the model": audio / model,
        "seconds of a core to decode an hour": decoding / hours,
        "memory of an actor, MB": memory / 1e6,
        "transcripts.jsonl, kB an hour": (output / "transcripts.jsonl").stat().st_size / hours / 1e3,
    }


def reckoned(figures: dict[str, Any], hours: int) -> dict[str, Any]:
    """Returns what an archive needs by these figures."""
    return {
        f"{hours} h: hours of an actor": hours / figures["times real time, the model"],
        f"{hours} h: hours of a core to decode": hours * figures["seconds of a core to decode an hour"] / 3600,
        f"{hours} h: transcripts.jsonl, GB": hours * figures["transcripts.jsonl, kB an hour"] / 1e6,
    }


if __name__ == "__main__":
    main()
