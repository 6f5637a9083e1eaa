"""The results as a picture."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from .results import Results, middle
from .run import written


def write_plot(results: Results, path: Path) -> None:
    """Draws bars of total time, encoder, time per token and memory; raises OptionError if it cannot be written."""
    rows = [row for row in results.rows if row.total_s and not row.error][::-1]
    names = [row.name for row in rows]
    panels = {
        "total, s": [shown(middle(row.total_s), 1) for row in rows],
        "encoder, ms": [shown(middle(row.encode_s), 1000) for row in rows],
        "per token, ms": [shown(middle(row.token_s), 1000) for row in rows],
        "peak memory, MB": [shown(row.peak_bytes, 1e-6) for row in rows],
    }
    figure = Figure(figsize=(14, 1.5 + 0.4 * len(rows)), layout="constrained")
    figure.suptitle(f"{results.model}, {results.audio_s:.0f} s of audio, {results.options['threads']} threads")
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        axes.bar_label(axes.barh(names, values), fmt=label, padding=2)
        axes.margins(x=0.2)
        axes.set_title(title)
    written(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=120))


def shown(value: float | None, factor: float) -> float:
    """Returns NaN, which has no bar, where nothing was measured, or noise has made a difference negative."""
    return value * factor if value is not None and value > 0 else math.nan


def label(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
