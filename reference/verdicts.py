"""Verdicts of earlier runs on the very same outputs of MAX.

Most of a run's time goes into PyTorch's computations, in float64 above all. MAX computes everything in every run; but
where its outputs are bitwise what they were when a comparison was last judged, and so is all else that the verdict
depends on, the verdict is the same and is not found again. Only verdicts that passed are kept.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import maxwhisper.network.blocks

from .judge import Comparison, Judgement, Measure, Output, dtype_name
from .reasons import one_line
from .versions import version

JUDGES = ("torch", "openai-whisper", "numpy")
"""Packages that a verdict depends on."""
LIBRARIES = ("ATEN_", "ONEDNN_", "DNNL_", "MKL_")
"""What the names of variables begin with that choose PyTorch's code, or its arithmetic."""
JUDGE, TABLE = Path(__file__).parent, Path(maxwhisper.network.blocks.__file__)


class Memory(Protocol):
    """What outlives a run, as pytest's cache does; a value that cannot be read is one that is not there."""

    def get(self, key: str, default: Any) -> Any: ...

    def set(self, key: str, value: object) -> None: ...


@dataclass(frozen=True)
class Lenient:
    """A memory into which it is not worth failing to write: what cannot be kept is found again by the next run.

    say: is given one line, and what it is about, for every value that cannot be kept.
    """

    memory: Memory
    say: Callable[[str, str], object]

    def get(self, key: str, default: Any) -> Any:
        return self.memory.get(key, default)

    def set(self, key: str, value: object) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # pytest's cache warns where it does not raise
                self.memory.set(key, value)
        except (OSError, Warning) as error:
            cause = error.__context__ if isinstance(error, Warning) and error.__context__ else error
            why = getattr(cause, "strerror", None) or one_line(cause)  # its files have names of no meaning
            self.say(
                f"pytest's cache keeps nothing for the next run ({why}); -o cache_dir=DIR has it elsewhere", "cache"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on one model, on this machine's CPU. model: a fingerprint of its weights."""

    memory: Memory
    model: str

    def recalled(
        self, name: str, tensors: Mapping[str, Tensor], judge: Callable[[], list[Judgement]]
    ) -> list[Judgement]:
        """Returns what `judge` gives, or gave for `name` when it last passed, if nothing has changed since.

        tensors: what oracle and peer are given beside the weights, and what MAX made of it.
        """
        key, now = self.entry(name, tensors)
        known = self.memory.get(key, None) if now else None
        if isinstance(known, dict) and known.get("of") == now:
            return [from_data(data) for data in known["judgements"]]
        judgements = judge()
        if now and judgements and all(judgement.passed for judgement in judgements):
            self.memory.set(key, {"of": now, "judgements": [as_data(judgement) for judgement in judgements]})
        return judgements

    def holds(self, name: str, tensors: Mapping[str, Tensor], holds: Callable[[], bool]) -> bool:
        """Tells what `holds` does, or did for `name` when it was last true, if nothing has changed since.

        tensors: as for `recalled`.
        """
        key, now = self.entry(name, tensors)
        if now and self.memory.get(key, None) == {"of": now}:
            return True
        if (found := holds()) and now:
            self.memory.set(key, {"of": now})
        return found

    def entry(self, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str | None]:
        """Returns under which key it is kept what `name` stands for, and what all that it depends on is now; None where
        that is not known."""
        under = circumstances(JUDGES)
        now = fingerprint(tensors, self.model, sources(), *under) if under is not None else None
        return f"maxwhisper/verdicts/{name}", now


def fingerprint(tensors: Mapping[str, Tensor], *others: str) -> str:
    """Hashes tensors' names, dtypes, shapes and values, and the others."""
    digest = hashlib.sha256(repr(others).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def circumstances(packages: Iterable[str]) -> list[str] | None:
    """Returns what PyTorch's results depend on beside what it is given: packages, and how it computes here, with what
    the environment tells its libraries; None where that is not known, as a package has no version."""
    try:
        versions = [f"{name} {version(name)}" for name in packages]
    except ImportError:
        return None
    told = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(LIBRARIES)]
    computing = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    return [*versions, *map(str, computing), *told]


@cache
def sources() -> str:
    """Hashes the judge's own sources, and the table of blocks."""
    digest = hashlib.sha256()
    for path in [*sorted(JUDGE.glob("*.py")), TABLE]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def as_data(judgement: Judgement) -> dict[str, Any]:
    """Returns a verdict that passed, as JSON."""
    data = asdict(judgement)
    data["comparison"]["dtype"] = dtype_name(judgement.comparison.dtype)
    return data


def from_data(data: dict[str, Any]) -> Judgement:
    comparison = Comparison(**{**data["comparison"], "dtype": getattr(torch, data["comparison"]["dtype"])})
    outputs = (
        Output(output["index"], tuple(output["shape"]), tuple(Measure(**measure) for measure in output["measures"]))
        for output in data["outputs"]
    )
    return Judgement(comparison, tuple(outputs), (), data["condition"], recalled=True)
