"""The run itself: python3 -m reference.gpu_run, which scripts/gpu-runner.sh starts in the project's root.

Exit status: 0 if every step succeeded, 1 if one did not or was not run, 2 for an unusable option, 130 after Ctrl-C.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from . import findings, limits, offline, results
from .results import Record, Result
from .steps import STEPS, Step, Workspace

TO_PACK = 5.0
"""Seconds kept for the table and the archive, at most a tenth of all."""
SHOWN = 12
"""Lines of a step's log that are shown where it did not succeed."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu-runner.sh: {message}\n")


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns what the command line says; raises SystemExit(2) for what cannot be met."""
    parser = Parser(prog="scripts/gpu-runner.sh", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--minutes", type=minutes, default=60.0, metavar="N", help="for everything together (default: 60)")
    add("--out", type=folder, default=Path("build", "gpu"), metavar="DIR", help="for the results (default: build/gpu)")
    add("--device", choices=["gpu", "cpu"], default="gpu", help="cpu rehearses the same without a GPU (default: gpu)")
    add("--offline", type=folder, metavar="BUNDLE", help="use what `make gpu-bundle` has made, and no network")
    given = parser.parse_args(arguments)
    if given.offline:
        try:
            offline.check(given.offline)
        except offline.BundleError as error:
            parser.error(f"argument --offline: {error}")
    return given


def minutes(value: str) -> float:
    """Returns a number of minutes; raises ArgumentTypeError for what is none above 0."""
    with suppress(ValueError):
        if 0 < float(value) < float("inf"):
            return float(value)
    raise argparse.ArgumentTypeError(f"must be a number above 0, not '{value}'")


def folder(value: str) -> Path:
    """Returns the path of a folder; raises ArgumentTypeError for none."""
    if not value:
        raise argparse.ArgumentTypeError("must name a folder")
    return Path(value).absolute()


class Run:
    """A run under way. deadline: when the last step has to have ended, by `time.monotonic`."""

    def __init__(self, workspace: Workspace, deadline: float, record: Record):
        self.workspace, self.deadline, self.record = workspace, deadline, record

    def all(self, steps: Sequence[Step]) -> None:
        """Runs steps one after the other; the results of each are on disk before the next one begins."""
        for number, step in enumerate(steps):
            left = self.deadline - time.monotonic()
            limit = limits.share(left, [each.weight for each in steps[number:]], step.least)
            if limit is None:
                print(f"== {step.name}: {results.NO_TIME}", flush=True)
                self.keep(Result(step.name, results.NO_TIME))
                continue
            try:
                self.keep(self.one(step, left if step.whole else limit))
            except BaseException:
                self.keep(Result(step.name, results.INTERRUPTED))
                raise

    def keep(self, result: Result) -> None:
        self.record = replace(self.record, steps=(*self.record.steps, result))
        results.write(self.record, self.workspace.out)

    def one(self, step: Step, limit: float) -> Result:
        """Runs a step: its commands, whatever becomes of the one before, each with an even share of what is left."""
        print(f"== {step.name}, at most {limit:.0f} s", flush=True)
        workspace, start = self.workspace.with_artifacts(), time.monotonic()
        log, statuses = findings.log_of(step.name, workspace.out), []
        commands = step.commands(workspace)
        for number, command in enumerate(commands):
            left = limit - (time.monotonic() - start)
            output = workspace.out / command.output if command.output else None
            even = left / (len(commands) - number)
            statuses.append(limits.run(command.arguments, even, log, environment(workspace), workspace.root, output))
        seconds, text = time.monotonic() - start, outcome(statuses)
        if text != results.OK:
            print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]))
        print(f"== {step.name}: {text}, {seconds:.0f} s", flush=True)
        return Result(step.name, text, seconds, limit, findings.found(step.kind, step.name, workspace.out))


def outcome(statuses: Sequence[int | None]) -> str:
    """Returns what became of a step by what became of its commands: the first that did not succeed."""
    status = next((status for status in statuses if status != 0), 0)
    if status is None:
        return "stopped at its limit"
    return f"failed ({status})" if status else results.OK


def environment(workspace: Workspace) -> dict[str, str]:
    """Returns the variables of every command: this project's modules before all others, and no looking for models."""
    paths = os.pathsep.join(filter(None, [str(workspace.root), os.getenv("PYTHONPATH")]))
    own = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if workspace.bundle:
        own |= {"PIP_NO_INDEX": "1", "XDG_CACHE_HOME": str(workspace.bundle / offline.UNPACKED / "cache")}
    return {**os.environ, **own}


def commit(root: Path) -> str:
    """Returns the revision of the project, if this is a clone and git is there."""
    with suppress(OSError):
        git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {(names or [platform.machine()])[0]}, Python {platform.python_version()}"


def clear(out: Path) -> None:
    """Makes the folder of results; those of an earlier run go, so that none of them is taken for one of this."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / results.RECORD).exists():
        for file in [each for each in out.rglob("*") if not each.is_dir()]:
            file.unlink()


def stop(signum: int, _: object) -> NoReturn:
    raise SystemExit(128 + signum)


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    start, given, root = time.monotonic(), options(arguments), Path.cwd()
    bundle = given.offline
    python = offline.python(bundle) if bundle else root / ".venv" / "bin" / "python"
    workspace = Workspace(root, given.out, python, given.device, bundle)
    clear(workspace.out)
    limits.adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    revision = offline.read(bundle)["commit"] if bundle else commit(root)
    begun = time.strftime("%Y-%m-%d %H:%M:%S")
    seconds = given.minutes * 60
    deadline = start + seconds - min(TO_PACK, seconds / 10)
    run = Run(workspace, deadline, Record(given.minutes, given.device, machine(), revision, begun))
    try:
        run.all([step for step in steps if not (bundle and step.online)])
    except KeyboardInterrupt:
        return 130
    finally:
        results.write(run.record, workspace.out)
        packed = results.archive(workspace.out)
        print(f"\n{results.table(run.record)}\n{workspace.out / results.TABLE}\n{packed}", flush=True)
    return 0 if run.record.succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
