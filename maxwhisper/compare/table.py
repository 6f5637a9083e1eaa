"""The results as text: a Markdown table, and the notes without which it says little."""

from .results import Results, Row, middle

COLUMNS = ("engine", "load s", "encoder ms", "ms per token")
DEVICE_COLUMNS = ("encoder device ms", "device ms per token")
"""What a table for a GPU has behind these."""
LAST_COLUMNS = ("total s", "x real time", "peak MB", "tokens", "agreement", "WER", "WER to text")


def table(results: Results) -> str:
    """Returns the table, a line for each engine that has no figures, and the fairness notes."""
    on_gpu = results.options["device"] == "gpu"
    columns = (*COLUMNS, *(DEVICE_COLUMNS if on_gpu else ()), *LAST_COLUMNS)
    rows = [cells(row, results.audio_s, on_gpu) for row in results.rows if row.total_s and not row.error]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [line(columns, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    lines += [line(row, widths) for row in rows]
    return "\n".join([*lines, "", *without_figures(results), *notes(results)])


def line(values: tuple[str, ...] | list[str], widths: list[int]) -> str:
    first, *others = (
        value.ljust(width) if i == 0 else value.rjust(width)
        for i, (value, width) in enumerate(zip(values, widths, strict=True))
    )
    return "| " + " | ".join([first, *others]) + " |"


def cells(row: Row, audio_s: float, on_gpu: bool = False) -> list[str]:
    total = middle(row.total_s)
    return [
        row.name,
        number(row.load_s, 2),
        *window_cells(row.encode_s, row.token_s),
        *(window_cells(row.encode_device_s, row.token_device_s) if on_gpu else []),
        number(total, 2),
        number(total and audio_s / total, 1),
        number(row.peak_bytes, 0, 1e-6),
        number(row.tokens, 0),
        number(row.agreement, 2, 100, " %"),
        number(row.wer, 2, 100, " %"),
        number(row.wer_text, 2, 100, " %"),
    ]


def window_cells(encode_s: list[float], token_s: list[float]) -> list[str]:
    token = middle(token_s)
    return [
        number(middle(encode_s), 1, 1000),
        number(token if token and token > 0 else None, 2, 1000),  # a difference, which noise can turn around
    ]


def number(value: float | None, digits: int, factor: float = 1, suffix: str = "") -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}{suffix}"


def without_figures(results: Results) -> list[str]:
    lines = [f"{row.name}: failed: {row.error}" for row in results.rows if row.error]
    for row in results.rows:
        if row.not_installed:
            lines.append(f"{row.name}: not installed: pip install {' '.join(row.not_installed)}")
    return [*lines, ""] if lines else []


def notes(results: Results) -> list[str]:
    """Returns what each engine was given, and what it does differently."""
    options, machine = results.options, results.machine
    search = f"beam search, {options['beam_size']} beams" if options["beam_size"] else "greedy"
    lines = [
        f"All engines: {results.model}, {results.audio_s:.1f} s of audio in {len(results.recordings)} files,"
        f" {search}, {options['threads']} threads; {machine['processor']}, {machine['cpus']} CPUs,"
        f" Python {machine['python']}.",
    ]
    if options["device"] == "gpu":
        lines.append(
            f"On one {machine['gpu']}, driver {machine['driver']}, PyTorch for CUDA {machine['cuda']}. Every time ends"
            " when the device is done. Device: between two events on the engine's queue, one before the work and one"
            " behind it, pauses in which it waits for Python included. Peak: memory of the host."
        )
    if options["tokens"] is None:
        lines.append(
            "Given: the same samples at 16 kHz; the language that PyTorch Whisper hears"
            f" ({', '.join(sorted(set(options['languages'])))}); timestamps; temperature 0 without fallback; text"
            " conditioned on the text before, but not in batches; thresholds and suppressed tokens as OpenAI's."
        )
        lines.append("Total: everything from samples to tokens, the spectrogram by each engine itself.")
    else:
        lines.append(
            f"Given: the same spectrograms, and exactly {options['tokens']} tokens to decode for each window of 30 s,"
            " without timestamps. Total: encoder and tokens of all windows."
        )
    lines += [
        f"Each engine in its own process, {options['rounds']} rounds in turn, medians; a pause before each. Load: from"
        " the first import to a model that is ready, converted and compiled before. Encoder: one window of 30 s."
        " Per token: from texts of 1 and of many tokens without an end. Of all three the fastest of 3. Peak: resident"
        " memory after transcribing once.",
        "Agreement: share of tokens equal to PyTorch Whisper's in the best alignment, timestamps left out; WER: word"
        " error rate to its transcript, and to the known text, after openai-whisper's normalizers.",
    ]
    for row in results.rows:
        packages = ", ".join(f"{name} {found}" for name, found in row.versions.items() if found)
        lines.append(f"- {row.name}{f' ({packages})' if packages else ''}: {row.note}.")
    return lines
