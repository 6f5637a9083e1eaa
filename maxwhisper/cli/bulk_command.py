"""The command `maxwhisper bulk`: its options, and what must be installed for it."""

import argparse
import logging
import os
from functools import partial
from importlib.util import find_spec
from typing import Any

from ..errors import OptionError
from ..names import GPU
from .model_options import MODEL_OPTIONS, add_model, leave_cores_to_max, load
from .option_types import above_zero, str2bool
from .transcribe_command import temperatures
from .transcribe_options import add_clips, add_decoding, add_fallback, unusable_decoding, without_effect

log = logging.getLogger("maxwhisper")

NEEDED = {"ray": "ray[data]", "pyarrow": "pyarrow", "pandas": "pandas", "fsspec": "fsspec"}
"""Packages of the extra `bulk`, by the modules that they have."""
WORKERS = ("actors", "batch_size", "cpus", "gpus", "memory_gb", "cluster")


def add_bulk(commands: Any) -> None:
    """Adds the command `bulk` to those of a parser."""
    parser = commands.add_parser(
        "bulk",
        help="transcribe an archive",
        description="Transcribe what INPUT stands for and OUTPUT does not have yet, on Ray Data, into"
        " OUTPUT/transcripts.parquet and transcripts.jsonl. The same command goes on after whatever stopped it."
        " `pip install maxwhisper[bulk]` installs what it needs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = (
        "folder, pattern ('calls/*.mp3'), list (.txt, a name a line), or Parquet (.parquet, with `path`, `bytes` or"
        " `audio`), on a disk or as in s3://bucket/calls"
    )
    parser.add_argument("input", metavar="INPUT", help=source)
    parser.add_argument("output", metavar="OUTPUT", help="folder for the transcripts, or as in s3://bucket/texts")
    add_model(parser.add_argument_group("model and device").add_argument)
    add = parser.add_argument_group("who computes").add_argument
    add("--cluster", metavar="ADDRESS", help="a Ray cluster, as in auto or ray://head:10001; this machine unless given")
    add("--actors", type=above_zero, default=1, metavar="N", help="processes that hold a model each")
    add("--batch_size", type=above_zero, default=4, metavar="N", help="recordings that a model decodes together")
    add("--cpus", type=above_zero, default=1, metavar="N", help="CPUs that Ray counts for an actor")
    gpus = "GPUs, or the share of one, that Ray counts for an actor; unless given, 1 with --device gpu"
    add("--gpus", type=share, metavar="N", help=gpus)
    add("--memory_gb", type=above_zero, metavar="N", help="memory that Ray counts for an actor")
    decoding = add_decoding(parser)
    add_clips(decoding)
    decoding("--word_timestamps", type=str2bool, default=False, help="find when each word begins and ends")
    add_fallback(parser)
    parser.set_defaults(run=partial(bulk, parser))


def share(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not '{value}'")
    return found


def bulk(parser: argparse.ArgumentParser, input: str, output: str, **options: Any) -> int:
    """Transcribes an archive; returns 0 once every input has a row. Raises MaxWhisperError if that cannot be."""
    if reason := unusable_decoding(options):
        parser.error(reason)
    for reason in without_effect(options):
        log.warning("warning: %s", reason)
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise OptionError(f"maxwhisper bulk needs {', '.join(missing)}: pip install 'maxwhisper[bulk]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what concerns users comes as an exception too
    leave_cores_to_max()

    from ..bulk.job import Workers, run

    of_model = {option: options.pop(option) for option in MODEL_OPTIONS}
    workers = {option: options.pop(option) for option in WORKERS}
    for option in ("model", "model_dir", "artifacts"):  # Ray's processes have a folder of their own
        if of_model[option] and (option != "model" or is_file_or_folder(of_model["model"])):
            of_model[option] = os.path.abspath(of_model[option])
    settings = {option: of_model[option] for option in ("model", "dtype")} | options
    if workers["gpus"] is None:
        workers["gpus"] = 1.0 if of_model["device"] in GPU else 0.0
    options["temperature"] = temperatures(options["temperature"], options.pop("temperature_increment_on_fallback"))
    summary = run(input, output, partial(load, **of_model), options, settings, Workers(**workers))
    print(summary.text())
    return 0


def is_file_or_folder(model: str) -> bool:
    """Returns whether a model is taken from a path: one of OpenAI's names is not, whatever has it too."""
    from whisper import available_models

    return model not in available_models() and os.path.exists(model)
