"""Archives to transcribe, `maxwhisper bulk` in a process of its own, and what its output must be."""

import json
import os
import subprocess
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maxwhisper.audio import SAMPLE_RATE, load_audio
from maxwhisper.bulk.inputs import identify
from maxwhisper.bulk.stages import decode
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES, NANO, ROOT

from .conftest import SPOKEN

OPTIONS = ("--word_timestamps", "True", "--temperature_increment_on_fallback", "None")
"""Without tokens drawn at random, in which two runs differ."""
ALONE: dict[str, Any] = {"word_timestamps": True, "temperature": 0.0, "beam_size": 5, "best_of": 5}
"""The same for `Whisper.transcribe`."""
BAD = 10

FAULTY = """
import os, sys
import ray
hook = {"worker_process_setup_hook": "tests.unit.bulk_faults.%s", "env_vars": {"PYTHONPATH": os.getcwd()}}
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=hook)
from maxwhisper.cli import main
sys.exit(main(sys.argv[1:]))
"""


def short_files(folder: Path, number: int) -> list[Path]:
    """Writes as many files: the short clips, pieces of them, and ten that cannot be decoded, each for another reason
    or in another place."""
    folder.mkdir()
    clips = [FIXTURES / clip["file"] for clip in SPOKEN if clip["duration"] < 15]
    for clip in clips[: number - BAD]:
        (folder / clip.name).write_bytes(clip.read_bytes())
    for piece in range(number - BAD - min(len(clips), number - BAD)):
        samples = load_audio(clips[piece % len(clips)])
        start = piece * 4_000 % max(len(samples) - SAMPLE_RATE, 1)
        write_wav(folder / f"piece-{piece:03}.wav", samples[start : start + SAMPLE_RATE + 200 * piece])
    broken = [b"", b"no audio at all", clips[0].read_bytes()[:20], os.urandom(4096), b"RIFF\0\0\0\0WAVE"]
    for each in range(BAD):
        (folder / f"{'abcdefghij'[each]}-bad.{'mp3' if each % 2 else 'wav'}").write_bytes(broken[each % len(broken)])
    return sorted(folder.iterdir())


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32768).astype(np.int16).tobytes())


def command(source: object, output: object, *options: str, faulty: str | None = None) -> list[str]:
    """Returns the command, or a program that is it with a fault of `bulk_faults` in Ray's processes."""
    program = ["-c", FAULTY % faulty] if faulty else ["-m", "maxwhisper"]
    return [sys.executable, *program, "bulk", str(source), str(output), "--model", str(NANO), *options]


def bulk(source: object, output: object, *options: str, faulty: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    return subprocess.run(
        command(source, output, *options, faulty=faulty), capture_output=True, text=True, cwd=ROOT, timeout=900
    )


def decoded(*inputs: tuple[str | None, bytes | None]) -> list[dict[str, Any]]:
    """Returns what is decoded of names and bytes, in this process."""
    paths, contents = zip(*inputs, strict=True)
    table = pa.table({"path": pa.array(paths, pa.string()), "bytes": pa.array(contents, pa.binary())})
    return [row for found in decode(table) for row in found.to_pylist()]


def lone_runs(model: Whisper, files: Sequence[Path], **options: Any) -> dict[str, dict[str, Any] | None]:
    """Returns the transcript of each file, transcribed alone; None of those that cannot be decoded."""
    return {str(file): None if "-bad." in file.name else model.transcribe(file, **options) for file in files}


def transcripts(output: Path) -> list[dict[str, Any]]:
    """Returns the rows of the output, which are the same in both of its files."""
    rows: list[dict[str, Any]] = pq.read_table(output / "transcripts.parquet").to_pylist()
    lines = (output / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    return rows


def assert_each_once(output: Path, expected: dict[str, dict[str, Any] | None]) -> None:
    """Fails unless each file has one row, with the transcript of its lone run or an error."""
    rows = transcripts(output)
    assert sorted(row["path"] for row in rows) == sorted(expected)
    for row in rows:
        assert row["id"] == identify(row["path"], None)
        alone = expected[row["path"]]
        assert (row["error"] is None) == (alone is not None), row
        if alone is None:
            assert row["path"] in row["error"] and row["text"] is None and row["duration"] is None
        else:
            assert result_of(row) == alone


def result_of(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what `transcribe` returned for a row."""
    segments = [dict(segment) for segment in row["segments"]]
    for segment in segments if row["words"] is not None else []:
        words = [dict(word) for word in row["words"] if word["segment"] == segment["id"]]
        segment["words"] = [{name: word[name] for name in word if name != "segment"} for word in words]
    return {"text": row["text"], "segments": segments, "language": row["language"]}
