"""A run of pytest over a mutated tree that takes orders: which tests to run with which mutant in force.

Started by `reference.mutants.controller` in the tree, with this module as a plugin (`-p`). Fixtures and models stay
from one order to the next, so that most mutants cost no more than the tests that they can fail. Orders and answers are
lines of JSON, through the two descriptors that PIPES names.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from _pytest.runner import runtestprotocol
from max.graph import Module as GraphModule
from max.nn.layer import Module

from maxwhisper.engine.program import Artifact, Program
from maxwhisper.network.blocks import BLOCKS

from ..activations import KINDS
from ..models import FIXTURE
from ..pytest_plugin.models import Models
from ..suite import Suite
from . import switch

PIPES = "MAXWHISPER_MUTANT_PIPES"
"""The descriptors of orders and of answers: "3 4"."""

Answer = Callable[..., None]


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Answers with the tests there are, then with what each order found, until there are no more orders."""
    orders_from, answers_to = map(int, os.environ[PIPES].split())
    worker = Worker(session)
    with os.fdopen(orders_from) as orders, os.fdopen(answers_to, "w", buffering=1) as answers:

        def answer(**what: Any) -> None:
            print(json.dumps(what), file=answers)

        answer(items=list(worker.items), reached=sorted(switch.reached()))
        for line in orders:
            order = json.loads(line)
            getattr(worker, order.pop("do"))(answer, **order)
    return True


@contextmanager
def in_force(mutant: int) -> Iterator[None]:
    """Has a mutant in force while it is entered."""
    switch.put_in_force(mutant)
    try:
        yield
    finally:
        switch.put_in_force(0)


class Worker:
    """The tests of a session, and what orders have done with them."""

    def __init__(self, session: pytest.Session):
        self.config = session.config
        self.items = {item.nodeid: item for item in session.items}
        self.others: Sequence[pytest.Item] = session.items

    def all(self, answer: Answer) -> None:
        """Runs every test without a mutant and answers which fail, and by test which places were run."""
        failed, reached = {}, {}
        for nodeid in self.items:
            if said := self.failure(nodeid):
                failed[nodeid] = said
            reached[nodeid] = sorted(switch.reached())
        answer(failed=failed, reached=reached)

    def traced(self, answer: Answer) -> None:
        """Answers by block which places are run while its graph is built."""
        found = {}
        for name in BLOCKS:
            switch.reached()
            self.program(name).trace(GraphModule())
            found[name] = sorted(switch.reached())
        answer(reached=found)

    def tests(self, answer: Answer, mutant: int, items: Sequence[str]) -> None:
        """Runs tests up to the first that fails with a mutant in force, and that again with none.

        Answers with each test before it runs; then with the one that failed, and whether it passes without."""
        failed = None
        for nodeid in items:
            answer(at=nodeid)
            with in_force(mutant):
                if self.failure(nodeid):
                    failed = nodeid
                    break
        answer(failed=failed, sound=failed is None or self.failure(failed) is None)

    def graphs(self, answer: Answer, pairs: Sequence[tuple[int, str]]) -> None:
        """Judges blocks with a mutant in force while their graphs are built, which compile together.

        pairs: of mutants and blocks. Answers by pair, in order, with what the judge says of the first comparison that
        fails, with the error where no graph could be built, or None.
        """
        said: list[str | None] = [None] * len(pairs)
        programs: dict[int, Program] = {}
        for at, (mutant, block) in enumerate(pairs):
            try:
                programs[at] = self.mutated_program(mutant, block)
                programs[at].trace(GraphModule())
            except Exception as error:
                programs.pop(at, None)
                said[at] = f"{type(error).__name__}: {error}"[:300]
        for at, found in self.judged(programs, pairs).items():
            said[at] = found
        answer(said=said)

    # ---- how -----------------------------------------------------------------------------------------------------

    @property
    def suite(self) -> Suite:
        return Models.of(self.config).suite(FIXTURE, torch.float32)

    def failure(self, nodeid: str) -> str | None:
        """Runs a test and returns what pytest says of its failure, None where it passes; what is shared stays."""
        item = self.items[nodeid]
        near = next((other for other in self.others if other.path == item.path and other is not item), self.others[0])
        item.session._setupstate.teardown_exact(item)  # of another module
        reports = runtestprotocol(item, log=False, nextitem=near)
        return next((str(report.longrepr)[-400:] for report in reports if report.failed), None)

    def program(self, block: str) -> Program:
        return BLOCKS[block].program(self.suite.dims, self.suite.policy)

    def mutated_program(self, mutant: int, block: str) -> Program:
        """Returns a block as a graph that a mutant is in force in."""
        with in_force(mutant):
            right = self.program(block)

        def function(module: Module, **inputs: Any) -> Any:
            with in_force(mutant):
                return right.function(module, **inputs)

        return Program(f"mutant {mutant} in {block}", right.path, right.module, function, right.inputs)

    def judged(self, programs: dict[int, Program], pairs: Sequence[tuple[int, str]]) -> dict[int, str | None]:
        """Returns what is said of each program, compiled with the others, or alone where these do not compile."""
        if not programs:
            return {}
        try:
            artifact = Artifact("mutants", list(programs.values()), "cpu")
        except Exception as error:
            if len(programs) == 1:
                return dict.fromkeys(programs, f"{type(error).__name__}: {error}"[:300])
            return {at: said for each in programs for at, said in self.judged({each: programs[each]}, pairs).items()}
        return {at: self.judgement(artifact, program, pairs[at][1]) for at, program in programs.items()}

    def judgement(self, artifact: Artifact, program: Program, block: str) -> str | None:
        """Returns what the judge says of the first comparison of a block that fails."""
        suite = self.suite
        for layer in range(BLOCKS[block].n_layer(suite.dims)):
            try:
                run = artifact.init(suite.subject.tensors, **suite.subject.numbers(layer))[program.name]
                for comparison in suite.comparisons(BLOCKS[block], KINDS):
                    if comparison.layer == layer and not suite.judge(comparison, run).passed:
                        return f"isolated {comparison}"
            except Exception as error:
                return f"{type(error).__name__}: {error}"[:300]
        return None
