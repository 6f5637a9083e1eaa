"""The command `maxwhisper race`, behind its options."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..command import available, check_installed, check_outputs, inputs


def run(source: str, html: str | None, svg: str | None, json: str | None, **options: Any) -> int:
    """Measures, or reads what was measured, replays, writes the files; returns 1 if an engine failed.

    source: an audio file, or a record, whose name ends in .json. Raises MaxWhisperError.
    """
    check_installed({"jiwer": "maxwhisper race", "rich": "maxwhisper race"})
    text = options.get("text")
    read = [source] if is_record(source) else inputs([source], text and [text], options["model"])
    check_outputs({"--html": html, "--svg": svg, "--json": json}, read)

    from rich.console import Console

    from .lanes import printable, race_of, read_record
    from .page import write_page, write_picture
    from .terminal import replay

    record = read_record(Path(source)) if is_record(source) else measured(source, json, **options)
    race = race_of(record, source)
    if html:
        write_page(race, Path(html))
    if svg:
        write_picture(race, Path(svg))
    replay(race, Console())
    failed = [row for row in record["rows"] if row.get("error")]
    for row in failed:
        print(printable(f"{row['name']}: failed: {row['error']}"))
    return int(bool(failed))


def is_record(source: str) -> bool:
    """Returns whether a file is what `compare --json` wrote, and no audio."""
    return source.lower().endswith(".json")


def measured(audio: str, json: str | None, text: str | None, threads: int | None, **options: Any) -> dict[str, Any]:
    """Returns what `compare` has found, and writes it where it is asked to."""
    from ..run import compare, write_json

    results = compare([audio], texts=[text] if text else None, threads=available(threads), **options)
    if json:
        write_json(results, Path(json))
    return asdict(results)
