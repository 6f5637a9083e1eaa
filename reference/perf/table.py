"""What a benchmark's time means: operations and bytes per second, and how far they are from the machine's ceilings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .costs import Cost

TIMES, RATES = "MAX ms  PyTorch ms  ratio", "GFLOP/s  % matmul   GB/s  % read"
DEVICE_TIMES = "MAX on GPU  PyTorch on GPU  ratio"


@dataclass(frozen=True)
class Row:
    """A block or a decode loop on an engine; seconds: the median. cost: None of a loop, whose work is not counted.
    device_seconds: the median on a GPU's own clock, of a block that is computed there."""

    block: str
    engine: str
    seconds: float
    cost: Cost | None
    device_seconds: float | None = None

    def rates(self, ceilings: Mapping[str, float]) -> dict[str, float]:
        """Returns GFLOP/s and GB/s, and the ceilings that they are to be seen against; nothing without a cost.

        ceilings: FLOP/s of "matmul", bytes/s of "copy" and "read".
        """
        if self.cost is None:
            return {}
        return {
            "GFLOP/s": self.cost.flops / self.seconds / 1e9,
            "GB/s": self.cost.n_bytes / self.seconds / 1e9,
            "matmul ceiling, GFLOP/s": ceilings["matmul"] / 1e9,
            "copy ceiling, GB/s": ceilings["copy"] / 1e9,
            "read ceiling, GB/s": ceilings["read"] / 1e9,
        }


def table(rows: Sequence[Row], ceilings: Mapping[str, float]) -> Iterator[str]:
    """Yields a line for each block, MAX beside PyTorch; the rates are MAX's. A dash where an engine was not timed."""
    matmul, copy, read = (ceilings[name] / 1e9 for name in ("matmul", "copy", "read"))
    yield f"ceilings: matmul {matmul:.0f} GFLOP/s, copy {copy:.1f} GB/s, read {read:.1f} GB/s"
    yield "medians; ratio is MAX's time over PyTorch's; rates are MAX's"
    by_block: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_block.setdefault(row.block, {})[row.engine] = row
    width = max(map(len, by_block))
    on_gpu = any(row.device_seconds for row in rows)
    yield "  ".join([f"{'block':{width}}", TIMES, *([DEVICE_TIMES] if on_gpu else []), RATES])
    for block, engines in by_block.items():
        yield f"{block:{width}}  {figures(engines, ceilings, on_gpu)}"


def figures(engines: Mapping[str, Row], ceilings: Mapping[str, float], on_gpu: bool) -> str:
    ours, theirs = engines.get("MAX"), engines.get("PyTorch")
    left = times(TIMES, *(row.seconds if row else None for row in (ours, theirs)))
    if on_gpu:
        left += "  " + times(DEVICE_TIMES, *(row.device_seconds if row else None for row in (ours, theirs)))
    if not ours or not (rates := ours.rates(ceilings)):
        return left
    of_matmul, of_read = (
        rates["GFLOP/s"] / rates["matmul ceiling, GFLOP/s"],
        rates["GB/s"] / rates["read ceiling, GB/s"],
    )
    return f"{left}  {rates['GFLOP/s']:7.1f}  {of_matmul:8.0%}  {rates['GB/s']:5.1f}  {of_read:6.0%}"


def times(columns: str, ours: float | None, theirs: float | None) -> str:
    """Shows both in milliseconds, and their ratio, as wide as the columns."""
    values = [f"{seconds * 1e3:.3g}" if seconds else "-" for seconds in (ours, theirs)]
    values.append(f"{ours / theirs:.2f}" if ours and theirs else "-")
    return "  ".join(f"{value:>{len(name)}}" for value, name in zip(values, columns.split("  "), strict=True))
