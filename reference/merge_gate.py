"""The one required check of a merge: every job succeeded, and what they report was compared, on the device they claim.

    python -m reference.merge_gate --needs '{"parity": {"result": "success"}}' --report parity:cpu:report.json

A job that was skipped or cancelled has shown nothing, and so has one that compared nothing: both fail. A fork's pull
request is given no GPU runner; its GPU jobs are excused by name, and run when it is queued to be merged.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any


def objections(needs: dict[str, dict[str, Any]], excused: Collection[str], reports: Collection[str]) -> list[str]:
    """Says why the merge must not happen; nothing if it may.

    needs: GitHub's `needs` context. excused: jobs that may have been skipped. reports: job, device and the path of a
    report.json or of pytest-benchmark's JSON, with colons between them.
    """
    if not needs:
        return ["no job is needed"]
    reasons = [
        f"{job}: {of['result']}"
        for job, of in needs.items()
        if of["result"] != "success" and not (of["result"] == "skipped" and job in excused)
    ]
    for report in reports:
        job, device, path = report.split(":", 2)
        if job not in needs:
            reasons.append(f"{job}: is to report, but is not needed")
        elif needs[job]["result"] == "success":
            reasons += [f"{job}: {reason}" for reason in missing(Path(path), device)]
    return reasons


def missing(path: Path, device: str) -> Iterator[str]:
    """Yields what a report lacks to show anything about a device."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        yield f"{path}: cannot be read: {error}"
        return
    try:
        yield from (f"{path}: {reason}" for reason in lacking(report, device))
    except (KeyError, TypeError):
        yield f"{path}: is no report"


def lacking(report: dict[str, Any], device: str) -> Iterator[str]:
    """Yields what the content of a report lacks to show anything about a device; raises KeyError or TypeError for what
    is no report."""
    if "benchmarks" in report:
        if not any(benchmark["group"].endswith(f", {device}") for benchmark in report["benchmarks"]):
            yield f"no benchmark ran on {device}"
        return
    if not report["passed"]:
        yield report["reason"]
    compared = [each for each in report["judgements"] if each["comparison"]["device"] == device]
    if not sum(judgement["pairs"] for judgement in compared):
        yield f"compared nothing on {device}"


def as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error


def of_a_job(text: str) -> str:
    if text.count(":") < 2:
        raise argparse.ArgumentTypeError(f"{text}: expected JOB:DEVICE:PATH")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reference.merge_gate", description=__doc__)
    parser.add_argument("--needs", required=True, type=as_json, help="GitHub's needs context, as JSON")
    parser.add_argument("--excused", default="", help="jobs that may have been skipped, with spaces between them")
    parser.add_argument("--report", action="append", default=[], type=of_a_job, metavar="JOB:DEVICE:PATH")
    options = parser.parse_args(arguments)
    reasons = objections(options.needs, options.excused.split(), options.report)
    print("\n".join(reasons) or "every job succeeded and compared something")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
