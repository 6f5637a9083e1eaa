"""What became of mutants, by component, and which stayed green."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .controller import Outcome
from .equivalent import EQUIVALENT
from .mutant import COMPONENTS, Mutant

KILLED, RIGHT = 0.95, 0.9
"""Shares of the mutants that are not equivalent."""


@dataclass(frozen=True)
class Tried:
    """A mutant and what became of it."""

    mutant: Mutant
    outcome: Outcome

    @property
    def reason(self) -> str | None:
        """Returns why it changes nothing that could be seen, where somebody has found that."""
        mutant = self.mutant
        return EQUIVALENT.get((mutant.file, mutant.before, mutant.after))

    @property
    def killed(self) -> bool:
        return self.outcome.how not in ("survived", "unreached")


def compiled(mutants: Sequence[Mutant], outcomes: Mapping[int, Outcome]) -> list[Tried]:
    """Returns the mutants that the compiler did not refuse."""
    tried = (Tried(mutant, outcomes[mutant.number]) for mutant in mutants if mutant.number in outcomes)
    return [each for each in tried if each.outcome.how != "refused"]


def row(name: str, of: Sequence[Tried]) -> str:
    """Returns the line of a component: shares are of the mutants that are not equivalent."""
    equivalent = sum(not tried.killed and tried.reason is not None for tried in of)
    killed, right = sum(tried.killed for tried in of), sum(tried.outcome.right for tried in of)
    n = len(of) - equivalent
    shares = f"{killed} ({killed / n:.0%}) | {right} ({right / n:.0%})" if n else "0 | 0"
    unreached = sum(tried.outcome.how == "unreached" and tried.reason is None for tried in of)
    return f"| {name} | {len(of)} | {equivalent} | {shares} | {n - killed - unreached} | {unreached} |"


def report(mutants: Sequence[Mutant], outcomes: Mapping[int, Outcome]) -> Iterator[str]:
    """Yields the table by component, then every mutant that stayed green, or was killed elsewhere than expected."""
    tried = compiled(mutants, outcomes)
    yield "| component | mutants | equivalent | killed | in the right block or test | survived | in no test's way |"
    yield "|---|---|---|---|---|---|---|"
    for name, *_ in COMPONENTS:
        if of := [each for each in tried if each.mutant.component == name]:
            yield row(name, of)
    yield row("all", tried)
    for heading, shown in (
        ("stayed green", [each for each in tried if not each.killed and each.reason is None]),
        ("killed elsewhere", [each for each in tried if each.killed and not each.outcome.right]),
        ("equivalent", [each for each in tried if not each.killed and each.reason is not None]),
    ):
        if shown:
            yield f"\n{heading}:"
        for each in shown:
            yield f"  {each.mutant}\n    {each.outcome.how}{f': {each.outcome.by}' if each.outcome.by else ''}" + (
                f" ({each.reason})" if each.reason and not each.killed else ""
            )


def enough(mutants: Sequence[Mutant], outcomes: Mapping[int, Outcome]) -> bool:
    """Tells whether KILLED of the mutants that are not equivalent were killed, and RIGHT of them in the right place;
    none at all show nothing."""
    tried = compiled(mutants, outcomes)
    counted = [each for each in tried if each.killed or each.reason is None]
    killed, right = sum(each.killed for each in counted), sum(each.outcome.right for each in counted)
    return bool(counted) and killed >= KILLED * len(counted) and right >= RIGHT * len(counted)
