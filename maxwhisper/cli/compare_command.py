"""The options of `maxwhisper compare` and `maxwhisper race`."""

import argparse
from functools import partial
from typing import Any

from ..names import GPU
from .option_types import above_zero

MEASURING = ("model", "text", "device", "against", "beam_size", "batch_size", "threads", "rounds", "json")
"""The options of `race` that a record leaves nothing to do for."""


def add_compare(commands: Any) -> None:
    """Adds the command `compare`."""
    parser = commands.add_parser(
        "compare",
        help="measure maxwhisper beside other engines",
        description="Transcribe the same audio with the same checkpoint in maxwhisper and in other engines, each in its"
        " own process. `pip install maxwhisper[peers]` installs them. Exit status: 1 if an engine failed.",
    )
    add = parser.add_argument
    add("audio", nargs="+", metavar="AUDIO", help="audio or video files; a .txt beside one holds what is said in it")
    add("--model", default="tiny", help="as of transcribe, or random:SIZE for random weights, with --tokens")
    add("--text", action="append", metavar="FILE", help="what is said, once for each AUDIO and in their order")
    add("--tokens", type=above_zero, metavar="N", help="decode N tokens for every 30 s, in place of transcribing")
    add_measuring(parser, rounds=3)
    add("--artifacts", metavar="DIR", help="as of transcribe; rows of maxwhisper are then of the precisions held there")
    add("--plot", metavar="FILE", help="write a picture, in PNG")
    parser.set_defaults(run=partial(compare, parser))


def add_race(commands: Any) -> None:
    """Adds the command `race`."""
    parser = commands.add_parser(
        "race",
        help="watch maxwhisper and other engines transcribe, side by side",
        description="Measure as `maxwhisper compare` does, one engine after the other, then replay all side by side at"
        " true speed. `pip install maxwhisper[peers]` installs them. Exit status: 1 if an engine failed.",
    )
    add = parser.add_argument
    help = "audio or video file, or what `compare --json` or `race --json` wrote, to be replayed"
    add("source", metavar="AUDIO", help=help)
    add("--model", default="tiny", help="as of transcribe")
    add("--text", metavar="FILE", help="what is said (default: a .txt beside AUDIO, else what PyTorch Whisper hears)")
    add_measuring(parser, rounds=1)
    add("--html", metavar="FILE", help="write a page that replays it in a browser, without network")
    add("--svg", metavar="FILE", help="write a picture of the moment when the fastest is done")
    defaults = {name: parser.get_default(name) for name in MEASURING}
    parser.set_defaults(run=partial(race, parser, defaults), **dict.fromkeys(MEASURING))


def add_measuring(parser: Any, rounds: int) -> None:
    """Adds what is said of engines and rounds."""
    from ..compare.engines import ENGINES

    add = parser.add_argument
    device = "what to compute on; cuda and cuda:0 mean gpu, auto a GPU where there is one (default: cpu)"
    add("--device", default="cpu", choices=["cpu", *GPU, "auto"], help=device)
    known = f"engines, comma-separated, of {', '.join(ENGINES)} (default: all that have a row for --device)"
    add("--against", type=engines, metavar="ENGINES", help=known)
    add("--beam_size", type=above_zero, metavar="N", help="how many texts to pursue; greedy if not given")
    batch = "pieces that decode together in the rows of batches (default: 8)"
    add("--batch_size", type=above_zero, default=8, metavar="N", help=batch)
    add(
        "--threads",
        type=above_zero,
        metavar="N",
        help="threads of every engine (default, and at most: one for each CPU)",
    )
    add("--rounds", type=above_zero, default=rounds, metavar="N", help=f"how often to measure (default: {rounds})")
    add("--json", metavar="FILE", help="write everything that was found")


def engines(value: str) -> tuple[str, ...]:
    """Returns the engines that a comma-separated list names; raises ArgumentTypeError for an unknown one."""
    from ..compare.engines import ENGINES

    names = tuple(value.split(","))
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"unknown engine '{unknown[0]}': expected some of {', '.join(ENGINES)}")
    return names


def compare(parser: Any, **options: Any) -> int:
    """Prints the table; returns 1 if an engine failed."""
    if options["text"] and len(options["text"]) != len(options["audio"]):
        parser.error(f"argument --text: given {len(options['text'])} times for {len(options['audio'])} AUDIO")
    if options["model"].startswith("random:") and not options["tokens"]:
        parser.error("argument --model: random weights never end a text, say how long with --tokens")
    if options["text"] and options["tokens"]:
        parser.error("argument --text: cannot be combined with --tokens, which makes tokens and no words")
    from ..compare.command import run

    return run(**options)


def race(parser: Any, defaults: dict[str, Any], source: str, **options: Any) -> int:
    """Replays; returns 1 if an engine failed. defaults: of the options that are None where they are not given."""
    from ..compare.race.command import is_record, run

    given = [name for name in defaults if options[name] is not None]
    if given and is_record(source):
        parser.error(f"argument --{given[0]}: has no effect on {source}, a record, of which nothing is measured anew")
    return run(source, **options | {name: defaults[name] for name in defaults if name not in given})
