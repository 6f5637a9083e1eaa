"""The command line: OpenAI's options and files, and one line on standard error for whatever goes wrong."""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import whisper

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.cli.outputs import FORMATS
from maxwhisper.cli.terminal import messages_on_stderr
from maxwhisper.compare import material
from maxwhisper.engine import session
from reference.fixtures import NANO, ROOT

from .command import CLIP, RESULT, StubModel, assert_one_line, status, write_wav


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> StubModel:
    stub = StubModel()
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: stub)
    return stub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def write_float_wav(path: Path, samples: np.ndarray) -> Path:
    data = samples.astype("<f4").tobytes()
    rate = 16000
    header = (3).to_bytes(2, "little") + (1).to_bytes(2, "little") + rate.to_bytes(4, "little")
    header += (4 * rate).to_bytes(4, "little") + (4).to_bytes(2, "little") + (32).to_bytes(2, "little")
    body = b"WAVEfmt " + len(header).to_bytes(4, "little") + header + b"data" + len(data).to_bytes(4, "little") + data
    path.write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    return path


# ---- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--temperature", "0.4", "--temperature_increment_on_fallback", "0.3", "--beam_size", "None"],
        ["--temperature_increment_on_fallback", "None", "--language", "German", "--verbose", "False"],
        ["--word_timestamps", "True", "--highlight_words", "True", "--max_line_width", "3", "--max_line_count", "1"],
    ],
)
def test_options_reach_the_model_and_files_are_as_openais_command_has_them(
    options: list[str], tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[dict[str, Any]] = []

    def record(_: Any, audio: str, **options: Any) -> dict[str, Any]:
        passed.append(options)
        return RESULT

    theirs = importlib.import_module("whisper.transcribe")
    monkeypatch.setattr(theirs, "transcribe", record)
    monkeypatch.setattr(whisper, "load_model", lambda *_, **__: None)
    expected = tmp_path / "expected"
    monkeypatch.setattr(sys, "argv", ["whisper", str(CLIP), "-o", str(expected), *options])
    theirs.cli()

    assert status(["transcribe", CLIP, "-o", out, *options]) == 0
    del passed[0]["fp16"]
    theirs_and_ours = {"temperature": tuple(passed[0]["temperature"]), "hotwords": None, "vad_filter": False}
    assert [unshown(call) for call in model.calls] == [passed[0] | theirs_and_ours]
    assert sorted(file.name for file in out.iterdir()) == sorted(f"{CLIP.stem}.{ending}" for ending in FORMATS)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in expected.iterdir()
    }


def unshown(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options without what the progress is shown by."""
    return {name: value for name, value in options.items() if name != "progress"}


def test_one_format(out: Path, model: StubModel) -> None:
    assert status(["transcribe", CLIP, "-o", out, "-f", "json"]) == 0
    assert [file.name for file in out.iterdir()] == [f"{CLIP.stem}.json"]
    assert json.loads((out / f"{CLIP.stem}.json").read_text()) == RESULT


def test_an_existing_file_is_replaced(out: Path, model: StubModel) -> None:
    out.mkdir()
    (out / f"{CLIP.stem}.txt").write_text("old")
    assert status(["transcribe", CLIP, "-o", out, "-f", "txt"]) == 0
    assert (out / f"{CLIP.stem}.txt").read_text() == "Hello there.\n"


def test_output_files_have_the_usual_permissions(out: Path, model: StubModel, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    assert status(["transcribe", CLIP, "-o", out, "-f", "txt"]) == 0
    assert (out / f"{CLIP.stem}.txt").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_one_bad_file_does_not_stop_the_others(
    tmp_path: Path, out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [write_wav(tmp_path / f"{name}.wav", 1600) for name in "ac"]
    assert status(["transcribe", good[0], tmp_path / "b.wav", good[1], "-o", out, "-f", "txt"]) == 1
    assert sorted(file.name for file in out.iterdir()) == ["a.txt", "c.txt"]
    assert_one_line(capsys, "b.wav")


def test_a_full_disk_leaves_no_partial_file(
    out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any, result: Any, file: Any, **_: Any) -> None:
        file.write("half of ")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("whisper.utils.WriteTSV.write_result", fail)
    assert status(["transcribe", CLIP, "-o", out]) == 1
    assert_one_line(capsys, f"{CLIP.stem}.tsv: cannot be written: No space left on device")
    assert sorted(os.listdir(out)) == sorted(f"{CLIP.stem}.{ending}" for ending in FORMATS if ending != "tsv")


def test_a_failure_of_another_kind_names_file_and_kind(
    out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(model, "transcribe", fail)
    assert status(["transcribe", CLIP, "-o", out]) == 1
    assert_one_line(capsys, f"{CLIP}: RuntimeError: two lines")


def test_warnings_are_one_line_each(
    out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(*_: Any, **__: Any) -> dict[str, Any]:
        warnings.warn("packets\nleft out", RuntimeWarning, stacklevel=1)
        return RESULT

    monkeypatch.setattr(model, "transcribe", warn)
    assert status(["transcribe", CLIP, "-o", out, "-f", "txt"]) == 0
    assert capsys.readouterr().err == "maxwhisper: warning: packets left out\n"


def test_a_progress_bar_of_all_files(
    tmp_path: Path, out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_wav(tmp_path / f"{name}.wav", 16000 * seconds) for name, seconds in (("a", 3), ("b", 5))]

    def transcribe(audio: np.ndarray, progress: Callable[[float], None], **_: Any) -> dict[str, Any]:
        progress(len(audio) / 16000)
        return RESULT

    model.transcribe = transcribe  # type: ignore[method-assign]
    assert status(["transcribe", *files, "-o", out, "-f", "txt", "--verbose", "False"]) == 0
    last = capsys.readouterr().err.strip().splitlines()[-1].split("\r")[-1]
    assert "100%" in last and "8 of 8 s" in last and "x real time" in last and last.endswith("left")


@pytest.mark.parametrize("how", [["--batch_size", "2"], ["--batched"]])
def test_files_that_advance_together_are_printed_one_after_the_other(
    how: list[str], tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def many(model: Any, audio: list[Any], batch_size: int, **options: Any) -> Any:
        calls.append(options)
        return ((i, RESULT) for i in reversed(range(len(audio))))

    def batched(model: Any, audio: np.ndarray, batch_size: int, **options: Any) -> dict[str, Any]:
        calls.append(options)
        return RESULT

    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: StubModel())
    monkeypatch.setattr("maxwhisper.scheduling.transcribe_many", many)
    monkeypatch.setattr("maxwhisper.batched.transcribe_batched", batched)
    files = [write_wav(tmp_path / f"{name}.wav", 1600) for name in ("a", "b\nc")]
    assert status(["transcribe", *files, "-o", out, "-f", "txt", *how]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[::2]) == [f"{files[0]}:", f"{files[1]}:".replace("\n", " ")]
    assert lines[1::2] == ["[00:00.000 --> 00:01.500]  Hello there."] * 2
    assert all(call["verbose"] is None for call in calls)
    assert sorted(file.name for file in out.iterdir()) == ["a.txt", "b\nc.txt"]


@pytest.mark.parametrize("how", ["--batched", "--vad_filter=True"])
def test_clips_and_cutting_at_silences_exclude_each_other(
    how: str, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["transcribe", CLIP, "-o", out, how, "--clip_timestamps", "1,2"]) == 2
    assert_one_line(capsys, f"--clip_timestamps: cannot be combined with {how.replace('=', ' ')}")
    assert not model.calls and not out.exists()
    monkeypatch.setattr("maxwhisper.batched.probabilities", lambda audio: np.zeros(len(audio) // 512))
    monkeypatch.setattr(model, "transcribe_many", lambda *_, **__: [], raising=False)
    for everything in ("0.0", ""):
        assert status(["transcribe", CLIP, "-o", out, how, "--clip_timestamps", everything]) == 0


def test_english_only_models_take_english(out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.is_multilingual = False
    assert status(["transcribe", CLIP, "-o", out, "-f", "txt", "--language", "German", "--task", "translate"]) == 0
    assert (model.calls[0]["language"], model.calls[0]["task"]) == ("en", "transcribe")
    said = capsys.readouterr().err
    assert "--language German is not used" in said and "--task translate is not used" in said


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_messages_come_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a library has given the root logger a handler, as MAX does while it compiles."""
    root = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(root)
    try:
        with messages_on_stderr():
            logging.getLogger("maxwhisper").info("compiling")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err == "maxwhisper: compiling\n"


def text_file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


BAD_AUDIO: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "missing.wav", "missing.wav"),
    "folder": (lambda folder: folder, "cannot be read"),
    "empty": (lambda folder: text_file(folder, "empty.wav", ""), "empty.wav"),
    "no name": (lambda folder: "", "error: '': cannot be read as audio: no name"),
    "nul": (lambda folder: f"{CLIP}\0", "cannot be read as audio: no name"),  # before which libav would end it
    "text": (lambda folder: text_file(folder, "text.wav", "This is no audio.\n" * 100), "text.wav"),
    "no samples": (lambda folder: write_wav(folder / "nothing.wav", 0), "no audio samples"),
    "nan": (lambda folder: write_float_wav(folder / "nan.wav", np.full(16000, np.nan)), "not finite"),
}


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_bad_audio(kind: str, tmp_path: Path, out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = BAD_AUDIO[kind]
    assert status(["transcribe", make(tmp_path), "-o", out]) == 1
    assert_one_line(capsys, expected)
    assert not list(out.iterdir())


def truncated(folder: Path) -> Path:
    path = folder / "truncated.pt"
    path.write_bytes(NANO.read_bytes()[:100_000])
    return path


# The values of --model and --device, the exit status, and a part of the message.
BAD_MODELS: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "unknown": (lambda _: ["--model", "enormous"], "enormous"),
    "truncated": (lambda folder: ["--model", truncated(folder)], "truncated.pt"),
    "no GPU": (lambda _: ["--model", NANO, "--device", "gpu"], "no GPU"),
    "no CUDA": (lambda _: ["--model", NANO, "--device", "cuda"], "no GPU"),
    "no CUDA of PyTorch's name": (lambda _: ["--model", NANO, "--device", "cuda:0"], "no GPU"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models_and_devices(
    kind: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "accelerator_count", lambda: 0)
    make, expected = BAD_MODELS[kind]
    assert status(["transcribe", CLIP, "-o", out, *make(tmp_path)]) == 1
    assert_one_line(capsys, expected)
    assert not list(out.iterdir())


def test_device_auto(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU where there is one, which this one is not: it is looked for in vain then."""
    monkeypatch.setattr(session, "accelerator_count", lambda: 0)
    arguments = ["transcribe", CLIP, "-o", out, "-f", "txt", "--model", NANO, "--device", "auto"]
    assert status(arguments) == 0 and list(out.iterdir())
    monkeypatch.setattr(session, "gpu_found", lambda: True)
    assert status(arguments) == 1
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--language", "Klingon"),
        ("--device", "tpu"),
        ("--output_format", "pdf"),
        ("--verbose", "yes"),
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--temperature_increment_on_fallback", "0"),
        ("--beam_size", "0"),
        ("--best_of", "-1"),
        ("--patience", "0"),
        ("--length_penalty", "1.5"),
        ("--threads", "-1"),
        ("--batch_size", "0"),
        ("--clip_timestamps", "0,soon"),
        ("--suppress_tokens", "a"),
        ("--max_line_width", "40"),
        ("--highlight_words", "True"),
    ],
)
def test_unusable_options(
    option: str, value: str, out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["transcribe", CLIP, "-o", out, f"{option}={value}"]) == 2
    assert_one_line(capsys, option)
    assert not model.calls and not out.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["transcribe"], ["transcribe", CLIP, "--loud"], ["convert", "a.pt"], ["fly"]]
)
def test_unusable_commands(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(arguments) == 2
    assert_one_line(capsys, "")


def test_two_files_for_one_output(out: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["transcribe", "a/talk.mp3", "b/talk.wav", "-o", out]) == 2
    assert_one_line(capsys, "'talk'")


def test_unwritable_output_folder(tmp_path: Path, model: StubModel, capsys: pytest.CaptureFixture[str]) -> None:
    folder = text_file(tmp_path, "file", "") / "below"
    assert status(["transcribe", CLIP, "-o", folder]) == 1
    assert_one_line(capsys, str(folder))
    assert not model.calls


def test_convert_of_a_bad_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["convert", truncated(tmp_path), tmp_path / "out.safetensors"]) == 1
    assert_one_line(capsys, "truncated.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["truncated.pt"]


def test_convert_names_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "nano.safetensors"
    assert status(["convert", NANO, target]) == 0
    assert capsys.readouterr().out == f"{target}\n" and target.is_file()


# ---- interruptions -------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_complete(
    tmp_path: Path, out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transcribe = model.transcribe

    def interrupted(audio: np.ndarray, **options: Any) -> dict[str, Any]:
        if model.calls:
            raise KeyboardInterrupt
        return transcribe(audio, **options)

    monkeypatch.setattr(model, "transcribe", interrupted)
    files = [write_wav(tmp_path / f"{name}.wav", 1600) for name in "abc"]
    assert status(["transcribe", *files, "-o", out, "-f", "txt"]) == 130
    assert capsys.readouterr().err == "maxwhisper: interrupted\n"
    assert [file.name for file in out.iterdir()] == ["a.txt"]


def test_ctrl_c_while_writing_leaves_nothing(
    out: Path, model: StubModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Any, result: Any, file: Any, **_: Any) -> None:
        file.write("half of ")
        raise KeyboardInterrupt

    monkeypatch.setattr("whisper.utils.WriteTSV.write_result", interrupted)
    assert status(["transcribe", CLIP, "-o", out]) == 130
    assert capsys.readouterr().err == "maxwhisper: interrupted\n"
    assert not list(out.iterdir())


SCRIPT = """
import sys, time
from maxwhisper import cli, whisper
from tests.unit.command import StubModel

class Model(StubModel):
    def transcribe(self, audio, **options):
        self.calls.append(options)
        print("ready", flush=True)
        if len(self.calls) == 1:
            time.sleep(600)
        for _ in range(100_000):
            print("text")
        return {result}

model = Model()
whisper.load_model = lambda *_, **__: model
interrupted, closed = (cli.main(["transcribe", "fixtures/clips/english-1.wav", "-o", out]) for out in sys.argv[1:])
sys.exit(interrupted if closed == 1 else closed)
"""


def test_sigint_and_closed_standard_output(tmp_path: Path) -> None:
    """One process has both, in which nothing is written of what is interrupted, and all behind a closed output."""
    interrupted, closed = tmp_path / "interrupted", tmp_path / "closed"
    command = [sys.executable, "-c", SCRIPT.format(result=RESULT), str(interrupted), str(closed)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        error = process.stderr.read()
    assert error == "maxwhisper: interrupted\nmaxwhisper: error: standard output was closed\n"
    assert process.returncode == 130
    assert not os.listdir(interrupted)
    assert sorted(os.listdir(closed)) == sorted(f"{CLIP.stem}.{ending}" for ending in FORMATS)


def test_random_weights_are_compiled_as_they_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAXWHISPER_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(material.SIZES, "tiny", material.dimensions(80, 51865, 64, 1, 1))
    asked = Mock()
    monkeypatch.setattr("maxwhisper.whisper.compile_model", asked)
    command = ["compile", "--model", "random:tiny", "--target", "sm_90a", "--dtype", "float16", "--out", "DIR"]
    assert status(command) == 0
    (file, *others), _ = asked.call_args
    assert others == ["sm_90a", "DIR", None, "float16"]
    assert load_checkpoint(file).dims == material.SIZES["tiny"]
    assert material.stored_model("random:tiny") == Path(file)
    assert status(["compile", "--model", "random:huge", "--target", "host", "--out", "DIR"]) == 1
    assert "random weights are of tiny" in capsys.readouterr().err
