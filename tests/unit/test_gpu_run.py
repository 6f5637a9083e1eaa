"""A run on a GPU machine, with steps of a few lines in the place of the suites: limits, and what is left on disk."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from reference.fixtures import ROOT
from reference.gpu_run import findings, limits
from reference.gpu_run.__main__ import clear, outcome

RUN = """
import sys
from reference.gpu_run.__main__ import main
from reference.gpu_run.steps import Command, Step

def step(name, code, weight=1, least=0, kind="log"):
    return Step(name, kind, weight, least, lambda at: [Command([sys.executable, "-c", code, str(at.out)])])

sys.exit(main(sys.argv[1:], [{steps}]))
"""
HANGS = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
stopped = "import os, signal; print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
worker = subprocess.Popen([sys.executable, "-c", stopped], start_new_session=True, stdout=subprocess.PIPE)
Path(sys.argv[1], "worker").write_bytes(worker.stdout.readline())
time.sleep(60)
"""
SAYS_WHAT_IT_HAS = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("half of it")
"""
LOOKS = """
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
results = [(step["name"], step["result"]) for step in json.loads((out / "run.json").read_text())["steps"]]
print(results, "hangs" in (out / "table.md").read_text())
"""


def command(out: Path, minutes: float, *steps: str) -> list[str]:
    code = RUN.format(steps=", ".join(steps))
    return [sys.executable, "-c", code, "--minutes", str(minutes), "--out", str(out), "--device", "cpu"]


def run(out: Path, minutes: float, *steps: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = subprocess.run(command(out, minutes, *steps), cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, results(out)


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in json.loads((out / "run.json").read_text())["steps"]}


def test_no_step_takes_others_along(tmp_path: Path) -> None:
    """One that hangs and heeds nothing, one that ends itself, one that fails, and one for which there is no time."""
    status, found = run(
        tmp_path / "out",
        1,
        f"step('hangs', {HANGS!r}, weight=0.15)",
        f"step('looks', {LOOKS!r})",
        "step('dies', 'import os; os.kill(os.getpid(), 9)')",
        "step('fails', 'raise SystemExit(3)')",
        "step('long', 'pass', least=60)",
        "step('last', 'print(1 + 1)')",
    )
    assert status == 1
    said = {name: step["result"] for name, step in found.items()}
    assert said == {
        "hangs": "stopped at its limit",
        "looks": "ok",
        "dies": "failed (-9)",
        "fails": "failed (3)",
        "long": "not run: no time left",
        "last": "ok",
    }
    assert found["looks"]["found"] == "[('hangs', 'stopped at its limit')] True"
    assert found["hangs"]["seconds"] < found["hangs"]["limit"] + 1 < 3
    assert found["last"]["found"] == "2"
    assert not Path("/proc", (tmp_path / "out" / "worker").read_text().strip()).exists()


def test_what_is_interrupted_at_its_limit_may_write_what_it_has(tmp_path: Path) -> None:
    _, found = run(tmp_path, 1, f"step('slow', {SAYS_WHAT_IT_HAS!r})", "step('next', 'pass', weight=24)")
    assert found["slow"]["result"] == "stopped at its limit" and found["slow"]["found"] == "half of it"


def test_the_archive_holds_all_that_the_table_is_of(tmp_path: Path) -> None:
    writes = "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'more').mkdir(); print('a | b')"
    status, _ = run(tmp_path, 1, f"step('one two', {writes!r})", "step('nothing', 'pass')")
    assert status == 0
    with tarfile.open(tmp_path / "gpu-run.tar.gz") as archive:
        names = {name.removeprefix("gpu-run/") for name in archive.getnames()}
        table = archive.extractfile("gpu-run/table.md")
        assert table and table.read() == (tmp_path / "table.md").read_bytes()
    assert names == {"more", "nothing.log", "one-two.log", "run.json", "table.md"}
    head, _, columns, _, one, nothing = (tmp_path / "table.md").read_text().splitlines()
    assert "--device cpu, --minutes 1, commit " in head
    assert columns == "| step | result | s | limit s | what it found |"
    assert one.startswith("| one two | ok | 0 | ") and one.endswith(" | a \\| b |")
    assert nothing.startswith("| nothing | ok | ") and nothing.endswith(" |  |")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_ended_leaves_table_and_archive(number: int, status: int, tmp_path: Path) -> None:
    waits = "import pathlib, sys, time; (pathlib.Path(sys.argv[1]) / 'here').touch(); time.sleep(60)"
    steps = ("step('first', 'pass')", f"step('second', {waits!r})", "step('third', 'pass')")
    with subprocess.Popen(command(tmp_path, 1, *steps), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "here").exists():
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(10) == status
    assert {name: step["result"] for name, step in results(tmp_path).items()} == {
        "first": "ok",
        "second": "interrupted",
    }
    assert (tmp_path / "gpu-run.tar.gz").exists()


def test_nothing_is_left_of_an_earlier_run(tmp_path: Path) -> None:
    """But what is no run's is not touched."""
    (tmp_path / "mine").touch()
    clear(tmp_path)
    assert (tmp_path / "mine").exists()
    (tmp_path / "run.json").touch()
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "report.json").touch()
    clear(tmp_path)
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def test_shares() -> None:
    """By weight of what is left, at least what a step needs, and nothing where that is not left."""
    assert limits.share(100, [1, 3], 0) == 25
    assert limits.share(100, [1, 3], 40) == 40
    assert limits.share(100, [1], 0) == 100
    assert limits.share(30, [1, 3], 40) is None


def test_a_command_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert limits.run(["/no/such"], 1, log, os.environ, tmp_path) == 127
    assert "/no/such: cannot be started: No such file or directory" in log.read_text()


def test_what_no_signal_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = 2**22 + 1  # above all ids of processes
    monkeypatch.setattr(limits, "children", lambda: [nobody])
    monkeypatch.setattr(limits, "PATIENCE", 0.05)
    start = time.monotonic()
    limits.end(Mock(pid=nobody))
    assert 0.05 <= time.monotonic() - start < 1


def test_the_first_that_did_not_succeed_is_said_of_several() -> None:
    assert [outcome(each) for each in ([0, 0], [0, 3, None], [None, 3], [])] == [
        "ok",
        "failed (3)",
        "stopped at its limit",
        "ok",
    ]


# ---- what is said of results ---------------------------------------------------------------------------------------


def test_what_a_suite_found_is_its_last_line(tmp_path: Path) -> None:
    log = findings.log_of("parity float16", tmp_path)
    log.write_text("=== test session starts ===\n...\n==== 59 failed, 419 passed, 3 skipped in 75.00s (0:01:15) ====\n")
    assert findings.found("suite", "parity float16", tmp_path) == "59 failed, 419 passed, 3 skipped in 75.00s (0:01:15)"
    log.write_text("$ python -m pytest\nERROR: --device gpu: there is none\n\n")
    assert findings.found("suite", "parity float16", tmp_path) == "ERROR: --device gpu: there is none"


def test_what_a_comparison_found_is_every_engine_and_who_was_not_there(tmp_path: Path) -> None:
    def row(name: str, **found: Any) -> dict[str, Any]:
        return {"name": name, "error": "", "not_installed": [], "total_s": [], "encode_s": [], "token_s": []} | found

    rows = [
        row("maxwhisper float16", total_s=[0.5, 0.1, 0.2], encode_s=[0.002], token_s=[0.0005]),
        row("maxwhisper float16 batched", total_s=[0.1]),
        row("openai-whisper", error="interrupted before it was measured"),
        row("faster-whisper float16", not_installed=["ctranslate2"]),
        row("faster-whisper float16 batched", not_installed=["ctranslate2"]),
    ]
    (tmp_path / "speed-tiny.json").write_text(json.dumps({"audio_s": 300.0, "rows": rows}))
    assert findings.found("speed", "speed tiny", tmp_path) == (
        "maxwhisper float16 1,500.0 x real time, encoder 2.0 ms, token 0.50 ms;"
        " maxwhisper float16 batched 3,000.0 x real time; openai-whisper: interrupted before it was measured;"
        " not installed: faster-whisper"
    )


def test_what_the_doctor_found_is_the_gpu_and_what_is_red(tmp_path: Path) -> None:
    rows = [
        {"check": "driver", "state": "ok", "data": {}},
        {"check": "GPU", "state": "ok", "data": {"name": "NVIDIA Z1"}},
        {"check": "MAX", "state": "red", "data": {}},
    ]
    (tmp_path / "doctor.json").write_text(json.dumps({"rows": rows}))
    assert findings.found("doctor", "doctor", tmp_path) == "NVIDIA Z1; red: MAX"
    (tmp_path / "doctor.json").write_text("")
    findings.log_of("doctor", tmp_path).write_text("$ doctor\nno luck\n")
    assert findings.found("doctor", "doctor", tmp_path) == "no luck"


def test_what_a_profile_found_is_the_longest_and_what_was_not_there(tmp_path: Path) -> None:
    kernels = [{"name": f"kernel {n}", "calls": n, "microseconds": 1000.0 / n} for n in range(1, 6)]
    report = {"of": "kernels by torch.profiler", "kernels": kernels, "not_there": ["no nsys"]}
    (tmp_path / "kernels.json").write_text(json.dumps(report))
    assert findings.found("kernels", "kernels", tmp_path) == (
        "5 kernels by torch.profiler; kernel 1 1.0 ms in 1; kernel 2 0.5 ms in 2; kernel 3 0.3 ms in 3; no nsys"
    )
