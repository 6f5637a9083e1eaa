"""`maxwhisper bulk` without Ray's processes: what it writes, what is left of a run that was killed."""

# ruff: noqa: E402 - what is imported below the skips is installed by the extra

import errno
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError

from maxwhisper.audio import load_audio
from maxwhisper.bulk import job, stages
from maxwhisper.bulk.filesystems import appearing
from maxwhisper.bulk.parts import Parts, Totals
from maxwhisper.bulk.rows import ROW, for_json, row_of
from maxwhisper.errors import AudioError, CheckpointError, MaxWhisperError, OptionError
from reference.fixtures import FIXTURES

from .bulk import decoded
from .command import CLIP, RESULT, StubModel, status, write_wav

# ---- parts ---------------------------------------------------------------------------------------------------------


def rows(*ids: str, **columns: Any) -> pa.Table:
    return pa.Table.from_pylist([dict.fromkeys(ROW.names) | {"id": each} | columns for each in ids], ROW)


def put(parts: Parts, part: str, *ids: str, commit: bool = True, **columns: Any) -> None:
    """Writes a part as Ray does."""
    pending = Path(parts.checkpoint, f"{part}.pending.parquet")
    pq.write_table(pa.table({"id": ids}), pending)
    pq.write_table(rows(*ids, **columns), parts.rows_of(part))
    if commit:
        pending.rename(parts.ids_of(part))


def again(parts: Parts, part: str) -> None:
    """Leaves a part as a write does that was committed, tried again, and killed before it was committed again."""
    pq.write_table(pa.table({"id": ["b"]}), Path(parts.checkpoint, f"{part}.pending.parquet"))


def cut(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-9])


BROKEN: dict[str, Callable[[Parts, str], Any]] = {
    "rows that were not committed": lambda parts, part: Path(parts.ids_of(part)).rename(
        Path(parts.checkpoint, f"{part}.pending.parquet")
    ),
    "rows that were committed and written again": again,
    "rows without ids": lambda parts, part: Path(parts.ids_of(part)).unlink(),
    "ids without rows": lambda parts, part: Path(parts.rows_of(part)).unlink(),
    "rows that are cut off": lambda parts, part: cut(parts.rows_of(part)),
    "ids that are cut off": lambda parts, part: cut(parts.ids_of(part)),
    "rows of other ids": lambda parts, part: pq.write_table(rows("b", "c"), parts.rows_of(part)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_not_whole_is_taken_away(broken: str, tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    put(parts, "run_000001", "a")
    put(parts, "run_0000011", "b")  # its name begins as the other's does
    BROKEN[broken](parts, "run_0000011")
    parts.mend()
    assert parts.names(parts.rows) == ["run_000001-0.parquet"]
    assert parts.names(parts.checkpoint) == ["run_000001.parquet"]
    assert parts.committed() == ["run_000001"]


def test_a_part_whose_name_begins_another_s(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    put(parts, "run_100000", "a", commit=False)
    put(parts, "run_1000001", "b")
    parts.mend()
    assert parts.committed() == ["run_1000001"] and parts.is_whole("run_1000001")


def test_each_id_is_taken_once(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    put(parts, "1", "a", "b", duration=3600.0, transcribe_seconds=60.0)
    put(parts, "2", "b", "c", "c", duration=1800.0, transcribe_seconds=30.0, text="ü")
    put(parts, "3", "d", error="broken")
    put(parts, "4", "e", commit=False)
    totals = parts.finish({"1"}, set("abcd"))
    assert (totals.rows, totals.errors, totals.audio, totals.model) == (4, 1, 1800.0, 30.0)
    written = pq.read_table(tmp_path / "transcripts.parquet")
    assert written.schema == ROW and written["id"].to_pylist() == ["a", "b", "c", "d"]
    lines = (tmp_path / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == written.to_pylist() and '"text": "ü"' in lines[2]


def test_rows_with_errors_that_may_pass_are_taken_away(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    put(parts, "1", "a", "b")
    put(parts, "2", "c", error="lost", transient=True)
    mixed = pa.concat_tables([rows("d", text="kept"), rows("e", error="lost", transient=True)])
    put(parts, "3", "d", "e")
    pq.write_table(mixed, parts.rows_of("3"))
    assert parts.finish(set(), None) == Totals(rows=5, errors=2, transient=2)
    earlier = [name for name in ROW.names if name != "transient"]
    pq.write_table(rows("a", "b").select(earlier), parts.rows_of("1"))
    parts.retry()
    assert parts.committed() == ["1", "3"] and all(map(parts.is_whole, parts.committed()))
    assert parts.finish(set(), set("abd")) == Totals(rows=3)
    assert pq.read_table(tmp_path / "transcripts.parquet")["text"].to_pylist() == [None, None, "kept"]


HOLD = """
import sys, time
from maxwhisper.bulk.parts import Parts
with Parts(sys.argv[1]).locked():
    print("locked", flush=True)
    time.sleep(600)
"""


def test_two_commands_do_not_write_to_one_folder(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", 1)
    workers, output = job.Workers(1, 1, 1, 0, None, None), tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout and other.stdout.readline() == "locked\n"
            with pytest.raises(OptionError, match=f"OUTPUT {output}: another `maxwhisper bulk` is writing there"):
                job.run(f"{tmp_path}/a.wav", str(output), Model, {}, {}, workers)  # type: ignore[arg-type]
            assert not (output / "parts" / "settings.json").exists()
        finally:
            other.kill()
    with Parts(str(output)).locked():
        pass


def test_a_folder_that_cannot_be_locked_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with Parts(str(tmp_path)).locked(), Parts("memory://texts").locked():
        assert f"OUTPUT {tmp_path}: cannot be locked: No locks available" in caplog.text


def test_nothing_appears_while_an_input_is_missing(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    put(parts, "1", "a")
    with pytest.raises(MaxWhisperError, match="1 inputs have no row: run the command again"):
        parts.finish(set(), {"a", "z"})
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_an_output_of_other_options_is_refused(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    parts.claim({"model": "tyni", "language": None, "temperature": 0})
    parts.claim({"model": "tiny", "language": None, "temperature": 0})
    put(parts, "1", "a")
    parts.claim({"model": "tiny", "language": None, "temperature": 0, "newer": 1})
    with pytest.raises(OptionError, match=f"OUTPUT {tmp_path}: was begun with --language None, not de: give that"):
        parts.claim({"model": "tiny", "language": "de", "temperature": 0})


def test_an_output_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="OUTPUT .*file: cannot be written to: Not a directory"):
        Parts(str(tmp_path / "file"))
    parts = Parts(str(tmp_path))
    put(parts, "1", "a", commit=False)
    Path(parts.rows_of("1")).unlink()
    Path(parts.rows_of("1")).mkdir()  # as little to be removed, for root too, as in a folder that is read-only
    with pytest.raises(OptionError, match=f"OUTPUT {tmp_path}: cannot be written to: Is a directory"):
        parts.mend()


@pytest.mark.parametrize("content", ["", "[1]"])
def test_settings_that_are_damaged(content: str, tmp_path: Path) -> None:
    parts = Parts(str(tmp_path))
    put(parts, "1", "a")
    (tmp_path / "parts" / "settings.json").write_text(content)
    with pytest.raises(OptionError, match=f"OUTPUT {tmp_path}: parts/settings.json cannot be read: "):
        parts.claim({"model": "tiny"})


@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_file_is_whole_or_not_there(where: str, tmp_path: Path) -> None:
    system = fsspec.filesystem("file" if where == "disk" else "memory")
    path = f"{tmp_path}/x" if where == "disk" else "/whole/x"
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    with pytest.raises(OSError, match="full"), appearing(system, path) as [file]:
        file.write(b"half")
        raise OSError("full")
    assert not system.exists(path)
    with appearing(system, path) as [file]:
        file.write(b"all")
    assert system.cat_file(path) == b"all" and len(system.ls(path.rpartition("/")[0])) == 1


# ---- stages --------------------------------------------------------------------------------------------------------


def test_samples_pass_unchanged() -> None:
    clip = FIXTURES / "clips" / "english-3.mp3"
    fsspec.filesystem("memory").pipe_file("/calls/x.mp3", clip.read_bytes())
    for path, content in ((str(clip), None), ("memory://calls/x.mp3", None), ("x", clip.read_bytes())):
        [row] = decoded((path, content))
        samples = np.frombuffer(row["audio"], np.int16).astype(np.float32) / 32768
        np.testing.assert_array_equal(samples, load_audio(clip), err_msg=f"{path}")
        assert row["error"] is None and row["decode_seconds"] > 0


def test_what_cannot_be_decoded_is_a_row(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.wav")
    found = decoded((missing, None), ("memory://missing", None), ("x", b"no audio"), (None, None), (str(CLIP), None))
    assert [row["audio"] is None for row in found] == [True] * 4 + [False]
    expected = ["missing.wav: cannot be read", "FileNotFoundError", "x: cannot be read", "neither path nor bytes"]
    for row, error in zip(found, expected, strict=False):
        assert error in row["error"]


def test_warnings_are_kept_with_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: str) -> np.ndarray:
        warnings.warn("damaged", stacklevel=1)
        return np.zeros(1, np.float32)

    monkeypatch.setattr(stages, "load_audio", damaged)
    warnings.simplefilter("ignore")  # as Python's own filters do what was said before
    assert [row["warnings"] for row in decoded(("a", None), ("a", None))] == [["damaged"], ["damaged"]]


def test_what_the_machine_lacks_is_no_file_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(path: str, mode: str) -> Any:
        raise ImportError("s3fs")

    monkeypatch.setattr(fsspec, "open", without)
    with pytest.raises(ImportError, match="s3fs"):
        decoded(("s3://bucket/a.wav", None))


class Model(StubModel):
    """Fails for recordings of one sample and of two, each in its way."""

    def transcribe(self, audio: np.ndarray, **options: Any) -> dict[str, Any]:
        if len(audio) < 3:
            raise (AudioError("too short"), ZeroDivisionError("a defect"))[len(audio) - 1]
        return super().transcribe(audio, **options) | {"segments": [segment(len(audio))]}


def segment(seek: int) -> dict[str, Any]:
    found = {"id": 0, "seek": seek, "start": 0.0, "end": 1.5, "text": " Hello there.", "tokens": [1, 2]}
    probable = {"temperature": 0.0, "avg_logprob": -0.5, "compression_ratio": 1.0, "no_speech_prob": float("nan")}
    return found | probable | {"words": RESULT["segments"][0]["words"]}


def table(*lengths: int | None) -> pa.Table:
    audio = [None if length is None else bytes(2 * length) for length in lengths]
    errors = ["cannot be read" if length is None else None for length in lengths]
    known = {"warnings": [], "decode_seconds": 0.5}
    listed = [
        {"id": str(n), "path": f"{n}.wav", "audio": a, "error": e} | known
        for n, (a, e) in enumerate(zip(audio, errors, strict=True))
    ]
    return pa.Table.from_pylist(listed, stages.AUDIO)


def test_every_input_gets_its_row() -> None:
    transcriber = stages.Transcriber(Model, {"language": None}, 1)  # type: ignore[arg-type]
    found = transcriber(table(32_000, None, 1, 2, 16_000))
    assert found.schema == ROW
    rows = found.to_pylist()
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["error"] for row in rows] == [None, "cannot be read", "too short", "ZeroDivisionError: a defect", None]
    assert [row["text"] for row in rows] == [" Hello there.", None, None, None, " Hello there."]
    assert [row["duration"] for row in rows] == [2.0, None, 1 / 16000, 2 / 16000, 1.0]
    assert rows[0]["segments"][0]["seek"] == 32_000 and rows[4]["segments"][0]["seek"] == 16_000
    assert rows[0]["words"] == [{"segment": 0, **RESULT["segments"][0]["words"][0]}]
    assert rows[0]["transcribe_seconds"] == 2 * rows[4]["transcribe_seconds"]


def test_a_model_of_english_only_is_not_asked_for_a_language() -> None:
    model = Model()
    model.is_multilingual = False
    stages.Transcriber(lambda: model, {"language": None}, 1)(table(3))  # type: ignore[arg-type, return-value]
    assert model.calls == [{"language": "en"}]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"language": "German"}, "--language German: the model knows English only"),
        ({"task": "translate"}, "--task translate: the model knows English only"),
        ({"initial_prompt": "word " * 301}, "--initial_prompt has 301 tokens, of which the last 223 are used"),
        ({"hotwords": "word " * 302}, "--hotwords has 302 tokens, of which the first 223 are used"),
    ],
)
def test_options_that_a_model_cannot_follow_end_the_job(options: dict[str, Any], said: str) -> None:
    model = Model()
    model.is_multilingual = False
    with pytest.raises(OptionError, match=f"^{said}"):
        stages.Transcriber(lambda: model, {"language": None, **options}, 1)(table(3))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("error", [OptionError("--patience"), MemoryError()])
def test_what_no_file_is_to_blame_for_ends_the_job(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "transcribe_many", lambda *_, **__: [(0, error)])
    with pytest.raises(type(error)):
        stages.Transcriber(Model, {}, 1)(table(3))  # type: ignore[arg-type]


def test_a_model_that_takes_nothing_more_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, audio: np.ndarray, **_: Any) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(Model, "transcribe", fail)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        stages.Transcriber(Model, {}, 1)(table(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [CheckpointError("x.pt: no checkpoint"), RuntimeError("out of memory")])
def test_a_model_that_does_not_load_says_so_once_it_is_needed(error: Exception) -> None:
    def load() -> Any:
        raise error

    transcriber = stages.Transcriber(load, {}, 1)
    with pytest.raises(type(error), match=str(error)):
        transcriber(table(3))


def test_rows_and_json() -> None:
    source = {"id": "1", "path": None, "warnings": [], "error": None, "decode_seconds": 0.1, "audio": b"", "more": 1}
    without_words = {name: value for name, value in segment(0).items() if name != "words"}
    row = row_of(source, 1.0, {"text": "", "language": "en", "segments": [without_words]})
    assert set(row) == set(ROW.names) and row["words"] is None
    assert for_json(row)["segments"][0] == without_words | {"no_speech_prob": None}


# ---- the job -------------------------------------------------------------------------------------------------------


def test_a_summary_says_what_there_is() -> None:
    totals = Totals(rows=200, errors=10, audio=7200.0, model=360.0)
    assert job.Summary(totals, 720.0).text() == (
        "200 files, 10 of them with errors; this run: 2.000 h of audio in 720 s, 10.0 x real time;"
        " 20.0 x while a model computes"
    )
    again = "2 files, 2 of them with errors, 1 of which may pass: the same command tries again; no audio was left"
    assert job.Summary(Totals(rows=2, errors=2, transient=1), 1.0).text().startswith(again)


def passed_on(error: Exception) -> Exception:
    """Returns an error as Ray raises it."""
    raised: Exception = RayTaskError("f", "a hundred lines", error).as_instanceof_cause()
    return raised


def test_a_failure_of_ours_is_what_it_was() -> None:
    error = CheckpointError("x.pt: no checkpoint\nFailed to apply UDF transform after 1/1 attempts")
    error.__cause__ = ValueError("of PyTorch's")
    with pytest.raises(CheckpointError) as found, job.failures("out"):
        raise passed_on(error)
    assert str(found.value) == "x.pt: no checkpoint"


def test_another_failure_is_one_line_about_its_cause() -> None:
    expected = r"OUTPUT out: stopped by OSError: \[Errno 28\] No space left on device; what is done stays"
    with pytest.raises(MaxWhisperError, match=expected), job.failures("out"):
        raise passed_on(OSError(28, "No space left on device"))


@pytest.mark.parametrize("output", ["what?", "two\nlines"])
def test_an_output_that_ray_would_not_find(output: str, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", 1)
    with pytest.raises(OptionError, match="(?s)/(what|two).* has '.*' in its name, with which Ray finds no file"):
        job.run(f"{tmp_path}/a.wav", f"{tmp_path}/{output}", Model, {}, {}, job.Workers(1, 1, 1, 0, None, None))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(job, "run", lambda *given: called.extend(given) or SimpleNamespace(text=lambda: "done"))
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "as it was")
    write_wav(tmp_path / "m.pt", 1)
    folders = ["--model_dir", "models", "--artifacts", "graphs"]
    assert status(["bulk", "in", "out", "--model", "m.pt", *folders, "--device", "gpu", "--memory_gb", "3"]) == 0
    source, output, load, options, settings, workers = called
    assert (source, output) == ("in", "out") and capsys.readouterr().out == "done\n"
    assert load.keywords["model"] == settings["model"] == str(tmp_path / "m.pt")
    assert load.keywords["model_dir"] == f"{tmp_path}/models" and load.keywords["artifacts"] == f"{tmp_path}/graphs"
    assert options["temperature"][0] == 0 and len(options["temperature"]) == 6 and options["beam_size"] == 5
    assert settings["temperature_increment_on_fallback"] == 0.2 and "device" not in settings
    assert workers == job.Workers(1, 4, 1, 1.0, 3, None)
    called.clear()
    (tmp_path / "tiny").mkdir()  # as OUTPUT
    assert status(["bulk", "in", "tiny", "--model", "tiny", "--hallucination_silence_threshold", "2"]) == 0
    assert "--hallucination_silence_threshold has no effect without --word_timestamps True" in capsys.readouterr().err
    assert called[2].keywords["model"] == called[4]["model"] == "tiny"
