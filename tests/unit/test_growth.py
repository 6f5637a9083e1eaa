"""How cost grows: what the two engines are asked, by stand-ins with known answers, and what they answer themselves."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from whisper.audio import N_SAMPLES

from maxwhisper.audio import load_audio
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compare.convert import store
from maxwhisper.compare.engines import REFERENCE, SPECS, SUBJECT, Spec, Task
from maxwhisper.compare.engines.openai_whisper import Adapter
from maxwhisper.compare.material import Recording
from maxwhisper.compare.process import EngineError
from maxwhisper.compare.tokens import task_for
from maxwhisper.compare.worker import Requests
from reference.fixtures import NANO
from reference.perf import growth

# ---- the command, with known answers in the place of processes -----------------------------------------------------


class StandIn:
    """A window takes PyTorch Whisper a second and maxwhisper half of one, more with every window of a batch and less
    with two threads; memory is in proportion to time."""

    started: list[tuple[str, int]] = []
    asked: list[tuple[str, str]] = []
    heard: list[int] = []
    """Windows of each request."""
    broken: dict[str, int] = {}
    """By engine, the number of windows at once that it fails at."""
    lost = 0
    """Tokens that are missing in each answer."""

    def __init__(self, spec: Spec, folder: Path, task: Task):
        assert (folder / "openai" / "model.pt").is_file()
        self.name, self.threads, self.seconds = spec.name, task.threads, 0.0
        self.started.append((self.name, self.threads))

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append((self.name, do))
        if do in ("prepare", "load"):
            return {}
        if do == "memory":
            return {"bytes": int(self.seconds * 1e9)}
        n_window = self.n_window(do, **arguments)
        self.heard.append(n_window)
        self.seconds = n_window * (0.5 if self.name == SUBJECT else 1.0) * (3 - self.threads)
        return {"tokens": [1] * (n_window * arguments["n_tokens"] - self.lost), "seconds": self.seconds}

    def n_window(self, do: str, n_tokens: int, audio: str = "", mel: str = "") -> int:
        assert n_tokens == growth.TOKENS
        if do == "transcribe_fixed":
            n_window, rest = divmod(len(np.load(audio)), N_SAMPLES)
            assert not rest
            return n_window
        assert do == "generate_batch"
        mels = np.load(mel)
        assert mels.shape[1:] == (80, 3000)
        if self.broken.get(self.name) == len(mels):
            raise EngineError("its process ended with status -9: out of memory")
        return len(mels)

    def close(self) -> None:
        self.asked.append((self.name, "close"))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    for name, value in {"started": [], "asked": [], "heard": [], "broken": {}, "lost": 0}.items():
        monkeypatch.setattr(StandIn, name, value)
    for name, value in {"Worker": StandIn, "PAUSE": 0, "available": lambda: 2}.items():
        monkeypatch.setattr(growth, name, value)
    monkeypatch.setattr(growth, "checkpoint_for", lambda model: load_checkpoint(NANO))
    yield StandIn


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the chart empty, which takes half a second to draw."""
    monkeypatch.setattr(growth, "plot", lambda _, file: file.touch())


def cells(text: str, title: str) -> list[list[str]]:
    """Returns the rows of an axis's table."""
    lines = text.split(f"{title}:\n\n")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_and_files(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "LONG", 3)
    monkeypatch.setitem(growth.AXES, "minutes", (1, growth.LONG))
    monkeypatch.setitem(growth.AXES, "batch", (1, 4))
    monkeypatch.setitem(growth.AXES, "threads", (1, 2, 4))
    out = tmp_path / "new" / "growth"
    assert growth.main(["--sizes", "small", "medium", "--rounds", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert cells(text, "Audio length") == [
        ["1", "1.00", "2.00", "0.50", "1000", "2000", "0.50", "2"],
        ["3", "3.00", "6.00", "0.50", "3000", "6000", "0.50", "1"],
    ]
    assert stand_in.heard[:8] == [1, 2] * 4, "30 s of the recording first, then all of it"
    assert cells(text, "Batch") == [
        ["1", "500", "1000", "0.50", "500", "1000", "0.50", "2"],
        ["4", "500", "1000", "0.50", "2000", "4000", "0.50", "2"],
    ]
    assert [row[0] for row in cells(text, "Model size")] == ["small", "medium"]
    assert [row[:3] for row in cells(text, "Threads")] == [["1", "1000", "2000"], ["2", "500", "1000"]], (
        "4 are not there"
    )
    assert (out / "growth.md").read_text() == text.removesuffix("\n")
    found = json.loads((out / "growth.json").read_text())
    last = {"size": "tiny", "threads": 2, "batch": 1, "minutes": None}
    assert found["base"] == last and found["tokens"] == growth.TOKENS
    costs = {"seconds": [0.5, 0.5], "peak_bytes": [500_000_000] * 2, "error": ""}
    assert found["rows"][-1]["point"] == last and found["rows"][-1]["costs"][SUBJECT] == costs
    assert (out / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {"growth.md", "growth.json", "growth.png"}


@pytest.mark.usefixtures("undrawn")
def test_files_that_cannot_be_made_take_neither_the_tables_nor_others_with_them(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*of: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert growth.main(["--axis", "threads", "--rounds", "1", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert cells(printed.out, "Threads")
    (line,) = (line for line in printed.err.splitlines() if line.startswith("growth: "))
    assert line.count("cannot be written: No space left on device") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["growth.png"]


@pytest.mark.usefixtures("undrawn")
def test_every_round_has_its_own_process_and_engines_take_turns(stand_in: type[StandIn], tmp_path: Path) -> None:
    assert growth.main(["--axis", "threads", "--rounds", "2", "--out", str(tmp_path)]) == 0
    compiling, round_ = ["prepare", "close"], ["load", "generate_batch", "generate_batch", "memory", "close"]
    ours, theirs = ([(name, do) for do in round_] for name in (SUBJECT, REFERENCE))
    first = [(name, do) for name in (SUBJECT, REFERENCE) for do in (*compiling, *round_)]
    one, other = [*ours, *theirs], [*theirs, *ours]
    assert stand_in.asked == [*first, *other, *one, *other]
    assert [threads for _, threads in stand_in.started] == [1] * 6 + [2] * 4


def test_an_engine_that_fails_at_a_point_has_no_figures_there(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(growth.AXES, "batch", (2, 3))
    stand_in.broken = {REFERENCE: 2}
    assert growth.main(["--axis", "batch", "--rounds", "2", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert cells(text, "Batch") == [
        ["2", "500", "-", "-", "1000", "-", "-", "2"],
        ["3", "500", "1000", "0.50", "1500", "3000", "0.50", "2"],
    ]
    assert "openai-whisper, windows at once 2: failed: its process ended with status -9: out of memory\n" in text
    assert [name for name, do in stand_in.asked if do == "load"].count(REFERENCE) == 3, "not asked again at 2"
    assert (tmp_path / "growth.png").is_file()


@pytest.mark.usefixtures("undrawn")
def test_another_number_of_tokens_is_a_failure(
    stand_in: type[StandIn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.lost = 1
    assert growth.main(["--axis", "size", "--sizes", "tiny", "--out", str(tmp_path)]) == 1
    assert "maxwhisper, model tiny: failed: asked for 20 tokens, it gave 19\n" in capsys.readouterr().out


def test_ctrl_c_is_one_line_and_closes_the_process(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(StandIn, "n_window", interrupted)
    assert growth.main(["--axis", "batch", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("growth: interrupted\n")
    assert stand_in.asked[-1] == (SUBJECT, "close")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--axis", "beams"], "argument --axis: invalid choice: 'beams' (choose from"),
        (["--sizes", "huge"], "argument --sizes: invalid choice: 'huge' (choose from"),
        (["--rounds", "0"], "argument --rounds: must be a whole number above 0, not '0'"),
    ],
)
def test_unusable_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        growth.main(options)
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told_before_the_work(
    stand_in: type[StandIn], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert growth.main(["--out", str(tmp_path / "file" / "growth")]) == 1
    assert (
        f"growth: --out {tmp_path}/file/growth: expected a folder, or where one can be made" in capsys.readouterr().err
    )
    assert not stand_in.asked


# ---- the engines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """Returns what each engine says to 60 s of speech: window by window, both windows at once, as a recording."""
    checkpoint, scratch = load_checkpoint(NANO), tmp_path_factory.mktemp("growth")
    audio = np.resize(load_audio(growth.CLIP), 2 * N_SAMPLES)
    paths = {"audio": str(scratch / "audio.npy"), "mel": str(scratch / "mel.npy")}
    np.save(paths["audio"], audio)
    np.save(paths["mel"], Recording("", audio, None).windows(checkpoint.dims.n_mels))
    requests = {"windows": "mel", "generate_batch": "mel", "transcribe_fixed": "audio"}
    found = {}
    for spec in (spec for spec in SPECS if spec.name in (SUBJECT, REFERENCE)):
        asked = Requests(spec.name, store(checkpoint), task_for(checkpoint.dims, None, torch.get_num_threads()))
        asked.load()
        found[spec.name] = {
            do: getattr(asked, do)(n_tokens=5, **{given: paths[given]})["tokens"] for do, given in requests.items()
        }
    return found


@pytest.mark.parametrize("engine", [SUBJECT, REFERENCE])
def test_windows_at_once_get_the_tokens_that_each_gets_alone(
    engine: str, answers: dict[str, dict[str, list[int]]]
) -> None:
    found = answers[engine]
    assert found["generate_batch"] == found["windows"]
    assert found["windows"][:5] != found["windows"][5:], "the windows differ"


@pytest.mark.parametrize("engine", [SUBJECT, REFERENCE])
def test_a_recording_gets_the_tokens_of_its_windows(engine: str, answers: dict[str, dict[str, list[int]]]) -> None:
    found = answers[engine]
    assert len(found["transcribe_fixed"]) == 2 * 5
    assert all(token < 50257 for token in found["transcribe_fixed"])
    assert found["transcribe_fixed"] == answers[REFERENCE]["transcribe_fixed"]


def test_windows_of_a_recording_get_no_timestamps_and_no_text_before(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Adapter("", task_for(load_checkpoint(NANO).dims, None, 2))
    engine.model = model = whisper.load_model(str(NANO), "cpu")
    timestamp = model.dims.n_vocab - 1
    with torch.no_grad():  # so that this one is the top_tokens wherever it may be written
        model.decoder.ln.weight.fill_(0)
        model.decoder.ln.bias.fill_(1)
        model.decoder.token_embedding.weight[timestamp] = 100
    mel = torch.zeros(1, model.dims.n_mels, 3000)
    assert engine.generate(model.embed_audio(mel), 3) == [timestamp] * 3
    prompts, decode = [], model.decode
    monkeypatch.setattr(
        model, "decode", lambda segment, options: prompts.append(options.prompt) or decode(segment, options)
    )
    tokens = engine.transcribe_fixed(np.resize(load_audio(growth.CLIP), 2 * N_SAMPLES), 3)
    assert len(tokens) == 2 * 3 and max(tokens) < engine.task.eot
    assert prompts == [[], []]
