"""The command `maxwhisper`: transcribe audio files, compile models, convert checkpoints, examine what MAX runs on,
compare engines, race them, serve, listen, transcribe archives.

`maxwhisper transcribe` takes the options of OpenAI's `whisper` command, with its names, defaults and output files.
Whatever goes wrong is one line on standard error. Exit status: 0 if everything was done, 1 if something failed, 2 for
an unusable option, 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from .. import __version__
from ..errors import MaxWhisperError
from ..names import DTYPES, TARGETS
from .bulk_command import add_bulk
from .compare_command import add_compare, add_race
from .live_command import add_live
from .model_options import CHECKPOINT
from .serve_command import add_serve
from .terminal import failed, messages_on_stderr, one_line, standard_streams
from .transcribe_command import transcribe
from .transcribe_options import add_transcribe

OF_FILES = "model model_dir artifacts output_dir out text json plot html svg api_key_file race"
NAMES = {name: f"--{name}" for name in OF_FILES.split()} | {"destination": "OUT", "input": "INPUT", "output": "OUTPUT"}
"""What names files and folders, and what users call it. Files of audio are not here: one must not stop the others."""

# PyTorch, MAX and openai-whisper are imported where they are used: they take seconds, and Ctrl-C must work meanwhile.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; raises SystemExit(2) for an unusable option."""
    with standard_streams() as output, messages_on_stderr():
        status = run(arguments)
        output.flush()
        return max(status, failed(output.lost) if output.lost else 0)


def run(arguments: Sequence[str] | None) -> int:
    try:
        parser = build_parser()
        options = vars(parser.parse_args(arguments))
        if reason := unnamed(options):
            parser.error(reason)
        command: Callable[..., int] = options.pop("run")
        return command(**options)
    except MaxWhisperError as error:
        return failed(str(error))
    except KeyboardInterrupt:
        print("maxwhisper: interrupted", file=sys.stderr)
        return 130


# ---- options -------------------------------------------------------------------------------------------------------


def unnamed(options: dict[str, Any]) -> str | None:
    """Says which option that is to name a file or a folder names none, if one does."""
    for name, shown in NAMES.items():
        given = options.get(name)
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and (not value or "\0" in value):
                return f"argument {shown}: must be the name of a file or folder, not {value!r}"
    return None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of thirty options above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"maxwhisper: error: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """Builds the parser of the whole command; `run` among its results is the function to call with all others."""
    parser = Parser("maxwhisper", description="OpenAI's Whisper on Modular's MAX.")
    parser.add_argument("--version", action="version", version=f"maxwhisper {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    transcribing = add_transcribe(commands)
    transcribing.set_defaults(run=partial(transcribe, transcribing))
    add_compile(commands)
    add_convert(commands)
    add_doctor(commands)
    add_compare(commands)
    add_race(commands)
    add_serve(commands)
    add_live(commands)
    add_bulk(commands)
    return parser


def add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint as one safetensors file",
        description="Write a checkpoint as one safetensors file, which loads without unpickling.",
    )
    parser.add_argument("source", metavar="IN", help=CHECKPOINT)
    parser.add_argument("destination", metavar="OUT", help="file to write; its name must end in .safetensors")
    parser.set_defaults(run=convert)


def add_compile(commands: Any) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile a model ahead of time",
        description="Compile what transcribes with a model, for this machine's CPU or for a GPU, which need not be "
        "there, into a folder for `maxwhisper transcribe --artifacts`.",
    )
    parser.add_argument("--model", required=True, help="as for transcribe, or random:SIZE, as for compare")
    parser.add_argument("--model_dir", help="as for transcribe")
    parser.add_argument("--target", required=True, choices=TARGETS, help="host, or the architecture of a GPU")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="as for transcribe")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; an earlier one is replaced")
    parser.set_defaults(run=compile_artifacts)


def add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="report what keeps MAX from using the GPU",
        description="Report on driver, GPU, CUDA libraries, MAX and PyTorch, and on what to do about each red row. "
        "Exit status: 0 if no row is red, 1 if one is, as on a machine without a GPU.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=doctor)


# ---- commands ------------------------------------------------------------------------------------------------------


def convert(source: str, destination: str) -> int:
    from ..checkpoint import convert

    print(convert(source, destination))
    return 0


def compile_artifacts(model: str, model_dir: str | None, target: str, dtype: str, out: str) -> int:
    from ..compare.material import RANDOM, stored_model
    from ..whisper import compile_model

    if model.startswith(RANDOM):
        model = str(stored_model(model))
    compile_model(model, target, out, model_dir, dtype)
    print(out)
    return 0


def doctor(json: bool) -> int:
    """Prints the report; returns 1 if something keeps MAX from using a GPU."""
    from ..doctor import examine

    report = examine()
    print(report.json() if json else report.text())
    return 1 if report.red else 0
