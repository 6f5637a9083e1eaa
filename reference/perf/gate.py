"""python -m reference.perf.gate BASE: has a block become slower on MAX since the git revision BASE?

Head is the working tree, base a checkout of BASE that is removed afterwards. Each is timed by a process of its own,
round by round in random order, with a pause before each; the other process is stopped meanwhile. A block fails if
the rounds differ by a Mann-Whitney test at p < 0.002 and head's median is more than 10 percent above base's, and both
again with fresh processes, twice: a process may be slow as a whole, for where its memory lies or its threads run.

Both are given head's inputs; a block that takes other inputs in base is given base's own there.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from maxwhisper.compare.run import written
from maxwhisper.errors import MaxWhisperError, OptionError

from ..commands import status
from ..fixtures import ROOT
from ..measures import DTYPES
from ..models import FIXTURE, SIZES
from ..reasons import one_line
from .engine import Setting, Worker
from .rank_test import RankTest, rank_test

CONFIRMATIONS = 2
"""How many more pairs of processes have to find a block slower before it fails."""
ROUND, PAUSE = 0.04, 0.01
"""Seconds that a round takes at least where a block is short, and seconds before it."""


class GateError(MaxWhisperError):
    """A comparison that cannot be made; the message says what is missing."""


@dataclass(frozen=True)
class Trees:
    """The two source trees of a gate.

    head, base: directories. revision: base as the user gave it, with its commit. base_artifacts: what base's graphs
    were compiled into, if they were; head's are those of the setting.
    """

    head: Path
    base: Path
    revision: str
    base_artifacts: str | None = None


@dataclass(frozen=True)
class Report:
    """What the gate found. added, removed: blocks that only head, or only base, has."""

    heading: str
    tests: Sequence[RankTest]
    added: Sequence[str]
    removed: Sequence[str]
    own_inputs: Sequence[str]

    @property
    def failed(self) -> list[str]:
        return [v.block for v in self.tests if v.failed]

    def markdown(self) -> str:
        lines = [
            self.heading,
            "",
            "| block | base, median | head, median | head / base | p | result |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for v in self.tests:
            note = "; each on inputs of its own, for they differ" if v.block in self.own_inputs else ""
            figures = f"{v.base * 1e3:.4g} ms | {v.head * 1e3:.4g} ms | {v.ratio:.2f} | {v.p:.1e}"
            lines.append(f"| {v.block} | {figures} | {v}{note} |")
        lines += [f"| {block} | | | | | new |" for block in self.added]
        lines += [f"| {block} | | | | | removed |" for block in self.removed]
        end = f"{len(self.failed)} failed: {', '.join(self.failed)}" if self.failed else "none failed"
        return "\n".join([*lines, "", f"{len(self.tests)} blocks timed, {end}.", ""])


# ---- the two trees -------------------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    """Returns what git prints. Raises GateError with the last line of its complaint."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise GateError(f"git {arguments[0]}: {done.stderr.strip().rpartition(chr(10))[2]}")
    return done.stdout.strip()


def commit_of(revision: str) -> str:
    """Returns the commit of a revision. Raises OptionError for one that is not known."""
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except GateError:
        raise OptionError(f"BASE '{revision}' is not known to git: expected a branch, tag or commit") from None


@contextmanager
def checked_out(revision: str) -> Iterator[Trees]:
    """Yields the revision in a worktree of its own, which is gone afterwards however this ends."""
    commit = commit_of(revision)
    with tempfile.TemporaryDirectory(prefix="perf-gate-") as folder:
        base = Path(folder) / "base"
        try:
            git("worktree", "add", "--detach", str(base), commit)
            yield Trees(ROOT, base, f"{revision} ({commit[:10]})")
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(base)], capture_output=True)


# ---- rounds --------------------------------------------------------------------------------------------------------


def base_worker(setting: Setting, trees: Trees) -> Worker:
    return Worker(replace(setting, artifacts=trees.base_artifacts), trees.base, f"base {trees.revision}")


@contextmanager
def workers(setting: Setting, trees: Trees) -> Iterator[tuple[Worker, Worker]]:
    """Yields fresh processes of base and head."""
    with base_worker(setting, trees) as base, Worker(setting, trees.head, "head") as head:
        yield base, head


def save_inputs(setting: Setting, trees: Trees, blocks: Sequence[str], own: Sequence[str], folder: Path) -> None:
    """Writes each block's inputs: head's, and base's too of those that take others there. By processes that time
    nothing, so that PyTorch, which makes the inputs, has not run in those that do."""
    with Worker(setting, trees.head, "head") as head:
        for block in blocks:
            head.ask("save", block=block, path=str(folder / f"{block}.head"))
    if own:
        with base_worker(setting, trees) as base:
            for block in own:
                base.ask("save", block=block, path=str(folder / f"{block}.base"))


def rounds(pair: tuple[Worker, Worker], block: str, files: tuple[Path, Path], n_round: int) -> RankTest:
    """Times a block on base and head by turns, in an order drawn for each pair of rounds."""
    for worker, file in zip(pair, files, strict=True):
        worker.ask("prepare", block=block, path=str(file), engine="MAX")
    slowest = max(min(worker.ask("time", block=block, calls=3)) for worker in pair)
    calls = max(1, round(ROUND / slowest))
    found: tuple[list[float], list[float]] = [], []
    for _ in range(n_round):
        for side in random.sample((0, 1), 2):
            time.sleep(PAUSE)
            found[side].append(median(pair[side].ask("time", block=block, calls=calls)))
    return rank_test(block, *found)


def timed(setting: Setting, trees: Trees, blocks: Sequence[str], own: Sequence[str], n_round: int) -> list[RankTest]:
    """Tests each block; one that fails is timed again by fresh processes, and the last test stands."""
    with tempfile.TemporaryDirectory() as folder:
        save_inputs(setting, trees, blocks, own, Path(folder))

        def tests(blocks: Sequence[str]) -> Iterator[RankTest]:
            with workers(setting, trees) as pair:
                for block in blocks:
                    files = [Path(folder) / f"{block}.{side if block in own else 'head'}" for side in ("base", "head")]
                    found = rounds(pair, block, (files[0], files[1]), n_round)
                    print(f"{block}: {found.ratio:.2f}, p {found.p:.1e}", file=sys.stderr, flush=True)
                    yield found

        found = {v.block: v for v in tests(blocks)}
        for _ in range(CONFIRMATIONS):
            if suspects := [block for block, v in found.items() if v.failed]:
                print(f"again, by fresh processes: {', '.join(suspects)}", file=sys.stderr, flush=True)
                found |= {v.block: v for v in tests(suspects)}
    return list(found.values())


# ---- the gate ------------------------------------------------------------------------------------------------------


def compare(setting: Setting, trees: Trees, wanted: Sequence[str], n_round: int) -> Report:
    """Times head's blocks, all of them or those that are wanted.

    Raises OptionError for a block that is in neither tree, GateError where no block is in both, WorkerError where a
    tree does not run.
    """
    with workers(setting, trees) as (base, head):
        before, after = base.takes, head.takes
    known = list(dict.fromkeys([*after, *before]))
    if unknown := [block for block in wanted if block not in known]:
        raise OptionError(f"--block {' '.join(unknown)} is not known: expected some of {', '.join(known)}")
    chosen = [block for block in known if not wanted or block in wanted]
    blocks = [block for block in chosen if block in after and block in before]
    if not blocks:
        raise GateError(f"nothing was timed: no block of {', '.join(chosen)} is in both head and base {trees.revision}")
    own = [block for block in blocks if before[block] != after[block]]
    return Report(
        f"MAX, {setting}: head against base {trees.revision}, medians of {n_round} rounds.",
        timed(setting, trees, blocks, own, n_round),
        [block for block in chosen if block not in before],
        [block for block in chosen if block not in after],
        own,
    )


def at_least_ten(text: str) -> int:
    """Reads a number of rounds: with fewer than ten of each, hardly any difference could reach p < 0.002."""
    number = int(text)
    if number < 10:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 10")
    return number


def folder_of_artifacts(text: str) -> str:
    """Returns a folder's absolute path, because each worker runs in its own tree."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected a folder of artifacts")
    return str(Path(text).resolve())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reference.perf.gate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("base", metavar="BASE", help="git revision to compare the working tree with")
    add("--size", default="tiny", choices=[FIXTURE, *SIZES], help="model (default: %(default)s)")
    add("--dtype", default="float32", choices=DTYPES, help="precision (default: %(default)s)")
    add("--device", default="cpu", choices=["cpu", "gpu"], help="what to compute on (default: %(default)s)")
    add("--block", nargs="+", default=[], metavar="NAME", help="blocks to time (default: all)")
    add("--artifacts", type=folder_of_artifacts, metavar="DIR", help="use the working tree's graphs compiled there")
    add("--base_artifacts", type=folder_of_artifacts, metavar="DIR", help="use BASE's graphs compiled there")
    add("--rounds", type=at_least_ten, default=40, help="of each revision and block (default: %(default)s)")
    add("--output", default="build/perf-gate.md", help="Markdown table (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return status("perf-gate", partial(gate, parse(arguments)))


def gate(options: argparse.Namespace) -> int:
    """Compares, prints the table and writes it; returns 1 if a block has become slower, or it could not be written."""
    with checked_out(options.base) as trees:
        setting = Setting(options.size, options.dtype, options.device, artifacts=options.artifacts)
        trees = replace(trees, base_artifacts=options.base_artifacts)
        report = compare(setting, trees, options.block, options.rounds)
    print(report.markdown(), flush=True)  # which is there whatever becomes of the file
    return 1 if not write(report, Path(options.output)) or report.failed else 0


def write(report: Report, path: Path) -> bool:
    """Writes the table, and returns whether that could be done: where not, says so and leaves no part of a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written(path, lambda unfinished: unfinished.write_text(report.markdown()))
    except (OSError, OptionError) as error:
        print(f"perf-gate: --output {error if isinstance(error, OptionError) else one_line(error)}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
