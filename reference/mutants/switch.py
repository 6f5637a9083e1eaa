"""Which mutant of the Python sources is in force in this process, and which have been reached; mutated sources ask."""

import os
from dataclasses import dataclass, field

VARIABLE = "MAXWHISPER_MUTANT"
"""The mutant that is in force from the start of a process, for what is only run then."""


@dataclass
class Switch:
    """in_force: the number of a mutant, 0 where there is none. run: those whose places were run."""

    in_force: int = 0
    run: set[int] = field(default_factory=set)


SWITCH = Switch(int(os.environ.get(VARIABLE, 0)))


def mutated(number: int) -> bool:
    """Tells whether a mutant is in force; what a mutated source asks at its place."""
    SWITCH.run.add(number)
    return SWITCH.in_force == number


def put_in_force(number: int) -> None:
    """Puts a mutant in force, in place of another; 0: none."""
    SWITCH.in_force = number


def reached() -> frozenset[int]:
    """Returns the mutants whose places were run since the last call."""
    found = frozenset(SWITCH.run)
    SWITCH.run.clear()
    return found
