"""`maxwhisper compare`: its table from known answers in the place of processes, and its options."""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from whisper.tokenizer import get_tokenizer

from maxwhisper.audio import load_audio
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.cli import main
from maxwhisper.compare import engines, run
from maxwhisper.compare.command import available
from maxwhisper.compare.engines import Spec, Task, missing
from maxwhisper.compare.engines import maxwhisper as maxwhisper_engine
from maxwhisper.compare.material import SIZES, Recording
from maxwhisper.compare.process import EngineError
from maxwhisper.compare.results import Results, Row
from maxwhisper.compare.scores import agreement, word_error_rate
from maxwhisper.compare.table import cells as figures
from maxwhisper.compare.table import table
from maxwhisper.compare.tokens import task_for
from maxwhisper.engine import session
from maxwhisper.errors import OptionError
from reference.fixtures import NANO

from .engines import CLIP, named


def test_the_batched_row_needs_a_detector_of_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(package: str) -> str:
        if package in ("silero-vad", "onnxruntime"):
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(engines, "version", without)
    assert missing(named("maxwhisper batched")) == ["silero-vad", "onnxruntime"]
    assert missing(named("faster-whisper batched")) == ["onnxruntime"]
    assert missing(named("maxwhisper")) == missing(named("faster-whisper float32")) == []


class StubWorker:
    """Answers at once: PyTorch Whisper says a b, the others the same, whisper.cpp says a c and fails if told to. On a
    GPU half of the time is the device's, which faster-whisper does not tell."""

    asked: list[tuple[str, str]] = []
    timed: set[str] = set()
    broken = ""

    def __init__(self, spec: Spec, _: Path, task: Task):
        self.name, self.spec, self.process = spec.name, spec, Mock()
        self.tells = task.device == "gpu" and spec.engine != "faster-whisper"

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        answer = self.answer(do, **arguments)
        if self.tells and do in ("encode", "generate"):
            answer["device_seconds"] = answer["seconds"] / 2
        return answer

    def answer(self, do: str, **arguments: Any) -> dict[str, Any]:
        if do == "transcribe":
            self.asked.append((self.name, arguments["language"]))
            if self.name == self.broken:
                raise EngineError("RuntimeError: no luck")
        text = " apples count" if self.name == "whisper.cpp" else " apples jump"
        tokens = [50364, *get_tokenizer(True).encode(text), 50400]
        answers: dict[str, dict[str, Any]] = {
            "language": {"language": "de"},
            "transcribe": {"pieces": [{"tokens": tokens, "seconds": 0.25}], "seconds": 0.5},
            "windows": {"tokens": tokens, "seconds": 0.5},
            "encode": {"seconds": 0.02},
            "memory": {"bytes": 123e6},
            "load": {"seconds": 1.25},
            "prepare": {},
        }
        if do in ("encode", "generate"):
            self.timed.add(self.name)
        if do == "generate":
            count = arguments["n_tokens"]
            return {"tokens": [1] * count, "seconds": 0.1 + 0.003 * count}
        return answers[do]

    def close(self) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StubWorker]]:
    monkeypatch.setattr(StubWorker, "asked", [])
    monkeypatch.setattr(StubWorker, "timed", set())
    monkeypatch.setattr(StubWorker, "broken", "")
    monkeypatch.setattr(run, "Worker", StubWorker)
    monkeypatch.setattr(run, "PAUSE", 0)
    monkeypatch.setattr(run, "missing", lambda spec: ["openvino"] if spec.engine == "openvino" else [])
    yield StubWorker


def compared(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = main(["compare", str(CLIP), "--model", str(NANO), *options])
    return status, capsys.readouterr().out


def cells(table: str, name: str) -> list[str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    [found] = [line for line in lines if line[0] == name]
    return found


def test_the_table(stub: type[StubWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("apples jump twice")
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"
    options = ("--text", str(text), "--json", str(report), "--plot", str(picture), "--rounds", "2")
    status, out = compared(capsys, "--against", "openai-whisper,whisper.cpp,openvino", *options)
    assert status == 0
    speed = f"{len(load_audio(CLIP)) / 16000 / 0.5:.1f}"
    same = ["1.25", "20.0", "3.00", "0.50", speed, "123", "4"]
    assert cells(out, "maxwhisper") == ["maxwhisper", *same, "100.00 %", "0.00 %", "33.33 %"]
    assert cells(out, "whisper.cpp")[8:] == ["50.00 %", "50.00 %", "66.67 %"]
    # Several windows at a time: there is no time of one.
    assert cells(out, "maxwhisper batched")[1:6] == ["1.25", "-", "-", "0.50", speed]
    assert stub.timed == {"maxwhisper", "maxwhisper bfloat16", "openai-whisper", "whisper.cpp"}
    assert "openvino float32: not installed: pip install openvino\n" in out
    assert "transformers" not in out.split("Given:")[0]
    # The reference first; then each engine's warm-up and its first round, in turn; then another one begins.
    order = [name for name, _ in stub.asked]
    rows = ["maxwhisper", "maxwhisper bfloat16", "maxwhisper batched", "openai-whisper", "whisper.cpp"]
    assert order == ["openai-whisper", *(name for name in rows for _ in range(2)), *rows[1:], rows[0]]
    assert {language for _, language in stub.asked} == {"de"}
    found = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    assert found["whisper.cpp"]["total_s"] == [0.5, 0.5] and found["whisper.cpp"]["texts"] == ["apples count"]
    assert found["openvino float32"]["total_s"] == [] and found["openvino float32"]["not_installed"] == ["openvino"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"text", "report.json", "picture.png"}


@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_the_table_of_a_gpu(
    device: str,
    stub: type[StubWorker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    probes: dict[str, dict[str, Any]] = {
        "driver": {"version": "580.1", "cuda": [13, 0]},
        "torch": {"version": "2.13", "cuda": "13.0", "gpus": [{"name": "NVIDIA Z1"}], "error": None},
    }
    monkeypatch.setattr(run, "ask", probes.get)
    monkeypatch.setattr(session, "gpu_found", lambda: True)
    monkeypatch.setattr(run, "find_device", {"gpu": Mock()}.get)
    report = tmp_path / "report.json"
    against = ["--against", "openai-whisper,faster-whisper"]
    status, out = compared(capsys, "--device", device, *against, "--rounds", "2", "--json", str(report))
    assert status == 0
    assert cells(out, "engine")[4:7] == ["encoder device ms", "device ms per token", "total s"]
    assert cells(out, "openai-whisper float16")[2:7] == ["20.0", "3.00", "10.0", "1.50", "0.50"]
    assert cells(out, "faster-whisper float16")[2:7] == ["20.0", "3.00", "-", "-", "0.50"]
    assert cells(out, "faster-whisper float16 batched")[2:7] == ["-", "-", "-", "-", "0.50"]
    assert "On one NVIDIA Z1, driver 580.1, PyTorch for CUDA 13.0." in out
    found = json.loads(report.read_text())
    assert found["options"]["device"] == "gpu"
    assert {"gpu": "NVIDIA Z1", "driver": "580.1", "cuda": "13.0"}.items() <= found["machine"].items()
    encoded = {row["name"]: row["encode_device_s"] for row in found["rows"]}
    assert encoded["maxwhisper"] == [0.01, 0.01] and encoded["faster-whisper float16"] == []
    probes["torch"] |= {"gpus": [], "error": "no luck"}
    assert main(["compare", str(CLIP), "--device", "gpu"]) == 1
    assert "PyTorch finds no GPU: no luck" in capsys.readouterr().err


def test_medians_are_shown_and_one_below_zero_is_noise() -> None:
    row = Row("x", "", {}, total_s=[1.0, 9.0, 0.5], encode_s=[0.02, 0.9, 0.01], token_s=[-0.001, 0.002, -0.003])
    assert figures(row, 10.0)[:5] == ["x", "-", "20.0", "-", "1.00"]


def test_every_recording_is_in_its_own_language(stub: type[StubWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stub.answer

    def answer(self: StubWorker, do: str, **arguments: Any) -> dict[str, Any]:
        if do == "language":
            return {"language": {"language-0": "de", "language-1": "en"}[Path(arguments["mel"]).stem]}
        return whole(self, do, **arguments)

    monkeypatch.setattr(stub, "answer", answer)
    two = [str(CLIP), str(CLIP)]
    found = run.compare(two, str(NANO), ["whisper.cpp"], device="cpu", batch_size=3, threads=1, rounds=1)
    assert found.options["batch_size"] == 3
    assert found.options["languages"] == ["de", "en"]
    assert [language for name, language in stub.asked if name == "whisper.cpp"] == ["de", "en"] * 2


def test_another_number_of_tokens_than_was_asked_for_is_a_failure(
    stub: type[StubWorker], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time of one would be of fewer."""
    whole = stub.answer

    def answer(self: StubWorker, do: str, **arguments: Any) -> dict[str, Any]:
        found = whole(self, do, **arguments)
        return found | ({"tokens": found["tokens"][:9]} if (self.name, do) == ("whisper.cpp", "generate") else {})

    monkeypatch.setattr(stub, "answer", answer)
    assert (
        compared(capsys, "--against", "whisper.cpp")[1].count("whisper.cpp: failed: asked for 64 tokens, it gave 9")
        == 1
    )


def test_scores_by_hand() -> None:
    """A token too many counts; each language has its normalizer."""
    assert (agreement([[1, 2, 3]], [[1, 2, 4, 3]]), agreement([[1, 2], [3]], [[1], [3]])) == (3 / 4, 2 / 3)
    assert agreement([[]], [[]]) is None and word_error_rate([""], ["a"], ["en"]) is None
    short, long = ["I'm here"], ["I am here"]
    assert word_error_rate(short, long, ["en"]) == 0 != word_error_rate(short, long, ["de"])


def test_words_that_are_heard_where_nothing_is_said_are_errors() -> None:
    """A known text that is empty is known; of the recording without one nothing is."""
    comparison: Any = object.__new__(run.Comparison)
    tokenizer, none = get_tokenizer(True), np.zeros(0, np.float32)
    texts = ("", "apples jump", None)
    comparison.tokens, comparison.tokenizer, comparison.languages = None, tokenizer, ["de"] * 3
    comparison.heard = [Recording("x", none, text) for text in texts]
    comparison.spoken_texts = ["apples"] * 3
    row, heard = Row("x", "", {}), [tokenizer.encode(" apples jump high")] * 3
    comparison.score(row, [tokenizer.encode(" apples")] * 3, heard)
    assert (row.wer_text, row.wer, row.agreement) == (2.0, 2.0, 1 / 3)
    assert (row.tokens, row.texts) == (sum(map(len, heard)), ["apples jump high"] * 3)


def test_an_engine_that_fails_later_has_no_figures_either() -> None:
    rows = [Row(name, "", {}, total_s=[1.0], error=error) for name, error in (("one", ""), ("other", "no luck"))]
    options = {"device": "cpu", "tokens": None, "languages": ["en"], "threads": 1, "rounds": 2, "beam_size": None}
    machine = {"processor": "a", "cpus": 1, "python": "3"}
    shown = table(Results("m", options, machine, [], 10.0, rows))
    assert "| one " in shown and "| other " not in shown and "other: failed: no luck" in shown


@pytest.mark.parametrize(("n_sample", "n_window"), [(480_000, 1), (480_001, 2)])
def test_a_recording_of_whole_windows_has_no_other(n_sample: int, n_window: int) -> None:
    assert Recording("x", np.zeros(n_sample, np.float32), None).windows(80).shape == (n_window, 80, 3000)


def test_a_piece_is_there_after_all_recordings_before_it() -> None:
    comparison: Any = object.__new__(run.Comparison)
    comparison.tokenizer = tokenizer = get_tokenizer(True)
    apples = [50364, *tokenizer.encode(" apples"), tokenizer.eot]
    answers = [{"seconds": n, "pieces": [{"seconds": 0.25, "tokens": apples}] * 2} for n in (1.0, 2.0, 4.0)]
    found = comparison.pieces([*answers, {"seconds": 1.0}])
    assert [(piece.recording, piece.seconds) for piece in found] == [
        (n, at) for n, at in enumerate((0.25, 1.25, 3.25)) for _ in range(2)
    ]
    assert {piece.text for piece in found} == {" apples"}


def test_text_ends_before_the_end_of_text() -> None:
    tokenizer = SimpleNamespace(eot=5)
    assert run.Comparison.text_tokens(SimpleNamespace(tokenizer=tokenizer), [4, 5, 6, 3]) == [4, 3]  # type: ignore[arg-type]


def test_the_fastest_of_several_times_counts() -> None:
    assert run.fastest([{"seconds": 2.0}, {"seconds": 1.0}, {"seconds": 3.0}], "seconds") == 1.0


def test_an_engine_that_fails_has_no_figures(stub: type[StubWorker], capsys: pytest.CaptureFixture[str]) -> None:
    stub.broken = "whisper.cpp"
    status, out = compared(capsys, "--against", "whisper.cpp")
    assert status == 1
    assert "whisper.cpp: failed: RuntimeError: no luck\n" in out
    assert "| whisper.cpp" not in out and cells(out, "maxwhisper")[9] == "0.00 %"


def test_an_engine_that_fails_gives_its_memory_back_at_once(
    stub: type[StubWorker], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.broken = "whisper.cpp"
    monkeypatch.setattr(stub, "close", lambda self: self.asked.append((self.name, "closed")))
    compared(capsys, "--against", "whisper.cpp", "--rounds", "2")
    asked = [what for name, what in stub.asked if name == "whisper.cpp"]
    assert asked[:3] == ["closed", "de", "closed"]  # the process that prepares, and the one that fails
    assert stub.asked[stub.asked.index(("whisper.cpp", "de")) + 1] == ("whisper.cpp", "closed")


def test_the_reference_must_not_fail(stub: type[StubWorker], capsys: pytest.CaptureFixture[str]) -> None:
    stub.broken = "openai-whisper"
    assert main(["compare", str(CLIP), "--model", str(NANO), "--against", "whisper.cpp"]) == 1
    assert "openai-whisper, which the others are compared with: RuntimeError: no luck" in capsys.readouterr().err


@pytest.mark.parametrize(("asks", "measured"), [(0, []), (7, ["maxwhisper"])])
def test_what_was_measured_before_an_interruption_is_kept(
    asks: int,
    measured: list[str],
    stub: type[StubWorker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interrupted as engines start, or as the second one is measured."""
    whole, seen = stub.answer, []

    def answer(self: StubWorker, do: str, **arguments: Any) -> dict[str, Any]:
        if self.name != "openai-whisper" and do != "prepare":
            seen.append(do)
            if len(seen) > asks and self.name != "maxwhisper" * bool(asks):
                raise KeyboardInterrupt
        return whole(self, do, **arguments)

    monkeypatch.setattr(stub, "answer", answer)
    report = tmp_path / "report.json"
    status, out = compared(capsys, "--against", "whisper.cpp", "--rounds", "2", "--json", str(report))
    rows = json.loads(report.read_text())["rows"]
    assert status == 1
    assert [row["name"] for row in rows if row["total_s"]] == measured
    assert {row["error"] for row in rows if not row["total_s"]} == {"interrupted before it was measured"}
    assert ("; interrupted after 1 of 2 rounds" in out) == bool(measured)


def test_more_threads_than_cpus_are_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxwhisper.compare.process.available_cpus", lambda: {0, 1, 2})
    assert [available(threads) for threads in (None, 1, 3, 4, 10**20)] == [3, 1, 3, 3, 3]


def test_rows_are_those_that_artifacts_hold() -> None:
    dims = load_checkpoint(NANO).dims

    def held(*computes: str, of: Any = dims) -> Any:
        identities = [Mock(unit="network", compute=each, dims=dict(vars(of))) for each in computes]
        return Mock(held=[Mock(identity=identity) for identity in identities], folder="DIR")

    specs = [spec for spec in engines.SPECS if "gpu" in spec.devices]
    peers = [spec.name for spec in specs if spec.engine != "maxwhisper"]
    left = [spec.name for spec in run.held(specs, held("float16"), dims)]
    assert left == ["maxwhisper float16", "maxwhisper float16 batched", *peers]
    assert [spec.name for spec in run.held(specs, held("float32"), dims)] == ["maxwhisper", *peers]
    with pytest.raises(OptionError, match="--artifacts DIR: holds no network of these dimensions: .*'n_mels': 80"):
        run.held(specs, held("float16", of=SIZES["tiny"]), dims)


def test_an_engine_of_ours_loads_from_the_artifacts_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Mock()
    monkeypatch.setattr(maxwhisper_engine, "load_model", load)
    task = replace(task_for(load_checkpoint(NANO).dims, None, 2), artifacts="DIR")
    maxwhisper_engine.Adapter("float16 batched", task).load(tmp_path)
    load.assert_called_once_with(tmp_path / "model.pt", "cpu", artifacts="DIR", dtype="float16")


def test_a_fixed_number_of_tokens(stub: type[StubWorker], capsys: pytest.CaptureFixture[str]) -> None:
    status, out = compared(capsys, "--against", "whisper.cpp", "--tokens", "20")
    assert status == 0 and not stub.asked
    assert cells(out, "whisper.cpp")[9:] == ["-", "-"]
    assert "exactly 20 tokens to decode for each window of 30 s" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "openvino,whisperx"], "argument --against: unknown engine 'whisperx': expected some of openai-"),
        (["--model", "random:tiny"], "argument --model: random weights never end a text, say how long with --tokens"),
        (["--text", "a", "--text", "b"], "argument --text: given 2 times for 1 AUDIO"),
        (["--text", "a", "--tokens", "9"], "argument --text: cannot be combined with --tokens"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--rounds", "0"], "argument --rounds: must be a whole number above 0, not '0'"),
    ],
)
def test_unusable_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(CLIP), *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.wav"], "nothing.wav: cannot be read as audio: No such file"),
        (["."], ".: cannot be read as audio: Is a directory"),
        ([""], ": cannot be read as audio: "),
        ([str(CLIP), "--text", "nothing.txt"], "--text nothing.txt: cannot be read as text"),
        ([str(CLIP), "--json", "no/such/folder.json"], "there is no folder 'no/such' that can be written to"),
        ([str(CLIP), "--json", "."], "--json .: is a folder: expected the name of a file"),
        ([str(CLIP), "--model", "random:huge", "--tokens", "9"], "random weights are of tiny, base"),
        ([str(CLIP), "--model", str(NANO), "--tokens", "225"], "--tokens must be from 2 to 224"),
        (["nothing.wav", "--device", "gpu"], "device 'gpu' was asked for, but MAX finds no GPU on this machine"),
        (["nothing.wav", "--device", "auto"], "nothing.wav: cannot be read as audio: No such file"),
        (
            ["nothing.wav", "--device", "gpu", "--against", "openvino"],
            "--against openvino: it is not compared on a gpu",
        ),
    ],
)
def test_what_cannot_be_used(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "accelerator_count", lambda: 0)
    assert main(["compare", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_text_has_at_most_half_the_models_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Comparison, "run", lambda self, specs: [])
    for n in (2, 224):
        options = {"device": "cpu", "batch_size": 1, "threads": 1, "rounds": 1}
        assert run.compare([str(CLIP)], str(NANO), ["maxwhisper"], tokens=n, **options).options["tokens"] == n


def test_whatever_greedy_decoding_uses_is_compiled_beforehand(tmp_path: Path) -> None:
    """Else the engine's peak memory would be the compiler's."""
    (tmp_path / "model.pt").symlink_to(NANO)
    engine = maxwhisper_engine.Adapter("", task_for(load_checkpoint(NANO).dims, None, 2))
    engine.prepare(tmp_path)
    network = engine.model.decoder.network
    loaded = set(network.executables)
    engine.generate(engine.encode(np.zeros((network.checkpoint.dims.n_mels, 3000), np.float32)), 100)
    assert set(network.executables) == loaded
