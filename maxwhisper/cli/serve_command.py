"""The command `maxwhisper serve`: its options, and what must be installed for it."""

import argparse
import logging
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .model_options import MODEL_OPTIONS, add_model, leave_cores_to_max, load
from .option_types import above_zero
from .transcribe_options import without_effect

log = logging.getLogger("maxwhisper")

NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "python_multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
    "websockets": "websockets",
}
"""Packages of the extra `serve`, by the modules that they have."""


def add_serve(commands: Any) -> None:
    """Adds the command `serve` to those of a parser."""
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's clients",
        description="Answer requests for transcripts as OpenAI's interface does. Those that come together decode"
        " together. `pip install maxwhisper[serve]` installs what it needs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model(parser.add_argument_group("model and device").add_argument)
    add = parser.add_argument_group("who may ask").add_argument
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines ask")
    add("--port", type=port, default=8000, help="port to listen at; 0 takes a free one")
    add("--api_key_file", metavar="FILE", help="keys, one a line, one of which a request must have")
    add("--race", metavar="FILE", help="what `maxwhisper race --json` wrote, to be replayed at /race")
    add = parser.add_argument_group("limits").add_argument
    add("--batch_size", type=above_zero, default=8, metavar="N", help="windows of 30 s that decode together")
    served = "requests that are received or transcribed at a time; the next one is told to try again"
    add("--max_requests", type=above_zero, default=32, metavar="N", help=served)
    add("--max_file_mb", type=above_zero, default=100, metavar="N", help="largest file, in megabytes")
    add("--max_audio_minutes", type=above_zero, default=120, metavar="N", help="longest audio")
    add("--timeout", type=above_zero, default=600, metavar="N", help="longest time of a request, in seconds")
    add("--stop_timeout", type=above_zero, default=30, metavar="N", help="seconds to end what runs after SIGTERM")
    parser.set_defaults(run=serve)


def port(value: str) -> int:
    if not value.isdecimal() or int(value) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, not '{value}'")
    return int(value)


def serve(**options: Any) -> int:
    """Serves until it is told to stop; raises MaxWhisperError if it cannot start."""
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise OptionError(f"maxwhisper serve needs {', '.join(missing)}: pip install 'maxwhisper[serve]'")
    for reason in without_effect(options):
        log.warning("warning: %s", reason)
    leave_cores_to_max()

    from ..serving.command import serve

    if options["race"]:
        options["race"] = race_page(options["race"])
    of_model = {option: options.pop(option) for option in MODEL_OPTIONS}
    return serve(partial(load, **of_model), Path(of_model["model"]).stem, **options)


def race_page(file: str) -> str:
    """Returns the page that replays a record; raises OptionError if the file is none."""
    from ..compare.command import check_installed

    check_installed({"jiwer": "--race", "rich": "--race"})
    from ..compare.race.lanes import race_of, read_record
    from ..compare.race.page import page_of

    return page_of(race_of(read_record(Path(file)), file))
