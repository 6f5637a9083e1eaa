"""What a run of the suite has found: data, of which the lines at its end and the report are renderings."""

import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import torch
from max.driver import Accelerator, accelerator_count

from maxwhisper.compare.run import processor

from .chain import Chain
from .compile_log import CompileRecord
from .faults import FaultResult, fault_totals
from .judge import Judgement, severity
from .reasons import one_line
from .transcripts import Transcript
from .versions import version

PACKAGES = ("maxwhisper", "max", "torch", "openai-whisper", "numpy")
FOUND = ("judgements", "chains", "faults", "transcripts", "held", "waits", "compiled", "lost")
"""Fields of a run that its tests fill."""


@dataclass
class Run:
    """Everything a run has found.

    compare_seconds: in parity tests, without `waits`, the seconds that these waited for a compiler, here or in another
    process. waiting: for another process, since the last report of a test. held: parity tests that passed and leave no
    verdict, as those of loaders and of properties do, by id. lost: why verdicts are missing that should be there, a
    line each; a run that lost some has not passed. notes: other lines to be said at its end, by what they are about.
    """

    judgements: list[Judgement] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)
    faults: list[FaultResult] = field(default_factory=list)
    transcripts: list[Transcript] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    compiled: list[CompileRecord] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    waiting: float = 0.0
    test_seconds: float = 0.0
    exit_status: int = 0
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    command: str = field(default_factory=lambda: shlex.join(["pytest", *sys.argv[1:]]))

    def note(self, line: str, about: str = "") -> None:
        """Keeps a line to be said at the end, unless there is one about the same already."""
        self.notes.setdefault(about or line, line)

    @property
    def anything(self) -> bool:
        """Tells whether there is anything that another process should know."""
        return bool(self.notes) or any(getattr(self, name) for name in FOUND)

    def taken(self) -> "Run":
        """Returns what was found, and forgets it here."""
        found = Run(notes=self.notes, **{name: getattr(self, name) for name in FOUND})
        self.notes = {}
        for name in FOUND:
            setattr(self, name, [])
        return found

    def add(self, found: "Run") -> None:
        """Adds what was found elsewhere, for instance by a worker of this run."""
        for name in FOUND:
            getattr(self, name).extend(getattr(found, name))
        for about, line in found.notes.items():
            self.note(line, about)

    @property
    def verdicts(self) -> list[Judgement]:
        """Returns all verdicts, isolated and chained."""
        return [*self.judgements, *(judgement for chain in self.chains for judgement in chain.judgements.values())]

    @property
    def pairs(self) -> int:
        """Counts the pairs of measures compared, isolated and chained, and whole transcripts."""
        return sum(judgement.pairs for judgement in self.verdicts) + len(self.transcripts)

    @property
    def compared(self) -> bool:
        """Tells whether anything was compared: what is said of wrong models counts, though not as pairs."""
        return bool(self.pairs or self.faults or self.held)

    @property
    def recalled_pairs(self) -> int:
        """Counts the pairs of outputs of MAX that an earlier run judged."""
        return sum(judgement.pairs for judgement in self.verdicts if judgement.recalled)

    @property
    def recalled_note(self) -> str:
        """Returns what is said behind the number of pairs that were compared."""
        return f", {self.recalled_pairs:,} of them as MAX's outputs are those of before" if self.recalled_pairs else ""

    @property
    def compile_seconds(self) -> float:
        return sum(record.seconds for record in self.compiled)

    @property
    def graphs_compiled(self) -> int:
        return sum(record.graphs for record in self.compiled)

    @property
    def compare_seconds(self) -> float:
        return max(0.0, self.test_seconds - sum(self.waits))

    def summary_lines(self) -> list[str]:
        """Returns the last lines of a run."""
        lines = []
        if self.pairs:
            lines.append(f"parity: {self.pairs} pairs compared in {self.compare_seconds:.1f} s{self.recalled_note}")
        if compared := [judgement for judgement in self.judgements if judgement.pairs]:
            worst = max(compared, key=lambda judgement: severity(judgement.relative_l2.ratio))
            nearest = max(compared, key=lambda judgement: severity(judgement.worst.used))
            lines.append(f"largest MAX error / PyTorch error {worst.relative_l2.ratio:.2f}: {worst.comparison}")
            lines.append(f"nearest to its budget {nearest.worst.used:.2f}, {nearest.worst.name}: {nearest.comparison}")
        for chain in self.chains:
            where = f"first divergence {chain.first_divergence}" if chain.first_divergence else "no divergence"
            lines.append(f"chain of {len(chain.judgements)} submodules, {where}: {chain.comparison}")
        lines += fault_lines(self.faults)
        if self.transcripts:
            equal = sum(transcript.equal for transcript in self.transcripts)
            lines.append(f"transcripts, float32: {equal} of {len(self.transcripts)} equal to PyTorch Whisper's")
        return lines


def fault_lines(faults: Sequence[FaultResult]) -> list[str]:
    return [
        f"faults, {dtype}: {t.caught} of {t.n} caught, {t.right_block} in the right block; "
        f"{t.below} of the other {t.n - t.caught} below PyTorch's rounding"
        for dtype, t in fault_totals(faults).items()
    ]


def environment() -> dict[str, str]:
    """Returns the machine and the versions that a run's figures belong to; of what cannot be told, why."""
    facts: dict[str, Callable[[], object]] = {
        "processor": processor,
        "cores": os.cpu_count,
        "system": platform.platform,
        "GPU": gpu,
        "Python": platform.python_version,
        **{name: partial(version, name) for name in PACKAGES},
    }
    return {name: fact_or_reason(fact) for name, fact in facts.items()}


def fact_or_reason(fact: Callable[[], object]) -> str:
    try:
        return str(fact())
    except Exception as error:
        return f"unknown: {one_line(error)}"


def gpu() -> str:
    """Returns the GPU's name and MAX's for its architecture, "none" where there is none."""
    found = Accelerator().architecture_name if accelerator_count() else "none"
    return f"{torch.cuda.get_device_name()} ({found})" if torch.cuda.is_available() else found
