"""The command `maxwhisper live`: its options, which are those of `transcribe` where they mean something."""

import argparse
import shutil
import sys
from datetime import datetime
from functools import partial
from typing import Any

from ..pipes import STANDARD_INPUT
from .model_options import MODEL_OPTIONS, add_model, load
from .option_types import above_zero
from .outputs import FORMATS, WORD_OPTIONS, write
from .terminal import failed
from .transcribe_command import before_the_work, in_english, temperatures
from .transcribe_options import add_decoding, add_fallback, add_words, unusable_decoding, unusable_words

MICROPHONE = "microphone"
POLICIES = ("heard-twice", "local-agreement", "align-att")
"""The names in `live.policies`, which imports PyTorch."""


def add_live(commands: Any) -> None:
    """Adds the command `live` to those of a parser."""
    parser = commands.add_parser(
        "live",
        help="show the text of speech as it is said",
        description="Show the text of speech as it is said: what is settled, and dim what may change. At the end, which"
        " Ctrl-C is, write the files that transcribe writes. `pip install maxwhisper[live]` installs what the"
        " microphone needs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = "microphone, or - for signed 16-bit little-endian mono samples on standard input"
    parser.add_argument("source", nargs="?", default=MICROPHONE, choices=[MICROPHONE, STANDARD_INPUT], help=source)
    add = parser.add_argument_group("audio, model, device and files").add_argument
    add("--rate", type=above_zero, default=16000, metavar="N", help="samples per second of the source")
    policy = "when text is settled: docs/live.md compares them"
    add("--policy", default=POLICIES[0], choices=POLICIES, help=policy)
    add_model(add)
    add("--output_dir", "-o", default=".", help="folder for the output files, made if it is not there")
    add("--output_format", "-f", default="all", choices=[*FORMATS, "all"], help="which output files to write")
    add_decoding(parser)
    add_fallback(parser)
    add_words(parser)
    parser.set_defaults(run=partial(live, parser))


def live(parser: argparse.ArgumentParser, source: str, rate: int, policy: str, **options: Any) -> int:
    """Shows text until the audio ends, and writes the files; returns 1 if one of them could not be written."""
    reason = unusable_decoding(options) or unusable_words(options)
    output_dir, output_format = before_the_work(parser, reason, options)

    from ..live.command import live
    from ..live.screen import Lines, Terminal

    model = load(**{name: options.pop(name) for name in MODEL_OPTIONS})
    layout = {name: options.pop(name) for name in WORD_OPTIONS}
    options["temperature"] = temperatures(options["temperature"], options.pop("temperature_increment_on_fallback"))
    if not model.is_multilingual:
        options = in_english(options)
    on_terminal = sys.stdout.isatty()
    screen = Terminal(shutil.get_terminal_size().columns) if on_terminal else Lines()
    result = live(model, policy, source == STANDARD_INPUT, rate, screen, **options)
    if on_terminal:
        print(f"\n{result['text'].strip()}")
    name = source if source == STANDARD_INPUT else f"{MICROPHONE}-{datetime.now():%Y%m%d-%H%M%S}"
    return max(map(failed, write(result, name, output_dir, output_format, layout)), default=0)
