"""The report: what it says, that its data is whole, that it needs nothing from outside."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference.faults import outcome, result_of
from reference.judge import Explanation
from reference.report.figures import conclusion, worst_first
from reference.report.summary import summary
from reference.results import Run, environment
from reference.transcripts import Transcript

from .reports import HOSTILE, chain, failing, fault, judgement, passing, read, written

Written = tuple[str, dict, str]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Writes the report of a run that failed, which draws charts for a second."""
    return written(failing(), tmp_path_factory.mktemp("failed"))


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [passing(), None, Run()], ids=["passing", "failing", "empty"])
def test_page_is_whole_and_refers_to_nothing_outside(run: Run | None, failed: Written, tmp_path: Path) -> None:
    page = (written(run, tmp_path) if run else failed)[0]
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


def test_page_says_the_verdict_first(failed: Written, tmp_path: Path) -> None:
    text = read(written(passing(), tmp_path, drawn=False)[0]).text
    assert "PASSED" in text and "FAILED" not in text
    text = read(failed[0]).text
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


def test_charts_name_their_points_and_are_drawn_in_the_colours_of_the_page(failed: Written) -> None:
    page = failed[0]
    titles = [text for text in re.findall(r"<title>([^<]*)</title>", page) if "PyTorch" in text]
    assert sum(title.startswith("encoder.blocks.0.mlp\nMAX 9.00e-07") for title in titles) == 2  # MAX, PyTorch
    assert any(title.startswith("encoder.mlp, layer 0, speech\nMAX 2.00e-07") for title in titles)
    assert any(title.startswith("decoder.embedding\nMAX 1.00e-08") for title in titles)
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--max)" in drawn and "#0101" not in drawn and "#000000" not in drawn


def test_uncaught_faults_are_told_apart_by_pytorchs_rounding(tmp_path: Path) -> None:
    run = passing()
    run.faults.append(fault("twice the rounding", torch.bfloat16, checks=(), effect={"speech": 2e-3}, used=0.5))
    _, data, summary = written(run, tmp_path, drawn=False)
    assert data["passed"]
    totals = data["totals"]["faults"]["bfloat16"]
    assert [totals[name] for name in ("caught", "below", "between", "missed")] == [1, 1, 1, 0]
    assert "1 below PyTorch's rounding, 1 between that and the budget; 0 missed" in summary


def test_faults_carry_their_marks(failed: Written) -> None:
    text = " ".join(read(failed[0]).text.split())
    for said in ("published", "only one check", "missed", "caught, in the wrong block", "not caught, below the budget"):
        assert said in text, said


def test_same_run_same_bytes(failed: Written, tmp_path: Path) -> None:
    assert written(failing(), tmp_path) == failed


# ---- the data ------------------------------------------------------------------------------------------------------


def test_data_holds_every_figure(failed: Written) -> None:
    run, data = failing(), failed[1]
    assert data["schema_version"] == 2
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


def test_every_field_is_documented(failed: Written) -> None:
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

    assert names(failed[1]) <= documented


# ---- the verdict and the summary -----------------------------------------------------------------------------------


def test_faults_alone_are_a_report(tmp_path: Path) -> None:
    _, data, _ = written(Run(faults=passing().faults), tmp_path, drawn=False)
    assert data["passed"] and "caught in the right block" in data["reason"]


def test_nothing_compared_has_failed(tmp_path: Path) -> None:
    page, data, summary = written(Run(), tmp_path)
    assert "FAILED" in read(page).text and "Nothing was compared" in read(page).text
    assert (data["passed"], data["reason"]) == (False, "nothing was compared")
    assert "**FAILED**: nothing was compared." in summary


def test_another_test_that_failed_is_a_failure(tmp_path: Path) -> None:
    run = passing()
    assert written(run, tmp_path, drawn=False)[1]["passed"]
    run.exit_status = 1
    data = written(run, tmp_path, drawn=False)[1]
    assert not data["passed"] and "status 1" in data["reason"]


@pytest.mark.parametrize("kind", ["judgements", "chains", "faults", "transcripts", "lost"])
def test_one_failure_of_any_kind_is_a_failure(kind: str) -> None:
    """Whatever pytest says of the tests."""
    run, wrong = passing(), failing()
    wrong.lost.append("a worker")
    assert conclusion(run).passed
    getattr(run, kind).append(getattr(wrong, kind)[-1])
    assert not conclusion(run).passed


@pytest.mark.parametrize(
    ("dtype", "checks", "effect", "expected"),
    [
        (torch.bfloat16, (), {"speech": 0.0039}, "not caught, below the budget"),
        (torch.bfloat16, (), {"speech": 0.0041}, "missed"),
        (torch.bfloat16, (), {"speech": 0.0041, "random": 0.0}, "missed"),
        (torch.float32, (), {"speech": 1e-9}, "missed"),
        (torch.float32, ("KL max",), {"speech": 1e-9}, "caught"),
    ],
)
def test_a_fault_may_be_missed_below_the_budget_of_a_coarse_dtype_alone(
    dtype: torch.dtype, checks: tuple[str, ...], effect: dict[str, float], expected: str
) -> None:
    found = fault("a", dtype, checks, effect=effect, rounding=dict.fromkeys(effect, 0.001))
    assert outcome(found) == expected
    assert found.accepted == (expected != "missed")


def test_the_effect_of_a_fault_is_what_max_errs_by() -> None:
    wrong, exact = judgement("encoder.mlp", 9e-7), judgement("encoder.mlp", 3e-7)
    found = result_of(fault("a").fault, torch.bfloat16, [wrong], [exact], None)
    assert (found.checks, found.used) == (("isolated: relative L2",), wrong.worst.used)
    assert (found.rounding, found.effect) == ({"speech": 1e-7}, {"speech": 3e-7})
    assert result_of(fault("a").fault, torch.bfloat16, [exact], [exact], "encoder").checks == ("chain",)


def test_what_was_compared_is_counted_in_blocks_chains_and_transcripts() -> None:
    run = passing()
    assert run.pairs == 3 * 3 + 6 * 3 + 1 and run.recalled_pairs == 0
    run.judgements[0] = replace(run.judgements[0], recalled=True)
    assert run.recalled_pairs == 3
    for only in ("judgements", "chains", "transcripts", "faults"):
        assert Run(**{only: getattr(run, only)}).compared
    assert Run(held=["a"]).compared and not Run(compiled=run.compiled, waits=[1.0]).compared


def test_summary_is_short_and_says_what_failed() -> None:
    run = failing()
    run.judgements += [judgement(f"block.{n}", n * 1e-7, dtype=torch.float16) for n in range(80)]
    run.chains += [chain(9e-7, f"kind {n}") for n in range(6)]
    lines = summary(run, environment()).splitlines()
    assert len(lines) < 60
    assert lines[2].startswith("**FAILED**: 80 of 88 comparisons failed")
    assert "| block | float32 | float16 | bfloat16 |" in lines
    assert "| block.79 |  | 79.00, 19.75 **1 failed** |  |" in lines
    assert re.search(r"^\d+ more blocks", lines[-1])
    assert sum(bool(re.match(r"\d+\. ", line)) for line in lines) == 10
    assert any(line.startswith("- faults, bfloat16: 1 of 2 caught") for line in lines)
    assert "- transcripts, float32: 1 of 2 equal" in lines
    assert "transcripts, float32: 1 of 2 equal to PyTorch Whisper's" in run.summary_lines()
    assert any("first divergence encoder.blocks.0.mlp" in line for line in lines)


@pytest.mark.parametrize("order", [1, -1])
def test_the_worst_comparison_is_named_be_it_no_number(order: int, tmp_path: Path) -> None:
    """By the last lines of a run, and at the head of its page."""
    run = Run(judgements=[judgement("encoder.mlp"), judgement("encoder.stem", math.nan)][::order])
    ratio, nearest = run.summary_lines()[1:]
    assert ratio.startswith("largest MAX error / PyTorch error nan: encoder.stem")
    assert nearest.startswith("nearest to its budget nan, relative L2: encoder.stem")
    page = " ".join(read(written(run, tmp_path, drawn=False)[0]).text.split())
    assert re.search("largest MAX / PyTorch ?NaN ?encoder.stem", page)


def test_what_failed_comes_before_what_only_came_near() -> None:
    """As where PyTorch is no yardstick, and MAX near to the oracle."""
    near, yardstick = judgement("encoder.mlp", 3.9e-7), judgement("encoder.stem", 0.0)
    bad = replace(yardstick.outputs[0].measures[0], ceiling=0.0)
    yardstick = replace(yardstick, outputs=(replace(yardstick.outputs[0], measures=(bad,)),))
    assert near.passed and not yardstick.passed and yardstick.used < near.used
    assert worst_first([near, yardstick]) == [yardstick, near]


def test_ratio_and_share_of_a_block_are_the_worst_ones() -> None:
    run = Run(judgements=[judgement("encoder.mlp", error) for error in (1e-7, 3e-7, 2e-7)])
    assert "| encoder.mlp | 3.00, 0.75 |" in summary(run, environment()).splitlines()
