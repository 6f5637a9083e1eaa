"""What a run of the suite has found: data, of which the lines at its end and the report are renderings."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from max.driver import Accelerator, accelerator_count

from maxwhisper.runtime import COMPILE_LOG

from .chain import Chain
from .faults import FaultVerdict
from .judge import Judgement, dtype_name
from .transcripts import Transcript

PACKAGES = ("maxwhisper", "max", "torch", "openai-whisper", "numpy")


@dataclass
class Run:
    """Everything a run has found.

    compare_seconds: in parity tests, without compiling.
    """

    judgements: list[Judgement] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)
    faults: list[FaultVerdict] = field(default_factory=list)
    transcripts: list[Transcript] = field(default_factory=list)
    test_seconds: float = 0.0
    exit_status: int = 0
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    command: str = field(default_factory=lambda: shlex.join(["pytest", *sys.argv[1:]]))

    @property
    def verdicts(self) -> list[Judgement]:
        """Isolated and chained."""
        return [*self.judgements, *(judgement for chain in self.chains for judgement in chain.judgements.values())]

    @property
    def pairs(self) -> int:
        """Pairs of measures compared, isolated and chained, and whole transcripts."""
        return sum(judgement.pairs for judgement in self.verdicts) + len(self.transcripts)

    @property
    def compared(self) -> bool:
        """Whether anything was: what is said of wrong models counts, for it is of the judge, but not as pairs."""
        return bool(self.pairs or self.faults)

    @property
    def recalled_pairs(self) -> int:
        """Those of outputs of MAX that an earlier run judged."""
        return sum(judgement.pairs for judgement in self.verdicts if judgement.recalled)

    @property
    def recalled_note(self) -> str:
        """Behind how many pairs were compared."""
        return f", {self.recalled_pairs:,} of them as MAX's outputs are those of before" if self.recalled_pairs else ""

    @property
    def passed(self) -> bool:
        judged = all(judgement.passed for judgement in self.judgements) and all(chain.passed for chain in self.chains)
        caught = all(fault.accepted for fault in self.faults)
        return self.compared and judged and caught and all(transcript.equal for transcript in self.transcripts)

    @property
    def compile_seconds(self) -> float:
        return sum(record.seconds for record in COMPILE_LOG)

    @property
    def compare_seconds(self) -> float:
        return max(0.0, self.test_seconds - self.compile_seconds)

    def summary_lines(self) -> list[str]:
        """The last lines of a run."""
        lines = []
        if self.pairs:
            lines.append(f"parity: {self.pairs} pairs compared in {self.compare_seconds:.1f} s{self.recalled_note}")
        if compared := [judgement for judgement in self.judgements if judgement.pairs]:
            worst = max(compared, key=lambda judgement: judgement.relative_l2.ratio)
            nearest = max(compared, key=lambda judgement: judgement.worst.used)
            lines.append(f"largest MAX error / PyTorch error {worst.relative_l2.ratio:.2f}: {worst.comparison}")
            lines.append(f"nearest to its budget {nearest.worst.used:.2f}, {nearest.worst.name}: {nearest.comparison}")
        for chain in self.chains:
            where = f"first divergence {chain.first_divergence}" if chain.first_divergence else "no divergence"
            lines.append(f"chain of {len(chain.judgements)} submodules, {where}: {chain.comparison}")
        lines += fault_lines(self.faults)
        if self.transcripts:
            equal = sum(transcript.equal for transcript in self.transcripts)
            lines.append(f"transcripts: {equal} of {len(self.transcripts)} equal to PyTorch Whisper's")
        return lines

    def write(self, folder: Path) -> None:
        """Writes report.html, report.json and summary.md into the folder."""
        from .report import write  # matplotlib, which only a report needs

        write(self, folder)


def fault_lines(faults: Sequence[FaultVerdict]) -> list[str]:
    lines = []
    for dtype in dict.fromkeys(fault.dtype for fault in faults):
        of = [fault for fault in faults if fault.dtype == dtype]
        caught, right = sum(fault.caught for fault in of), sum(fault.right_block for fault in of)
        missed = [fault for fault in of if not fault.caught]
        below = sum(fault.below_rounding for fault in missed)
        found = f"{dtype_name(dtype)}: {caught} of {len(of)} caught, {right} in the right block"
        lines.append(f"faults, {found}; {below} of the other {len(missed)} below PyTorch's rounding")
    return lines


def environment() -> dict[str, str]:
    """The machine and the versions that a run's figures belong to."""
    gpu = Accelerator().architecture_name if accelerator_count() else "none"
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "GPU": f"{torch.cuda.get_device_name()} ({gpu})" if torch.cuda.is_available() else gpu,
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
