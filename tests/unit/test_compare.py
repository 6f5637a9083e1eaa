"""`maxwhisper compare`: its table from known answers, each engine in its process, and what it converts."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import whisper
from whisper.model import Whisper as OpenAIWhisper
from whisper.tokenizer import get_tokenizer

from maxwhisper.audio import load_audio
from maxwhisper.batched import transcribe_batched
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.cli import main
from maxwhisper.compare import convert, engines, run, stepwise
from maxwhisper.compare.engines import SPECS, Engine, Spec, Task, missing, rows
from maxwhisper.compare.engines import maxwhisper as maxwhisper_engine
from maxwhisper.compare.engines.on_pytorch import OnPyTorch
from maxwhisper.compare.material import SIZES, checkpoint_for, recordings
from maxwhisper.compare.process import EngineError, Worker, awake
from maxwhisper.compare.results import Row
from maxwhisper.compare.scores import agreement, word_error_rate
from maxwhisper.compare.table import cells as figures
from maxwhisper.compare.tokens import task_for, tokenizer_of
from maxwhisper.compare.worker import Requests
from maxwhisper.engine import session
from reference.blocks import TWINS, decoder, decoder_keys_values, pytorch_whisper
from reference.chain import layers
from reference.judge import Comparison, judge

ROOT = Path(__file__).parents[2]
NANO = ROOT / "fixtures" / "nano.pt"
CLIP = ROOT / "fixtures" / "clips" / "english-1.wav"
LONG = ROOT / "fixtures" / "clips" / "english-long.mp3"
TEXT = "Where is the young doctor that Hector found?"


def require(spec: Spec) -> None:
    if packages := missing(spec):
        pytest.skip(f"{spec.name} is not installed: pip install {' '.join(packages)}")


def named(name: str) -> Spec:
    return next(spec for spec in SPECS if spec.name == name)


# ---- the engines, each in its process ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Path:
    return convert.store(load_checkpoint(NANO))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files with the samples of the clip and its spectrogram."""
    audio = load_audio(CLIP)
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(audio)).numpy()
    scratch = tmp_path_factory.mktemp("compare")
    np.save(scratch / "audio.npy", audio)
    np.save(scratch / "mel.npy", mel)
    return str(scratch / "audio.npy"), str(scratch / "mel.npy")


@pytest.fixture(scope="module")
def spoken() -> list[int]:
    """The text tokens that PyTorch Whisper finds in the clip."""
    result = whisper.load_model(str(NANO), "cpu").transcribe(
        load_audio(CLIP), language="en", temperature=0.0, fp16=False
    )
    return [token for segment in result["segments"] for token in segment["tokens"] if token < 50257]


@pytest.mark.parametrize("spec", rows(None, "cpu"), ids=lambda spec: spec.name)
def test_an_engine_finds_what_pytorch_whisper_finds(
    spec: Spec, folder: Path, material: tuple[str, str], spoken: list[int]
) -> None:
    require(spec)
    audio, mel = material
    worker = Worker(spec, folder, task_for(load_checkpoint(NANO).dims, None, 2))
    try:
        worker.ask("prepare")
        assert worker.ask("load")["seconds"] > 0
        tokens = worker.ask("transcribe", audio=audio, language="en")["tokens"]
        assert [token for token in tokens if token < 50257] == spoken
        assert worker.ask("encode", mel=mel)["seconds"] > 0
        one, more = (worker.ask("generate", n_tokens=count)["tokens"] for count in (1, 20))
        assert len(more) == 20 and 50257 not in more
        # Without timestamps and without an end: the text first, which is shorter than this.
        assert one == more[:1] == spoken[:1]
        assert more[: len(spoken)] == spoken
        assert worker.ask("memory")["bytes"] > 5e7
    finally:
        worker.close()


def adapter(spec: Spec, folder: Path, batch_size: int) -> Engine:
    """The engine of a row, in this process."""
    require(spec)
    task = replace(task_for(load_checkpoint(NANO).dims, None, 2), batch_size=batch_size)
    engine = importlib.import_module(f"maxwhisper.compare.engines.{spec.module}").Adapter(spec.variant, task)
    engine.load(convert.convert(spec.conversion, folder))
    return engine


@pytest.mark.parametrize("spec", [spec for spec in rows(None, "cpu") if spec.batched], ids=lambda spec: spec.name)
def test_a_window_has_the_same_tokens_in_a_batch(spec: Spec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = adapter(spec, folder, 2)
    mels = recordings([str(LONG)], None)[0].windows(80)
    alone = [engine.generate(engine.encode(mel), 12) for mel in mels]
    decoded: Any = engine.decoded  # type: ignore[attr-defined]
    batches = []
    monkeypatch.setattr(engine, "decoded", lambda *given: batches.append(decoded(*given)) or batches[-1])
    assert engine.windows(mels, 12) == alone
    assert [len(batch) for batch in batches] == [2, 1]


def test_maxwhisper_batched_is_transcribe_batched(folder: Path) -> None:
    engine: Any = adapter(named("maxwhisper batched"), folder, 4)
    audio = load_audio(LONG)
    segments = transcribe_batched(engine.model, audio, language="en", temperature=0.0)["segments"]
    assert engine.transcribe(audio, "en") == [token for segment in segments for token in segment["tokens"]]


def test_faster_whisper_batched_cuts_long_audio_elsewhere(folder: Path) -> None:
    sequential, batched = (adapter(named(f"faster-whisper {mode}"), folder, 4) for mode in ("float32", "batched"))
    audio = load_audio(LONG)
    whole, pieces = (engine.transcribe(audio, "en") for engine in (sequential, batched))
    assert pieces != whole
    # With timestamps, as all engines: the text of the first sentence is between two.
    first = next(i for i, token in enumerate(pieces[1:], 1) if token >= 50364)
    assert pieces[0] >= 50364 and pieces[1:first] == whole[1:first]


def test_a_process_that_fails_or_ends_is_an_error_of_one_line(tmp_path: Path) -> None:
    worker = Worker(named("openai-whisper"), tmp_path, task_for(load_checkpoint(NANO).dims, None, 1))
    try:
        with pytest.raises(EngineError, match=r"^RuntimeError: Model .*model.pt not found.*$"):
            worker.ask("load")
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(EngineError, match="its process ended with status -9"):
            worker.ask("load")
    finally:
        worker.close()


def state_of(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_is_stopped_when_its_turn_is_over(folder: Path) -> None:
    worker = Worker(named("openai-whisper"), folder, task_for(load_checkpoint(NANO).dims, None, 1))
    try:
        for _ in range(2):
            with awake(worker.process):
                assert worker.ask("memory")["bytes"] > 0
            deadline = time.monotonic() + 10  # a signal takes its time
            while state_of(worker.process.pid) != "T":
                assert time.monotonic() < deadline
    finally:
        worker.close()


# ---- the engines of a GPU, as far as they show without one ----------------------------------------------------------


def on_gpu(name: str) -> Any:
    """The engine of a row, not loaded."""
    spec = named(name)
    require(spec)
    task = task_for(load_checkpoint(NANO).dims, None, 2, "gpu")
    return importlib.import_module(f"maxwhisper.compare.engines.{spec.module}").Adapter(spec.variant, task)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's engines stay on the CPU."""
    assert on_gpu("openai-whisper").device == torch.device("cuda")
    monkeypatch.setattr(OnPyTorch, "device", torch.device("cpu"))


def test_rows_of_each_device() -> None:
    ours = ["maxwhisper", "maxwhisper bfloat16"]
    assert [spec.name for spec in rows(None, "cpu")] == [
        *(*ours, "maxwhisper batched", "openai-whisper"),
        *("faster-whisper float32", "faster-whisper int8", "faster-whisper batched", "transformers", "whisper.cpp"),
        *("openvino float32", "openvino bfloat16", "onnxruntime"),
    ]
    ours += ["maxwhisper float16", "maxwhisper float16 batched"]
    assert [spec.name for spec in rows(None, "gpu")] == [
        *(*ours, "openai-whisper", "openai-whisper float16"),
        *("faster-whisper float16", "faster-whisper float16 batched", "transformers float16"),
    ]
    assert [spec.name for spec in rows(["transformers"], "gpu")] == [*ours, "transformers float16"]


@pytest.mark.parametrize("variant", ["", "float16"])
def test_openai_whisper_on_a_gpu(variant: str, folder: Path, no_cuda: None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    engine = on_gpu(f"openai-whisper {variant}".strip())
    engine.load(folder / "openai")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert next(engine.model.parameters()).dtype == torch.float32
    features = engine.encode(np.zeros((80, 3000), np.float32))
    assert features.dtype == (torch.float16 if variant else torch.float32)
    assert len(engine.generate(features, 3)) == 3  # which refuses features of another dtype than its options'
    engine.model = Mock(transcribe=Mock(return_value={"segments": []}))
    engine.transcribe(np.zeros(16000, np.float32), "en")
    assert engine.model.transcribe.call_args.kwargs["fp16"] == bool(variant)


@pytest.mark.parametrize("name", ["faster-whisper float16", "faster-whisper float16 batched"])
def test_faster_whisper_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_gpu(name)
    module = importlib.import_module("maxwhisper.compare.engines.faster_whisper")
    model, load = Mock(), Mock()
    sets = [Mock(major=major, usable=usable) for major, usable in ((13, True), (12, False), (12, True))]
    for attribute, value in {"WhisperModel": model, "load": load, "find": lambda _: sets}.items():
        monkeypatch.setattr(module, attribute, value)
    engine.load(Path("there"))
    assert model.call_args.args == ("there",)
    assert {"device": "cuda", "compute_type": "float16"}.items() <= model.call_args.kwargs.items()
    load.assert_called_once_with(sets[2])
    assert engine.event() is None


def test_transformers_on_a_gpu(folder: Path, no_cuda: None, spoken: list[int]) -> None:
    engine = on_gpu("transformers float16")
    engine.load(convert.convert("hugging-face", folder))
    assert engine.model.dtype == torch.float16
    engine.model._prepare_static_cache = made = Mock(wraps=engine.model._prepare_static_cache)
    tokens = engine.transcribe(load_audio(CLIP), "en")
    assert [token for token in tokens if token < 50257] == spoken
    assert made.call_count == 1
    assert len(engine.generate(engine.encode(np.zeros((80, 3000), np.float32)), 3)) == 3
    assert made.call_count == 2


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float16 batched", "float16")],
)
def test_maxwhisper_on_a_gpu(variant: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model = Mock()
    monkeypatch.setattr(maxwhisper_engine, "load_model", load_model)
    on_gpu(f"maxwhisper {variant}".strip()).load(Path("there"))
    load_model.assert_called_once_with(Path("there/model.pt"), "gpu", dtype=dtype)


def test_events_are_on_the_queue_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    device, of_max, of_torch, synchronize = Mock(), Mock(), Mock(), Mock()
    monkeypatch.setattr(maxwhisper_engine, "find_device", {"gpu": device}.get)
    monkeypatch.setattr(maxwhisper_engine, "DeviceEvent", of_max)
    monkeypatch.setattr(torch.cuda, "Event", of_torch)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    ours, theirs = on_gpu("maxwhisper"), on_gpu("openai-whisper")
    assert ours.event() == of_max.return_value and theirs.event() == of_torch.return_value
    of_max.assert_called_once_with(device, enable_timing=True)
    device.default_queue.record_event.assert_called_once_with(of_max.return_value)
    of_torch.assert_called_once_with(enable_timing=True)
    of_torch.return_value.record.assert_called_once_with()
    ours.synchronize()
    device.synchronize.assert_called_once_with()
    theirs.synchronize()
    assert synchronize.call_count == 2, "maxwhisper computes in PyTorch too"


def test_a_time_ends_when_the_device_is_done(folder: Path) -> None:
    steps: list[str] = []
    event = Mock(elapsed_time=Mock(return_value=250.0))
    requests = Requests("openai-whisper", folder, task_for(load_checkpoint(NANO).dims, None, 2))
    requests.engine = Mock(
        event=lambda: steps.append("event") or event,
        generate=lambda features, n_tokens: steps.append("generate") or [1] * n_tokens,
        synchronize=lambda: steps.append("synchronize"),
    )
    requests.features = None
    answer = requests.generate(2)
    assert steps == ["event", "generate", "event", "synchronize"]
    assert (answer["tokens"], answer["device_seconds"]) == ([1, 1], 0.25)
    requests.engine.event = lambda: None
    assert requests.generate(2).keys() == {"tokens", "seconds"}


# ---- conversions ---------------------------------------------------------------------------------------------------


def test_a_hugging_face_folder_holds_the_checkpoint(folder: Path) -> None:
    require(named("transformers"))
    ours, theirs = load_checkpoint(NANO), load_checkpoint(convert.convert("hugging-face", folder))
    assert theirs.dims == ours.dims
    assert theirs.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(theirs.tensors[name], ours.tensors[name]) for name in ours.tensors)


def test_the_tokenizer_of_a_hugging_face_folder_is_openais(folder: Path) -> None:
    require(named("transformers"))
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(convert.convert("hugging-face", folder) / "tokenizer.json"))
    ours = tokenizer_of(load_checkpoint(NANO).dims)
    for text in (TEXT, " Ärger über 3,5 €, don't!", "日本語 と 한국어", "\t\n  x  "):
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    for name in ("<|endoftext|>", "<|startoftranscript|>", "<|de|>", "<|notimestamps|>", "<|0.00|>", "<|30.00|>"):
        assert theirs.token_to_id(name) == ours.encoding.encode_single_token(name)


def test_the_graph_of_a_step_is_pytorchs_decoder() -> None:
    """As it is exported: three tokens, then one, for two texts, beside PyTorch's decoder on all four at once."""
    checkpoint = load_checkpoint(NANO)
    model, oracle = (
        pytorch_whisper(checkpoint.dims, checkpoint.tensors, dtype) for dtype in (torch.float32, torch.float64)
    )
    graphs = {name: graph.module for name, graph in stepwise.graphs(checkpoint).items()}
    torch.manual_seed(0)
    tokens, features = torch.randint(50257, (2, 4)), torch.randn(1, 1500, model.dims.n_audio_state)
    with torch.inference_mode():
        cross = graphs["cross"](features)
        own = [torch.zeros(2, model.dims.n_text_head, 0, 64)] * len(cross)
        first, *own = graphs["step"](tokens[:, :3], *own, *cross)
        last, *own = graphs["step"](tokens[:, 3:], *own, *cross)
        peer, right = (logits_of(each, tokens, x) for each, x in ((model, features), (oracle, features.double())))
    twin = TWINS["decoder.prefill"]
    judgement = judge(
        *(Comparison("fixture", torch.float32, "decoder", 0, "random"), [right], [peer], [torch.cat([first, last], 1)]),
        longest_reduction=twin.longest_reduction(model.dims),
        roundings=twin.roundings(model.dims),
        n_vocab=model.dims.n_vocab,
    )
    assert judgement.passed, f"\n{judgement}"


def logits_of(model: OpenAIWhisper, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """In the dtype of the features."""
    return decoder(model, 0, tokens, **layers("cross", decoder_keys_values(model, 0, features)))[0]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        convert.complete(tmp_path / "format", write)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXWHISPER_CACHE_DIR", str(tmp_path))
    checkpoint = load_checkpoint(NANO)
    folder = convert.store(checkpoint)
    again = load_checkpoint(folder / "openai" / "model.pt")
    assert convert.store(again) == folder and folder.is_relative_to(tmp_path)
    again.tensors["decoder.ln.bias"] = again.tensors["decoder.ln.bias"] + 1
    assert convert.digest(again) != folder.name


def test_random_weights_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiniest", (80, 1000, 64, 1, 2))
    first, second = checkpoint_for("random:tiniest"), checkpoint_for("random:tiniest")
    assert convert.digest(first) == convert.digest(second)
    assert (first.dims.n_audio_state, first.dims.n_audio_layer, first.dims.n_text_layer) == (64, 1, 2)
    assert all(tensor.isfinite().all() for tensor in first.tensors.values())


# ---- scores and texts ----------------------------------------------------------------------------------------------


def test_scores() -> None:
    assert agreement([[1, 2, 3, 4]], [[1, 9, 3, 4, 5]]) == 3 / 5
    assert agreement([[1, 2], []], [[1, 2], []]) == 1
    assert agreement([[]], [[]]) is None
    assert word_error_rate(["Hello there, you!"], ["hello their you"], ["en"]) == 1 / 3
    assert word_error_rate(["Über uns."], ["über uns"], ["de"]) == 0
    assert word_error_rate([""], ["x"], ["en"]) is None


def test_a_text_beside_the_audio_is_read_and_one_that_is_given_wins(tmp_path: Path) -> None:
    audio, given = tmp_path / "a.wav", tmp_path / "given"
    audio.write_bytes(CLIP.read_bytes())
    assert recordings([str(audio)], None)[0].text is None
    (tmp_path / "a.txt").write_text("beside")
    given.write_text("given")
    assert recordings([str(audio)], None)[0].text == "beside"
    assert recordings([str(audio)], [str(given)])[0].text == "given"


def test_five_minutes_of_speech_are_made_of_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "fixtures"))
    clips = importlib.import_module("clips")
    monkeypatch.setattr(clips, "TALK", tmp_path / "cache" / "talk.wav")
    clips.make_talk()
    [talk] = recordings([str(clips.TALK)], None)
    entries = {clip["text"]: clip for clip in json.loads((ROOT / "fixtures" / "clips.json").read_text())["clips"]}
    chosen = [entries[line] for line in (talk.text or "").splitlines()]
    assert {clip["language"] for clip in chosen} == {"en"}
    assert round(talk.seconds) == round(sum(clip["duration"] for clip in chosen))
    assert 270 < talk.seconds <= 300 and len(talk.windows(80)) == 10


def test_windows_cover_all_of_a_recording() -> None:
    recording = recordings([str(CLIP)], None)[0]
    assert recording.windows(80).shape == (1, 80, 3000)


# ---- the command, with known answers in the place of processes -----------------------------------------------------


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
            "transcribe": {"tokens": tokens, "seconds": 0.5},
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


def test_the_table_of_a_gpu(
    stub: type[StubWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    status, out = compared(capsys, "--device", "auto", *against, "--rounds", "2", "--json", str(report))
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


def test_a_time_below_zero_is_noise_and_not_shown() -> None:
    row = Row("x", "", {}, total_s=[1.0], encode_s=[0.02], token_s=[-0.001, 0.002, -0.003])
    assert figures(row, 10.0)[:5] == ["x", "-", "20.0", "-", "1.00"]


def test_an_engine_that_fails_has_no_figures(stub: type[StubWorker], capsys: pytest.CaptureFixture[str]) -> None:
    stub.broken = "whisper.cpp"
    status, out = compared(capsys, "--against", "whisper.cpp")
    assert status == 1
    assert "whisper.cpp: failed: RuntimeError: no luck\n" in out
    assert "| whisper.cpp" not in out and cells(out, "maxwhisper")[9] == "0.00 %"


def test_the_reference_must_not_fail(stub: type[StubWorker], capsys: pytest.CaptureFixture[str]) -> None:
    stub.broken = "openai-whisper"
    assert main(["compare", str(CLIP), "--model", str(NANO), "--against", "whisper.cpp"]) == 1
    assert "openai-whisper, which the others are compared with: RuntimeError: no luck" in capsys.readouterr().err


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
        ([str(CLIP), "--text", "nothing.txt"], "--text nothing.txt: cannot be read as text"),
        ([str(CLIP), "--json", "no/such/folder.json"], "there is no folder 'no/such' that can be written to"),
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


def test_whatever_greedy_decoding_uses_is_compiled_beforehand(tmp_path: Path) -> None:
    """Else the engine's peak memory would be the compiler's."""
    (tmp_path / "model.pt").symlink_to(NANO)
    engine = maxwhisper_engine.Adapter("", task_for(load_checkpoint(NANO).dims, None, 2))
    engine.prepare(tmp_path)
    network = engine.model.decoder.network
    loaded = set(network.executables)
    engine.generate(engine.encode(np.zeros((network.checkpoint.dims.n_mels, 3000), np.float32)), 100)
    assert set(network.executables) == loaded
