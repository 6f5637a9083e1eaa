"""The results as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from .results import Results, middle
from .run import written


def write_plot(results: Results, path: Path) -> None:
    """Bars of total time, encoder, time per token and memory; raises OptionError if it cannot be written."""
    rows = [row for row in results.rows if row.total_s and not row.error][::-1]
    names = [row.name for row in rows]
    panels = {
        "total, s": [middle(row.total_s) for row in rows],
        "encoder, ms": [(middle(row.encode_s) or 0.0) * 1000 for row in rows],
        "per token, ms": [(middle(row.token_s) or 0.0) * 1000 for row in rows],
        "peak memory, MB": [(row.peak_bytes or 0) / 1e6 for row in rows],
    }
    figure = Figure(figsize=(14, 1.5 + 0.4 * len(rows)), layout="constrained")
    figure.suptitle(f"{results.model}, {results.audio_s:.0f} s of audio, {results.options['threads']} threads")
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        axes.bar_label(axes.barh(names, values), fmt="%.3g", padding=2)
        axes.margins(x=0.2)
        axes.set_title(title)
    written(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=120))
