"""The report: what it says, that its data is whole, that it needs nothing from outside, that no half of it is left."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import whisper

import reference.report
from reference.chain import Chain, IntermediatesEffect
from reference.compile_log import CompileRecord
from reference.faults import Fault, FaultResult
from reference.judge import Comparison, Explanation, Judgement, Measure, Output, explain, judge
from reference.report import ReportError, write
from reference.results import Run
from reference.transcripts import Transcript

FILES = ("report.html", "report.json", "summary.md")
HOSTILE = "<script>alert('x')</script> & \"quoted\" | `ticked` $x^$"
VOID = {"meta", "br"}


def judgement(block: str = "encoder.mlp", error: float = 2e-7, **comparison: object) -> Judgement:
    """Of two outputs, PyTorch's error 1e-7, the budget 4e-7; MAX's error in the second is as given."""
    known: dict[str, object] = {
        "size": "fixture",
        "dtype": torch.float32,
        "block": block,
        "layer": 0,
        "inputs": "speech",
    } | comparison
    outputs = (
        Output(0, (1, 5, 8), (Measure("relative L2", 1e-8, 1e-7, 4e-7),)),
        Output(1, (1, 5, 8), (Measure("relative L2", error, 1e-7, 4e-7), Measure("worst position", 0.0, 0.0, 1e-6))),
    )
    return Judgement(Comparison(**known), outputs, ())  # type: ignore[arg-type]


def explained(subject: torch.Tensor, oracle: torch.Tensor) -> Judgement:
    c = Comparison("fixture", torch.float32, "encoder.attention", 1, "speech")
    three = [oracle], [oracle.float()], [subject.float()]
    return replace(judge(c, *three, longest_reduction=8), explanations=explain(*three))


def chain(error: float = 2e-7, inputs: str = "speech") -> Chain:
    names = ["log_mel", "encoder.stem", "encoder.blocks.0.mlp", "encoder", "decoder.embedding", "step decoder"]
    judgements = {name: judgement(name) for name in names}
    judgements["decoder.embedding"] = judgement("decoder.embedding", 0.0)
    judgements["encoder.blocks.0.mlp"] = judgement("encoder.blocks.0.mlp", error)
    effects = IntermediatesEffect("encoder", True, 0.0), IntermediatesEffect("decoder", False, 3e-8)
    return Chain(Comparison("fixture", torch.float32, "chain", 0, inputs), judgements, effects)


def fault(
    name: str, dtype: torch.dtype = torch.float32, checks: tuple[str, ...] = ("chain",), **more: object
) -> FaultResult:
    wrong = Fault(name, "encoder.mlp", "encoder.blocks.1.mlp", change=lambda tensors, dims: {}, published=True)
    isolated = tuple(f"isolated: {check}" if check != "chain" else check for check in checks)
    known: dict[str, object] = {"divergence": "encoder.blocks.1.mlp" if "chain" in checks else None, "used": 30.0}
    known |= {"rounding": {"speech": 1e-3}, "effect": {"speech": 1e-2}} | more
    return FaultResult(wrong, dtype, isolated, **known)  # type: ignore[arg-type]


def passing() -> Run:
    return Run(
        judgements=[
            judgement("encoder.mlp"),
            judgement("log_mel", 5e-8),
            judgement("decoder.mlp.step", inputs="x.late"),
        ],
        chains=[chain()],
        faults=[
            fault("bias dropped", checks=("relative L2", "chain")),
            fault("bias dropped", torch.bfloat16, checks=("KL max",)),
            fault("rounded", torch.bfloat16, checks=(), effect={"speech": 1e-5}, used=0.5),
        ],
        transcripts=[Transcript("english-1.wav", "greedy", True, 41)],
        compiled=[CompileRecord("fixture, float32, parts", 19, 2.5)],
        test_seconds=4.0,
        started=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        command="pytest tests/parity -k 'mlp or chain'",
    )


def failing() -> Run:
    oracle = torch.arange(40.0, dtype=torch.float64).reshape(1, 5, 8).sin()
    broken = oracle.clone()
    broken[0, 2, 3] = math.nan
    run = passing()
    run.judgements += [
        judgement("encoder", 8e-7),
        judgement("decoder.prefill", math.nan),
        judgement("decoder.step", math.inf),
        explained(oracle * 1.1, oracle),
        explained(broken, oracle),
    ]
    run.chains.append(chain(9e-7, "silence"))
    run.faults.append(fault("never seen", checks=(), used=0.2))
    run.faults.append(fault("elsewhere", checks=("worst position", "chain"), divergence="decoder.ln"))
    run.transcripts.append(Transcript("german-1.wav", "beam", False, 12, "token 3"))
    run.exit_status = 1
    return run


def written(run: Run, folder: Path) -> tuple[str, dict, str]:
    write(run, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    page, data, summary = ((folder / name).read_text() for name in FILES)

    def not_json(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return page, json.loads(data, parse_constant=not_json), summary


class Reader(HTMLParser):
    """Fails on elements that do not close in order; collects tags, attributes and the text outside of style."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [passing(), failing(), Run()], ids=["passing", "failing", "empty"])
def test_page_is_whole_and_refers_to_nothing_outside(run: Run, tmp_path: Path) -> None:
    page = written(run, tmp_path)[0]
    tags = read(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
            assert not value.startswith("#") or value == "#" or value[1:] in ids
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_page_says_the_verdict_first(tmp_path: Path) -> None:
    text = read(written(passing(), tmp_path)[0]).text
    assert "PASSED" in text and "FAILED" not in text
    text = read(written(failing(), tmp_path)[0]).text
    assert "FAILED" in text and "PASSED" not in text
    for said in (
        "5 of 8 comparisons failed",
        "1 of 2 chains diverged, the first at encoder.blocks.0.mlp",
        "2 of 5 faults not caught in the right block",
        "1 of 2 transcripts differ",
        "19 graphs in 1 artifacts",
        "pytest tests/parity -k 'mlp or chain'",
        "2026-01-02 03:04 UTC",
    ):
        assert said in text, said


def test_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    run = failing()
    run.command = run.transcripts[1].difference + HOSTILE
    run.judgements.append(replace(judgement(HOSTILE, 8e-7), defects=(HOSTILE,)))
    run.chains.append(replace(chain(9e-7, HOSTILE), judgements={HOSTILE: judgement(HOSTILE, 9e-7)}))
    run.faults.append(fault(HOSTILE, checks=(HOSTILE,), divergence=HOSTILE))
    run.transcripts.append(Transcript(HOSTILE, HOSTILE, False, 1, HOSTILE))
    page, _, summary = written(run, tmp_path)
    reader = read(page)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count("<script>alert('x')</script>") > 10
    assert "<" not in summary


def test_charts_name_their_points_and_are_drawn_in_the_colours_of_the_page(tmp_path: Path) -> None:
    page = written(failing(), tmp_path)[0]
    titles = [text for text in re.findall(r"<title>([^<]*)</title>", page) if "PyTorch" in text]
    assert sum(title.startswith("encoder.blocks.0.mlp\nMAX 9.00e-07") for title in titles) == 2  # MAX, PyTorch
    assert any(title.startswith("encoder.mlp, layer 0, speech\nMAX 2.00e-07") for title in titles)
    assert any(title.startswith("decoder.embedding\nMAX 1.00e-08") for title in titles)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--max)" in drawn and "#0101" not in drawn and "#000000" not in drawn


def test_uncaught_faults_are_told_apart_by_pytorchs_rounding(tmp_path: Path) -> None:
    run = passing()
    run.faults.append(fault("twice the rounding", torch.bfloat16, checks=(), effect={"speech": 2e-3}, used=0.5))
    _, data, summary = written(run, tmp_path)
    assert data["passed"]
    totals = data["totals"]["faults"]["bfloat16"]
    assert [totals[name] for name in ("caught", "below", "between", "missed")] == [1, 1, 1, 0]
    assert "1 below PyTorch's rounding, 1 between that and the budget; 0 missed" in summary


def test_faults_carry_their_marks(tmp_path: Path) -> None:
    text = " ".join(read(written(failing(), tmp_path)[0]).text.split())
    for said in ("published", "only one check", "missed", "caught, in the wrong block", "not caught, below the budget"):
        assert said in text, said


def test_same_run_same_bytes(tmp_path: Path) -> None:
    assert written(failing(), tmp_path / "one") == written(failing(), tmp_path / "two")


# ---- the data ------------------------------------------------------------------------------------------------------


def test_data_holds_every_figure(tmp_path: Path) -> None:
    run = failing()
    data = written(run, tmp_path)[1]
    assert data["schema_version"] == 1
    assert len(data["judgements"]) == len(run.judgements)
    for found, wanted in zip(data["judgements"], run.judgements, strict=True):
        assert found["comparison"]["block"] == wanted.comparison.block
        assert found["passed"] == wanted.passed
        measures = [measure for output in found["outputs"] for measure in output["measures"]]
        for values, (_, measure) in zip(measures, wanted.measures, strict=True):
            for name in ("subject", "peer", "budget", "ratio", "used"):
                same(values[name], getattr(measure, name))
            assert (values["name"], values["passed"]) == (measure.name, measure.passed)
    worst: Explanation = run.judgements[-1].explanations[0]
    errors = data["judgements"][-1]["explanations"][0]["errors"]
    assert (len(errors), len(errors[0])) == tuple(worst.errors.shape)
    assert data["judgements"][-1]["explanations"][0]["subject"] == "NaN"
    assert [len(found["submodules"]) for found in data["chains"]] == [6, 6]
    assert data["chains"][1]["first_divergence"] == "encoder.blocks.0.mlp"
    assert data["totals"]["pairs"] == run.pairs
    assert data["compile_log"] == [{"name": "fixture, float32, parts", "graphs": 19, "seconds": 2.5}]
    assert data["totals"]["faults"]["float32"]["missed"] == 1
    assert [found["outcome"] for found in data["faults"]][-2:] == ["missed", "caught, in the wrong block"]
    assert data["transcripts"][1]["difference"] == "token 3"
    assert data["environment"]["torch"]


def same(found: float | str, wanted: float) -> None:
    assert float(found) == wanted or (found == "NaN" and math.isnan(wanted))


def test_every_field_is_documented(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    documented = set(re.findall(r"`(\w+)`", page))

    def names(value: object, inside: str = "") -> set[str]:
        if isinstance(value, list):
            return set().union(*(names(each, inside) for each in value)) if value else set()
        if not isinstance(value, dict):
            return set()
        own = set() if inside in ("environment", "effect", "rounding", "faults by dtype") else set(value)
        inner = {name: "faults by dtype" if name == "faults" and inside == "totals" else name for name in value}
        return own.union(*(names(each, inner[name]) for name, each in value.items()))

    assert names(written(failing(), tmp_path)[1]) <= documented


# ---- the verdict and the summary -----------------------------------------------------------------------------------


def test_faults_alone_are_a_report(tmp_path: Path) -> None:
    _, data, _ = written(Run(faults=passing().faults), tmp_path)
    assert data["passed"] and "caught in the right block" in data["reason"]


def test_nothing_compared_has_failed(tmp_path: Path) -> None:
    page, data, summary = written(Run(), tmp_path)
    assert "FAILED" in read(page).text and "Nothing was compared" in read(page).text
    assert (data["passed"], data["reason"]) == (False, "nothing was compared")
    assert "**FAILED**: nothing was compared." in summary


def test_another_test_that_failed_is_a_failure(tmp_path: Path) -> None:
    run = passing()
    assert written(run, tmp_path)[1]["passed"]
    run.exit_status = 1
    data = written(run, tmp_path)[1]
    assert not data["passed"] and "status 1" in data["reason"]


def test_summary_is_short_and_says_what_failed(tmp_path: Path) -> None:
    run = failing()
    run.judgements += [judgement(f"block.{n}", n * 1e-7, dtype=torch.float16) for n in range(80)]
    run.chains += [chain(9e-7, f"kind {n}") for n in range(6)]
    summary = written(run, tmp_path)[2]
    lines = summary.splitlines()
    assert len(lines) < 60
    assert lines[2].startswith("**FAILED**: 80 of 88 comparisons failed")
    assert "| block | float32 | float16 | bfloat16 |" in lines
    assert "| block.79 |  | 79.00, 19.75 **1 failed** |  |" in lines
    assert re.search(r"^\d+ more blocks", lines[-1])
    assert sum(bool(re.match(r"\d+\. ", line)) for line in lines) == 10
    assert any(line.startswith("- faults, bfloat16: 1 of 2 caught") for line in lines)
    assert any("first divergence encoder.blocks.0.mlp" in line for line in lines)


def test_ratio_and_share_of_a_block_are_the_worst_ones(tmp_path: Path) -> None:
    run = Run(judgements=[judgement("encoder.mlp", error) for error in (1e-7, 3e-7, 2e-7)])
    assert "| encoder.mlp | 3.00, 0.75 |" in written(run, tmp_path)[2].splitlines()


# ---- writing -------------------------------------------------------------------------------------------------------


def broken(*arguments: object) -> str:
    raise ZeroDivisionError("division\nby zero")


def of_an_earlier_run(folder: Path) -> None:
    """Writes files that are not to be taken for those of the run that follows."""
    for name in FILES:
        (folder / name).write_text("an earlier run's")


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "rendering"), [*zip(FILES, ("page", "as_json", "summary"), strict=True)])
def test_a_rendering_that_fails_takes_no_other_with_it(
    name: str, rendering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_earlier_run(tmp_path)
    monkeypatch.setattr(reference.report, rendering, broken)
    with pytest.raises(ReportError) as missing:
        write(passing(), tmp_path)
    assert str(missing.value) == f"{tmp_path / name} cannot be written: ZeroDivisionError: division by zero"
    assert left_in(tmp_path) == {*FILES} - {name}
    for path in tmp_path.iterdir():
        assert "an earlier run" not in path.read_text()


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_writing_that_fails_leaves_neither_half_a_file_nor_an_earlier_runs(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_an_earlier_run(tmp_path)
    whole = Path.write_text

    def half(path: Path, text: str, **keywords: str) -> int:
        whole(path, text[:10], **keywords)
        return full()

    def full(*paths: Path) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, "write_text", half) if moment == "writing" else ("os.replace", full)))
    with pytest.raises(ReportError, match=r"report\.html cannot be written: No space left on device"):
        write(passing(), tmp_path)
    assert left_in(tmp_path) == set()


def test_a_disk_that_fills_up_keeps_what_there_was_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, size = Path.write_text, 200_000

    def until_full(path: Path, text: str, **keywords: str) -> int:
        whole(path, text[:size], **keywords)
        if len(text) > size:
            raise OSError(28, "No space left on device")
        return len(text)

    monkeypatch.setattr(Path, "write_text", until_full)
    with pytest.raises(ReportError) as missing:
        write(Run(judgements=[judgement(layer=n) for n in range(400)]), tmp_path)
    assert str(missing.value) == f"{tmp_path / 'report.json'} cannot be written: No space left on device"
    assert left_in(tmp_path) == {"summary.md", "report.html"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=re.escape(str(tmp_path / "file" / "report"))):
        write(passing(), tmp_path / "file" / "report")


def test_without_matplotlib_there_is_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "reference.report.charts", raising=False)
    monkeypatch.delattr(reference.report, "charts", raising=False)
    run = failing()
    page = written(run, tmp_path)[0]
    assert "FAILED" in read(page).text and "<svg" not in page
    (line,) = run.notes.values()
    assert line.startswith(f"{tmp_path / 'report.html'}: no charts: ModuleNotFoundError") and "\n" not in line


@pytest.mark.parametrize("part", ["charts.ratios", "charts.error_map", "charts.along_the_network"])
def test_a_chart_that_cannot_be_drawn_is_a_line_in_its_place(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"reference.report.{part}", broken)
    run = failing()
    text = read(written(run, tmp_path)[0]).text
    assert "no charts: ZeroDivisionError: division by zero" in text and "5 of 8 comparisons failed" in text
    assert list(run.notes) == [f"{tmp_path / 'report.html'}: no charts: ZeroDivisionError: division by zero"]


def test_a_section_that_cannot_be_made_is_a_line_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["reference.report.page"], "fault_section", broken)
    text = read(written(failing(), tmp_path)[0]).text
    assert "no faults: ZeroDivisionError" in text and "All comparisons" in text


def test_packages_without_metadata_have_the_version_that_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", without)
    page, data, _ = written(passing(), tmp_path)
    environment = data["environment"]
    assert (environment["torch"], environment["openai-whisper"]) == (torch.__version__, whisper.__version__)
    assert environment["max"] == "unknown: ImportError: max has no metadata and no __version__"
    assert data["passed"] and environment["max"] in read(page).text


def test_a_machine_that_does_not_say_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("processor", "gpu"):
        monkeypatch.setattr(f"reference.results.{name}", broken)
    environment = written(passing(), tmp_path)[1]["environment"]
    assert environment["processor"] == environment["GPU"] == "unknown: ZeroDivisionError: division by zero"


def test_a_command_that_is_not_text_is_written_all_the_same(tmp_path: Path) -> None:
    run = passing()
    run.command = f"pytest --report {os.fsdecode(bytes([255]))}"
    page, data, _ = written(run, tmp_path)
    assert data["command"] == run.command and r"\udcff" in page
