"""A race in a terminal, at true speed."""

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from .lanes import MISSING, WRONG, Lane, Race, Word

FRAMES_PER_SECOND = 20
STYLES = {WRONG: "bold red", MISSING: "red strike"}
WIDE = 100
"""Columns of a terminal from which on two engines stand side by side."""
AT_A_TIME = 64
"""Words that leave a panel together, for lines break anew where the first word is another one."""


def replay(race: Race, console: Console, clock: Callable[[], float] = time.perf_counter) -> None:
    """Shows a race: in a terminal at true speed, elsewhere its end alone."""
    if console.is_terminal:
        start = clock()
        with Live(console=console, refresh_per_second=FRAMES_PER_SECOND, transient=True) as live:
            while (seconds := clock() - start) < race.total_s:
                live.update(frame(race, seconds, console))
                time.sleep(1 / FRAMES_PER_SECOND)
    console.print(result(race))


def frame(race: Race, seconds: float, console: Console) -> Group:
    """Returns what there is after so many seconds, as large as the terminal."""
    columns = 2 if console.width >= WIDE and len(race.lanes) > 1 else 1
    rows = -(-len(race.lanes) // columns)
    # A frame of two lines around each, a line of progress in it, and the heading.
    n_line = max(1, (console.height - 2) // rows - 3)
    width = max(1, console.width // columns - 4)
    grid = Table.grid(expand=True)
    for _ in range(columns):
        grid.add_column(ratio=1)
    panels = [panel(race, lane, seconds, n_line, width) for lane in race.lanes]
    for start in range(0, len(panels), columns):
        grid.add_row(*panels[start : start + columns])
    return Group(Text(f"{heading(race)}: {seconds:.1f} s", no_wrap=True, overflow="ellipsis"), grid)


def panel(race: Race, lane: Lane, seconds: float, n_line: int, width: int) -> Panel:
    """Returns an engine's last lines after so many seconds, and how far it is."""
    done = seconds >= lane.total_s
    words = lane.at(seconds)
    lines = text_of(latest(words, n_line * width)).wrap(Console(width=width), width)[-n_line:]
    lines.extend(Text() for _ in range(n_line - len(lines)))
    time_of = f"{lane.total_s:.2f} s, {race.audio_s / lane.total_s:.0f} x" if done else f"{seconds:.1f} s"
    n_word = sum(word.mark != MISSING for word in words)
    total = sum(word.mark != MISSING for word in lane.words)
    # Padding ends its line, which a bar does not.
    bar = Padding(ProgressBar(total=max(total, 1), completed=n_word if total or not done else 1), 0)
    return Panel(
        Group(bar, *lines), title=f"{lane.name}, {time_of}", title_align="left", border_style="green" if done else "dim"
    )


def latest(words: list[Word], n_character: int) -> list[Word]:
    """Returns the last words, of so many characters or more: to wrap an hour of them takes longer than a frame may."""
    first = len(words)
    while first and n_character > 0:
        first -= 1
        n_character -= len(words[first].text) + 1
    return words[first // AT_A_TIME * AT_A_TIME :]


def text_of(words: list[Word]) -> Text:
    return Text(" ").join(Text(word.text, STYLES.get(word.mark, "")) for word in words)


def heading(race: Race) -> str:
    return f"{race.recording}, {race.audio_s:.0f} s of audio, {race.model}"


def result(race: Race) -> Group:
    """Returns the end: who took how long, and how many words are wrong."""
    numbers = ("s", "x real time", "WER", "wrong", "missing")
    table = Table("engine", *(Column(name, justify="right") for name in numbers))
    for lane in race.lanes:
        counts = [str(sum(word.mark == mark for word in lane.words)) for mark in (WRONG, MISSING)]
        wer = "-" if lane.wer is None else f"{100 * lane.wer:.2f} %"
        table.add_row(lane.name, f"{lane.total_s:.2f}", f"{race.audio_s / lane.total_s:.1f}", wer, *counts)
    notes = f"{heading(race)}. {race.machine}. Words are held against {race.against}."
    differing = [lane for lane in race.lanes if any(word.mark in STYLES for word in lane.words)]
    return Group(table, Text(notes), *(Text(f"{lane.name}: ") + text_of(lane.words) for lane in differing))
