"""The merge gate: the workflow runs make targets only, and its one required job passes nothing that showed nothing."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reference.fixtures import ROOT
from reference.merge_gate import main, objections

WORKFLOW, NIGHTLY = ((ROOT / ".github" / "workflows" / f"{name}.yml").read_text() for name in ("parity", "nightly"))
RUNS = re.findall(r"^ +(?:- )?run: (.*)$", WORKFLOW, re.MULTILINE)
JOBS = re.findall(r"^  ([\w-]+):$", WORKFLOW.partition("\njobs:\n")[2], re.MULTILINE)


# ---- the workflow --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", sorted(set(RUNS)))
def test_every_step_is_a_make_target(line: str) -> None:
    found = re.fullmatch(
        r'make (?:--silent )?([a-z-]+)((?: [A-Z]+=\S+)*)(?: >> "\$GITHUB_(?:OUTPUT|STEP_SUMMARY)")?', line
    )
    gate = r"make compile-gate TARGETS=\$\{\{ matrix.target \}\}( SIZE=all)? DTYPE=all"
    assert found or re.fullmatch(gate, line), line
    assert_target(found[1] if found else "compile-gate")


@pytest.mark.parametrize("target", re.findall(r"target: \[(.*)\]", NIGHTLY)[0].split(", "))
def test_every_job_of_the_night_is_a_make_target(target: str) -> None:
    assert_target(target)


def assert_target(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_required_job_needs_all_others() -> None:
    needs = re.search(r"^  merge-gate:\n    if: always\(\)\n    needs: \[(.*)\]$", WORKFLOW, re.MULTILINE)
    assert len(RUNS) > 10 and needs
    assert {*needs[1].split(", "), "merge-gate"} == set(JOBS)


def test_the_merge_gate_reads_the_reports_that_jobs_upload() -> None:
    line = subprocess.run(
        ["make", "--dry-run", "merge-gate", "REPORTS=r"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    reports = re.findall(r"--report ([\w-]+):\w+:r/([\w-]+)/", line)
    uploaded = re.findall(r"^  ([\w-]+):$|^          name: ((?:report|perf)-\w+)$", WORKFLOW, re.MULTILINE)
    job, of = "", {}
    for name, upload in uploaded:
        job = name or job
        of |= {job: upload} if upload else {}
    assert dict(reports) == of and len(of) == 3


def test_whatever_has_a_base_is_gated_against_it() -> None:
    """An empty BASE fails the step, so that only a schedule, which has none, may leave it out."""
    condition = r"\n        if: github.event_name != 'schedule'"
    assert re.search(rf"run: make --silent perf-gate .*{condition}\n", WORKFLOW)
    for target in ("compile-base", "--silent kernel-diff"):
        assert re.search(rf"run: make {target} .*{condition} && matrix.target == env.GPU_TARGET\n", WORKFLOW)
    done = subprocess.run(["make", "--old-file=.venv/installed", "perf-gate", "BASE="], cwd=ROOT, capture_output=True)
    assert done.returncode and b"make perf-gate needs a git revision" in done.stdout


@pytest.mark.parametrize("marker", ["nightly", "clock"])
def test_what_make_test_leaves_out_runs_at_night(marker: str) -> None:
    options = ["--dry-run", "--old-file=.venv/installed"]
    done = subprocess.run(["make", *options, "test-nightly"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(rf"pytest tests\S*( --\S+)* -m {marker}$", done.stdout, re.MULTILINE)


# ---- objections -------------------------------------------------------------------------------------------------


def needs(**results: str) -> dict[str, dict[str, Any]]:
    return {"cpu": {"result": "success"}, "gpu": {"result": "success"}} | {
        job: {"result": result} for job, result in results.items()
    }


def parity(device: str, pairs: int, passed: bool = True) -> dict[str, Any]:
    judgements = [{"comparison": {"device": device}, "pairs": pairs}]
    return {"passed": passed, "reason": "2 comparisons failed", "judgements": judgements}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(parity("gpu", 3)))
    return path


def test_it_passes_when_every_job_succeeded_and_compared_something(report: Path) -> None:
    assert objections(needs(), [], [f"gpu:gpu:{report}"]) == []


@pytest.mark.parametrize("result", ["skipped", "cancelled", "failure"])
def test_a_job_that_did_not_succeed_fails_it(result: str, report: Path) -> None:
    assert objections(needs(gpu=result), [], [f"gpu:gpu:{report}"]) == [f"gpu: {result}"]


def test_an_excused_job_may_be_skipped_and_nothing_else(report: Path) -> None:
    missing = report.with_name("nowhere.json")
    assert objections(needs(gpu="skipped"), ["gpu"], [f"gpu:gpu:{missing}"]) == []
    assert objections(needs(gpu="cancelled"), ["gpu"], []) == ["gpu: cancelled"]
    assert objections(needs(cpu="skipped"), ["gpu"], []) == ["cpu: skipped"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: .*No such file"),
        ("{", "cannot be read"),
        ({}, "is no report"),
        ([], "is no report"),
        ({"passed": True, "judgements": [{"pairs": 3}]}, "is no report"),
        (parity("gpu", 0), "compared nothing on gpu"),
        (parity("cpu", 3), "compared nothing on gpu"),
        (parity("gpu", 3, passed=False), "2 comparisons failed"),
        ({"benchmarks": []}, "no benchmark ran on gpu"),
        ({"benchmarks": [{"group": "encoder, tiny, float32, cpu"}]}, "no benchmark ran on gpu"),
    ],
)
def test_a_report_that_shows_nothing_fails_it(content: Any, reason: str, report: Path) -> None:
    report.unlink()
    if content is not None:
        report.write_text(content if isinstance(content, str) else json.dumps(content))
    reasons = objections(needs(), [], [f"gpu:gpu:{report}"])
    assert reasons and all(each.startswith(f"gpu: {report}: ") for each in reasons)
    assert re.search(reason, " ".join(reasons))


def test_benchmarks_on_the_device_pass(report: Path) -> None:
    report.write_text(json.dumps({"benchmarks": [{"group": "encoder, tiny, float32, gpu"}]}))
    assert objections(needs(), [], [f"gpu:gpu:{report}"]) == []


@pytest.mark.parametrize(
    ("results", "device", "status"),
    [({}, "gpu", 0), ({"gpu": "skipped"}, "gpu", 0), ({"gp": "skipped"}, "gpu", 1), ({}, "cpu", 1)],
)
def test_the_status_of_the_command_is_what_blocks_a_merge(
    results: dict[str, str], device: str, status: int, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every report counts, the last one too, and of the excused jobs the whole name."""
    reports = ["--report", f"gpu:gpu:{report}", "--report", f"gpu:{device}:{report}"]
    assert main(["--needs", json.dumps(needs(**results)), "--excused", "lint gpu", *reports]) == status
    assert ("every job succeeded" in capsys.readouterr().out) == (not status)


def test_a_gate_without_jobs_or_with_a_stray_report_fails(report: Path) -> None:
    assert objections({}, [], []) == ["no job is needed"]
    assert objections(needs(), [], [f"tpu:gpu:{report}"]) == ["tpu: is to report, but is not needed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--needs", ""], "--needs: is not JSON"), (["--needs", "{}", "--report", "cpu:report.json"], "JOB:DEVICE:PATH")],
)
def test_an_argument_that_cannot_be_read_is_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]
