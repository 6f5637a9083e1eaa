"""A race as one HTML file that needs nothing else, and as a picture."""

import io
import json
import re
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from ..run import written
from .lanes import Race
from .terminal import frame

DATA = "/* the race */"
"""What stands in page.html where the race goes."""
PICTURE_COLUMNS, PICTURE_LINES = 110, 32


def page_of(race: Race) -> str:
    """Returns a page that replays the race."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # A script ends at the first "</script", wherever it stands, and "<!--" changes how it is read.
    data = json.dumps(asdict(race)).replace("<", "\\u003c")
    before, after = template.split(DATA)
    return before + data + after


def write_page(race: Race, path: Path) -> None:
    """Writes the race as a page that replays it; raises OptionError if it cannot be written."""
    written(path, lambda unfinished: unfinished.write_text(page_of(race), encoding="utf-8"))


def write_picture(race: Race, path: Path) -> None:
    """Draws the race at the moment when its fastest engine is done, as SVG; raises OptionError if it cannot be
    written."""
    console = Console(file=io.StringIO(), record=True, width=PICTURE_COLUMNS, height=PICTURE_LINES, force_terminal=True)
    console.print(frame(race, race.lanes[0].total_s, console))
    # Without rich's fonts from the network its last choice is taken, the viewer's monospaced one.
    drawn = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="maxwhisper race"), flags=re.DOTALL)
    # A recording's name may have what is not UTF-8.
    written(path, lambda unfinished: unfinished.write_text(drawn, encoding="utf-8", errors="replace"))
