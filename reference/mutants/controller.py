"""Runs the suite over mutants: which tests see them, and whether these are the right ones."""

import json
import os
import re
import selectors
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from maxwhisper.network.blocks import BLOCKS

from .mutant import COMPONENTS, OWN_BLOCKS, Mutant
from .switch import VARIABLE
from .tree import compiles, plant, sources_hash
from .worker import PIPES

SELECTION = ("tests/parity", "--benchmark-disable", "--size", "fixture", "--dtype", "float32")
"""What a mutant has to pass."""
PATIENCE = 120
"""Seconds that a test may take with a mutant in force; without one the slowest takes 5."""
UP_TO_THE_FIRST = (
    *("-x", "-q", "-rfE", "--tb=no"),
    # A test that is the first to need a graph compiles it.
    *("-o", f"faulthandler_timeout={4 * PATIENCE}", "-o", "faulthandler_exit_on_timeout=true"),
)
"""With what a process of its own stops at the first test that fails, or takes too long."""
KERNELS_AT_A_TIME = 2
"""Mutants of kernels that are tried together: a compilation has one core at work, and takes 3 GB."""
GRAPHS_AT_A_TIME = 16
"""Mutated graphs that compile together."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    by: the test that failed, or None. how: "test", "error", "crash" or "hang"; "survived"; "unreached", where no test
    runs its place. right: whether what failed names the mutant's component, or its block.
    """

    mutant: int
    how: str
    by: str | None = None
    right: bool = False


class WorkerDied(Exception):
    """A worker that ended, or was ended after PATIENCE; how: "crash" or "hang". at: the test that it was at."""

    def __init__(self, how: str, at: str | None):
        self.how, self.at = how, at
        super().__init__(f"{how} at {at}")


class Session:
    """A worker in a tree, started when it is first asked, and again after it has died. items: the ids of its tests.
    collected: what it had reached by then."""

    def __init__(self, tree: Path):
        self.tree = tree
        self.process: subprocess.Popen | None = None
        self.items: list[str] = []
        self.collected: list[int] = []

    def start(self) -> None:
        orders, self.orders = os.pipe()
        self.answers, answers = os.pipe()
        environ = {**os.environ, "PYTHONPATH": str(self.tree), PIPES: f"{orders} {answers}"}
        command = [sys.executable, "-m", "pytest", "-p", "reference.mutants.worker", *SELECTION]
        with (self.tree / "worker.log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.tree, env=environ, pass_fds=(orders, answers), stdout=log, stderr=log
            )
        for end in (orders, answers):
            os.close(end)
        self.held = b""
        first = self.answer(None)
        self.items, self.collected = first["items"], first["reached"]

    def ask(self, do: str, patience: float | None = None, **order: Any) -> dict[str, Any]:
        """Returns the last answer to an order; raises WorkerDied."""
        if not self.process:
            self.start()
        os.write(self.orders, (json.dumps({"do": do, **order}) + "\n").encode())
        at = None
        while "at" in (answer := self.answer(patience, at)):
            at = answer["at"]
        return answer

    def answer(self, patience: float | None, at: str | None = None) -> dict[str, Any]:
        while b"\n" not in self.held:
            with selectors.DefaultSelector() as selector:
                selector.register(self.answers, selectors.EVENT_READ)
                if not selector.select(patience):
                    self.stop()
                    raise WorkerDied("hang", at)
            if not (more := os.read(self.answers, 1 << 20)):
                self.stop()
                raise WorkerDied("crash", at)
            self.held += more
        line, _, self.held = self.held.partition(b"\n")
        return json.loads(line)

    def stop(self) -> None:
        """Ends the worker, if there is one."""
        if self.process:
            self.process.kill()
            self.process.wait()
            for end in (self.orders, self.answers):
                os.close(end)
            self.process = None


@dataclass
class Trials:
    """Mutants of a tree on trial. found: outcomes so far, by number, each written to `record` as it comes; those that
    a run before this one has left there, of the same sources, are not found again."""

    tree: Path
    mutants: Sequence[Mutant]
    record: Path
    found: dict[int, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session = Session(self.tree)
        self.sound: set[str] = set()
        # In other sources the numbers are of other mutants, and other tests may see them.
        sources = json.dumps({"sources": sources_hash()}) + "\n"
        lines = self.record.read_text().splitlines(keepends=True) if self.record.exists() else []
        kept = [line for line in lines if line.endswith("\n")]  # but for what a run was cut off in
        if kept[:1] != [sources]:
            kept = [sources]
        self.found |= {outcome.mutant: outcome for outcome in (Outcome(**json.loads(line)) for line in kept[1:])}
        self.record.write_text("".join(kept))

    def note(self, outcome: Outcome) -> None:
        self.found[outcome.mutant] = outcome
        with self.record.open("a") as record:
            print(json.dumps(vars(outcome)), file=record)

    @property
    def left(self) -> list[Mutant]:
        """Returns those that nothing is known of yet, in the order of COMPONENTS."""
        order = [name for name, *_ in COMPONENTS]
        left = [mutant for mutant in self.mutants if mutant.number not in self.found]
        return sorted(left, key=lambda mutant: order.index(mutant.component))

    # ---- which tests run a mutant's place ------------------------------------------------------------------------

    @cached_property
    def reached(self) -> dict[str, dict[str, list[int]]]:
        """Returns which places are run: "first" by test, the first time; "live" by test, when models are loaded and
        graphs built; "traced" by block, while its graph is built.

        Raises RuntimeError if a test fails without a mutant.
        """
        first, live = self.session.ask("all"), self.session.ask("all")
        if failed := first["failed"] | live["failed"]:
            raise RuntimeError(f"fail without a mutant: {json.dumps(failed, indent=2)}")
        once = {"collection": self.session.collected, **first["reached"]}
        return {"first": once, "live": live["reached"], "traced": self.session.ask("traced")["reached"]}

    @property
    def live(self) -> dict[str, list[int]]:
        return self.reached["live"]

    @property
    def traced(self) -> dict[str, list[int]]:
        return self.reached["traced"]

    def blocks_of(self, mutant: Mutant) -> list[str]:
        """Returns the blocks that run the mutant's place and hold no other that does."""
        running = {name for name, reached in self.traced.items() if mutant.number in reached}
        running |= {
            name for item, reached in self.live.items() if mutant.number in reached and (name := block_of(item))
        }
        return [name for name in running if not any(inside(other, name) for other in running)]

    def ordered(self, mutant: Mutant, tests: Iterable[str]) -> list[str]:
        """Returns tests in the order in which somebody would run them who has changed that place."""
        blocks, own = self.blocks_of(mutant), mutant.right_file
        return sorted(tests, key=lambda test: (not self.is_right(mutant, test, blocks), own not in test))

    def is_right(self, mutant: Mutant, test: str | None, blocks: Sequence[str]) -> bool:
        """Tells whether a test that fails names the mutant's component: its innermost blocks, or its file of tests."""
        if test is None:
            return False
        return block_of(test) in blocks if mutant.right == "blocks" else mutant.right_file in test

    # ---- the trials ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Tries every mutant that is left: with all loaded, then in its graph, then in a process of its own."""
        if not self.left:
            return
        live = {number for reached in self.live.values() for number in reached}
        traced = {number for reached in self.traced.values() for number in reached}
        once = {n for test, some in self.reached["first"].items() for n in set(some) - set(self.live.get(test, ()))}
        for mutant in self.left:
            # What builds graphs is seen best in the innermost of them; a test may load a model each time it runs.
            if mutant.number in live and (mutant.number not in traced or self.right_tests(mutant)):
                self.try_live(mutant)
        self.try_graphs([mutant for mutant in self.left if mutant.number in traced])
        self.session.stop()
        for mutant in self.left:
            # Where models are loaded, or graphs built, which are kept.
            outcome = self.tried_alone(mutant, with_parity=mutant.number in once | traced)
            reached = outcome.how != "survived" or mutant.number in live | once | traced
            self.note(outcome if reached else Outcome(mutant.number, "unreached"))

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Returns the tests that run a mutant's place, in the order in which somebody would run them."""
        return self.ordered(mutant, [test for test, reached in self.live.items() if mutant.number in reached])

    def right_tests(self, mutant: Mutant) -> list[str]:
        """Returns those of them that are right ones."""
        blocks = self.blocks_of(mutant)
        return [test for test in self.tests_of(mutant) if self.is_right(mutant, test, blocks)]

    def try_live(self, mutant: Mutant) -> None:
        how, by = "test", None
        try:
            answer = self.session.ask("tests", PATIENCE, mutant=mutant.number, items=self.tests_of(mutant))
            if not answer["sound"]:  # what it left behind would be blamed on the next
                self.session.stop()
            by = answer["failed"]
        except WorkerDied as death:
            how, by = death.how, death.at
        if how == "test" and not by:
            return
        right = self.is_right(mutant, by, self.blocks_of(mutant))
        outcome = Outcome(mutant.number, how, by, right)
        if not right and (in_own_tests := self.tried_alone(mutant, with_parity=False)).how != "survived":
            outcome = in_own_tests
        self.note(outcome)

    def try_graphs(self, mutants: Sequence[Mutant]) -> None:
        """Tries mutants that are in force while graphs are built, in the innermost blocks that these build.

        Raises RuntimeError if one of these blocks fails without a mutant.
        """
        pairs = [(mutant.number, block) for mutant in mutants for block in self.blocks_of(mutant)[:2]]
        pairs = [*((0, block) for block in dict.fromkeys(block for _, block in pairs)), *pairs]
        for start in range(0, len(pairs), GRAPHS_AT_A_TIME):
            some = pairs[start : start + GRAPHS_AT_A_TIME]
            try:
                said = self.session.ask("graphs", 10 * PATIENCE, pairs=some)["said"]
            except WorkerDied:
                continue  # each then has a process of its own
            for (number, block), what in zip(some, said, strict=True):
                if what and not number:
                    raise RuntimeError(f"{block} fails without a mutant: {what}")
                if what and number not in self.found:
                    how = "test" if what.startswith("isolated") else "error"
                    self.note(Outcome(number, how, f"{block}: {what}", True))

    def tried_alone(self, mutant: Mutant, with_parity: bool) -> Outcome:
        """Tries a mutant in processes that have it in force from the start: the unit tests of its file, and where the
        suite is to be run too, its right tests before, and all others behind."""
        before, behind = ([[mutant.right_file]], [["tests/parity"]]) if with_parity else ([], [])
        if mutant.right_file in mutant.unit_tests:
            before = []
        self.check(file for selection in (*before, mutant.unit_tests) for file in selection)
        return tried_alone(mutant, self.tree, [*before, mutant.unit_tests], behind)

    def check(self, files: Iterable[str]) -> None:
        """Raises RuntimeError if a file of tests fails without a mutant; runs each once."""
        for file in files:
            none = Mutant(0, "", 0, "", "", "")
            if file not in self.sound and (outcome := tried_alone(none, self.tree, [[file]], [])).how != "survived":
                raise RuntimeError(f"{file} fails without a mutant: {outcome.by}")
            self.sound.add(file)

    def try_kernels(self, mutants: Iterable[Mutant]) -> None:
        """Tries mutants of kernels, each in a checkout of its own, KERNELS_AT_A_TIME."""
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(KERNELS_AT_A_TIME):
            trees.put(self.tree.with_name(f"{self.tree.name}-kernels-{number}"))

        def trial(mutant: Mutant) -> Outcome:
            tree = trees.get()
            try:
                return tried_in_kernel(mutant, tree)
            finally:
                trees.put(tree)

        left = [mutant for mutant in mutants if mutant.number not in self.found]
        for mutant in left:
            self.check([mutant.right_file, *mutant.unit_tests])
        with ThreadPoolExecutor(KERNELS_AT_A_TIME) as pool:
            for trying in as_completed([pool.submit(trial, mutant) for mutant in left]):
                self.note(trying.result())


def tried_in_kernel(mutant: Mutant, tree: Path) -> Outcome:
    """Tries a mutant of a kernel: the smallest blocks that run it, its unit tests, then all other comparisons."""
    plant([mutant], tree)
    if not compiles(tree):
        return Outcome(mutant.number, "refused")
    own = OWN_BLOCKS.get(mutant.file)
    first = [] if mutant.right_file in mutant.unit_tests else [[mutant.right_file, *(["-k", own] if own else [])]]
    return tried_alone(mutant, tree, [*first, mutant.unit_tests], [["tests/parity"]])


def tried_alone(
    mutant: Mutant, tree: Path, right_ones: Sequence[Sequence[str]], others: Sequence[Sequence[str]]
) -> Outcome:
    """Runs selections of tests in a tree, one after the other, until one fails."""
    environ = {**os.environ, "PYTHONPATH": str(tree), VARIABLE: str(mutant.number)}
    for selection in (*right_ones, *others):
        command = [sys.executable, "-m", "pytest", *selection, *SELECTION[1:], *UP_TO_THE_FIRST]
        right = selection in right_ones
        with told_by_sources(mutant, tree):
            ended = subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)
        if "Timeout (" in ended.stderr:
            return Outcome(mutant.number, "hang", selection[0], right)
        nothing_chosen = right and ended.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
        if ended.returncode and not nothing_chosen:
            named = re.search(r"(?m)^(FAILED|ERROR) (\S+)", ended.stdout)
            how = "test" if named and named[1] == "FAILED" else "error"
            by = named[2] if named else (ended.stdout + ended.stderr)[-300:]
            # Among all tests, those that are right by their file's name.
            right = right or mutant.right != "blocks" and mutant.right_file in by
            return Outcome(mutant.number, how, by, right)
    return Outcome(mutant.number, "survived")


@contextmanager
def told_by_sources(mutant: Mutant, tree: Path) -> Iterator[None]:
    """Has a file of the sources name the mutant: graphs are kept under their hash, and those of another would be found.
    Not for longer, or whoever has none in force would find this one's."""
    file = tree / "maxwhisper" / "network" / "in_force.py"
    file.write_text(f"# {mutant.number}\n")
    try:
        yield
    finally:
        file.unlink()


def block_of(test: str) -> str | None:
    """Returns the block that a test compares alone, None for another."""
    found = re.search(r"test_isolated\[\w+-\w+-([\w.]+)-", test)
    return found[1] if found else None


def inside(inner: str, outer: str) -> bool:
    """Tells whether a block is a part of another."""
    return BLOCKS[inner].path != BLOCKS[outer].path and f"{BLOCKS[inner].path}.".startswith(f"{BLOCKS[outer].path}.")
