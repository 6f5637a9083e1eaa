"""The command `maxwhisper`: transcribe audio files, compile models, convert checkpoints, examine what MAX runs on,
compare engines.

`maxwhisper transcribe` takes the options of OpenAI's `whisper` command, with its names, defaults and output files.
Whatever goes wrong is one line on standard error. Exit status: 0 if everything was done, 1 if something failed, 2 for
an unusable option, 130 after Ctrl-C.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from . import __version__
from .errors import MaxWhisperError, OptionError

# PyTorch, MAX and openai-whisper are imported where they are used: they take seconds, and Ctrl-C must work meanwhile.

FORMATS = ("txt", "vtt", "srt", "tsv", "json")
TARGETS = ("host", "sm_80", "sm_90a")  # those of maxwhisper.artifacts, which takes seconds to import
DTYPES = ("float32", "float16", "bfloat16")  # and those of maxwhisper.whisper
WORD_OPTIONS = ("highlight_words", "max_line_count", "max_line_width", "max_words_per_line")

log = logging.getLogger("maxwhisper")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; raises SystemExit(2) for an unusable option."""
    try:
        with messages_on_stderr():
            options = vars(build_parser().parse_args(arguments))
            run: Callable[..., int] = options.pop("run")
            status = run(**options)
            sys.stdout.flush()
            return status
    except MaxWhisperError as error:
        return failed(str(error))
    except KeyboardInterrupt:
        print("maxwhisper: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failed("standard output was closed")


def failed(message: str) -> int:
    print("maxwhisper: error:", " ".join(message.split()), file=sys.stderr)
    return 1


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Log messages and warnings go to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("maxwhisper: %(message)s"))
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.propagate = False  # to what a library may have given the root logger
    log.setLevel(min(level or logging.INFO, logging.INFO))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: log.warning("warning: %s", " ".join(str(message).split()))
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate


# ---- options -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Its errors are one line, without the usage of thirty options above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"maxwhisper: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The parser of the whole command; `run` among its results is the function to call with all others."""
    parser = Parser("maxwhisper", description="OpenAI's Whisper on Modular's MAX.")
    parser.add_argument("--version", action="version", version=f"maxwhisper {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    add_transcribe(commands)
    add_compile(commands)
    add_convert(commands)
    add_doctor(commands)
    add_compare(commands)
    return parser


def add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint as one safetensors file",
        description="Write a checkpoint as one safetensors file, which loads without unpickling.",
    )
    parser.add_argument("source", metavar="IN", help="OpenAI .pt file, Hugging Face folder, or the name of a model")
    parser.add_argument("destination", metavar="OUT", help="file to write; its name must end in .safetensors")
    parser.set_defaults(run=convert)


def add_compile(commands: Any) -> None:
    parser = commands.add_parser(
        "compile",
        help="compile a model ahead of time",
        description="Compile what transcribes with a model, for this machine's CPU or for a GPU, which need not be "
        "there, into a folder for `maxwhisper transcribe --artifacts`.",
    )
    parser.add_argument("--model", required=True, help="as for transcribe")
    parser.add_argument("--model_dir", help="as for transcribe")
    parser.add_argument("--target", required=True, choices=TARGETS, help="host, or the architecture of a GPU")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="as for transcribe")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; an earlier one is replaced")
    parser.set_defaults(run=compile_ahead)


def add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="report what keeps MAX from using the GPU",
        description="Report on driver, GPU, CUDA libraries, MAX and PyTorch, and on what to do about each red row. "
        "Exit status: 0 if no row is red, 1 if one is, as on a machine without a GPU.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=doctor)


def add_compare(commands: Any) -> None:
    from .compare.engines import ENGINES

    parser = commands.add_parser(
        "compare",
        help="measure maxwhisper beside other engines",
        description="Transcribe the same audio with the same checkpoint in maxwhisper and in other engines, each in its"
        " own process. `pip install maxwhisper[peers]` installs them. Exit status: 1 if an engine failed.",
    )
    add = parser.add_argument
    add("audio", nargs="+", metavar="AUDIO", help="audio or video files; a .txt beside one holds what is said in it")
    add("--model", default="tiny", help="as of transcribe, or random:SIZE for random weights, with --tokens")
    device = "what to compute on; auto is a GPU where there is one (default: cpu)"
    add("--device", default="cpu", choices=["cpu", "gpu", "auto"], help=device)
    known = f"engines, comma-separated, of {', '.join(ENGINES)} (default: all that have a row for --device)"
    add("--against", type=engines, metavar="ENGINES", help=known)
    add("--text", action="append", metavar="FILE", help="what is said, once for each AUDIO and in their order")
    add("--tokens", type=above_zero, metavar="N", help="decode N tokens for every 30 s, in place of transcribing")
    add("--beam_size", type=above_zero, metavar="N", help="how many texts to pursue; greedy if not given")
    batch = "pieces that decode together in the rows of batches (default: 8)"
    add("--batch_size", type=above_zero, default=8, metavar="N", help=batch)
    add("--threads", type=above_zero, metavar="N", help="threads of every engine (default: one for each CPU)")
    add("--rounds", type=above_zero, default=3, metavar="N", help="how often to measure (default: 3)")
    add("--json", metavar="FILE", help="write everything that was found")
    add("--plot", metavar="FILE", help="write a picture, in PNG")
    parser.set_defaults(run=lambda **options: compare(parser, **options))


def engines(value: str) -> tuple[str, ...]:
    from .compare.engines import ENGINES

    names = tuple(value.split(","))
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"unknown engine '{unknown[0]}': expected some of {', '.join(ENGINES)}")
    return names


def above_zero(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not '{value}'")
    return int(value)


# The types of OpenAI's options are not imported from whisper.utils: that imports PyTorch, and `doctor` must start where
# PyTorch cannot be imported.


def str2bool(value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError(value)
    return value == "True"


def optional_int(value: str) -> int | None:
    return None if value == "None" else int(value)


def optional_float(value: str) -> float | None:
    return None if value == "None" else float(value)


def language(value: str) -> str:
    """A language's code or its capitalised name, as OpenAI's command takes them."""
    from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

    if value not in LANGUAGES and value not in {name.title() for name in TO_LANGUAGE_CODE}:
        raise argparse.ArgumentTypeError(f"unknown language '{value}': expected a code or a name, as in en or English")
    return value


def add_transcribe(commands: Any) -> None:
    parser = commands.add_parser(
        "transcribe",
        help="write the text of audio files",
        description="Write the text of audio files, with the options and output files of OpenAI's whisper command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help="audio or video files, of any format libav reads")
    add_files_and_devices(parser.add_argument_group("model, device and files").add_argument)
    add_decoding(parser.add_argument_group("decoding").add_argument)
    add_fallback(parser.add_argument_group("when a window counts as failed or silent").add_argument)
    add_words(parser.add_argument_group("words and subtitles").add_argument)
    parser.set_defaults(run=lambda **options: transcribe(parser, **options))


def add_files_and_devices(add: Callable[..., Any]) -> None:
    model = "name of an OpenAI model, or path of a .pt or .safetensors file or of a Hugging Face folder"
    add("--model", default="turbo", help=model)
    add("--model_dir", help="where named models are kept; None stands for ~/.cache/whisper")
    device = "what to compute on; cuda means gpu, auto a GPU where there is one"
    add("--device", default="cpu", choices=["cpu", "gpu", "cuda", "auto"], help=device)
    dtype = "of arithmetic; the others are less accurate, and bfloat16 encodes faster on CPUs with AVX-512 BF16"
    add("--dtype", default="float32", choices=DTYPES, help=dtype)
    add("--artifacts", metavar="DIR", help="use what `maxwhisper compile` wrote, or fail, naming what does not fit")
    add("--or_compile", type=str2bool, default=False, help="compile what does not fit in --artifacts, do not fail")
    add("--output_dir", "-o", default=".", help="folder for the output files, made if it is not there")
    add("--output_format", "-f", default="all", choices=[*FORMATS, "all"], help="which output files to write")
    add("--verbose", type=str2bool, default=True, help="True prints the text as it comes, False shows a progress bar")
    together = (
        "how many files to decode together, on a CPU with the transcripts they have one at a time; with --batched,"
    )
    add("--batch_size", type=above_zero, metavar="N", help=f"{together} how many pieces (default: 1, and 8)")
    batched = "cut audio at silences into pieces that decode together: not the same transcript"
    add("--batched", action="store_true", help=batched)
    add("--threads", type=optional_int, default=0, help="threads of PyTorch, which picks the tokens; 0: its choice")
    fp16 = "has no effect: weights keep the precision they are stored in, and arithmetic is as --dtype says"
    add("--fp16", type=str2bool, default=True, help=fp16)


def add_decoding(add: Callable[..., Any]) -> None:
    add("--task", default="transcribe", choices=["transcribe", "translate"], help="keep the language, or go to English")
    add("--language", type=language, help="what is spoken, as in en or English; None finds out by itself")
    add("--temperature", type=float, default=0, help="0 takes the likeliest text; above, tokens are drawn at random")
    add("--best_of", type=optional_int, default=5, help="how many texts to draw at a temperature above 0")
    add("--beam_size", type=optional_int, default=5, help="how many texts to pursue at temperature 0; None pursues one")
    add("--patience", type=float, help="beam search stops after this times beam_size texts; None is 1")
    add("--length_penalty", type=float, help="exponent from 0 to 1 of the length penalty; None divides by the length")
    add("--suppress_tokens", default="-1", help="numbers of tokens never to write, comma-separated; -1 is most symbols")
    add("--initial_prompt", help="text to continue from, for example with names to be spelt right")
    add("--carry_initial_prompt", type=str2bool, default=False, help="give initial_prompt to every window")
    condition = "give each window the text before it: more consistent, but errors can repeat themselves"
    add("--condition_on_previous_text", type=str2bool, default=True, help=condition)
    add("--clip_timestamps", default="0", help="transcribe these parts only: start,end,start,end,... in seconds")


def add_fallback(add: Callable[..., Any]) -> None:
    increment = "how much warmer to try a failed window again, up to temperature 1; None does not try again"
    add("--temperature_increment_on_fallback", type=optional_float, default=0.2, help=increment)
    compression = "failed if gzip shortens the text by more than this factor: it repeats itself"
    add("--compression_ratio_threshold", type=optional_float, default=2.4, help=compression)
    logprob = "failed if the mean log probability of its tokens is lower"
    add("--logprob_threshold", type=optional_float, default=-1.0, help=logprob)
    silent = "silent if it failed by logprob_threshold and the probability of no speech is higher than this"
    add("--no_speech_threshold", type=optional_float, default=0.6, help=silent)
    skip = "skip silences longer than this, in seconds, around text that looks invented; needs --word_timestamps True"
    add("--hallucination_silence_threshold", type=optional_float, help=skip)


def add_words(add: Callable[..., Any]) -> None:
    add("--word_timestamps", type=str2bool, default=False, help="find when each word begins and ends")
    add("--prepend_punctuations", default="\"'“¿([{-", help="symbols that belong to the word after them")
    add("--append_punctuations", default="\"'.。,，!！?？:：”)]}、", help="symbols that belong to the word before them")
    needs = "needs --word_timestamps True"
    add("--highlight_words", type=str2bool, default=False, help=f"underline each word as it is said; {needs}")
    add("--max_line_width", type=optional_int, help=f"longest line of a subtitle, in characters; {needs}")
    add("--max_line_count", type=optional_int, help=f"most lines of a subtitle, with --max_line_width; {needs}")
    add("--max_words_per_line", type=optional_int, help=f"most words of a line, without --max_line_width; {needs}")


def unusable(options: dict[str, Any]) -> str | None:
    """What is wrong with the values of the options, if anything is; their types are right."""
    positive = ("best_of", "beam_size", "patience", "temperature_increment_on_fallback", *WORD_OPTIONS[1:])
    for name in positive:
        if options[name] is not None and not options[name] > 0:
            return f"argument --{name}: must be above 0, not {options[name]}"
    for name in ("temperature", "threads"):
        if options[name] is not None and not options[name] >= 0:
            return f"argument --{name}: must not be below 0, not {options[name]}"
    if options["length_penalty"] is not None and not 0 <= options["length_penalty"] <= 1:
        return f"argument --length_penalty: must be from 0 to 1, not {options['length_penalty']}"
    for name, kind in (("clip_timestamps", float), ("suppress_tokens", int)):
        try:
            [kind(part) for part in options[name].split(",") if options[name]]
        except ValueError:
            return f"argument --{name}: must be numbers with commas between them, not '{options[name]}'"
    if not options["word_timestamps"]:
        for name in WORD_OPTIONS:
            if options[name]:
                return f"argument --{name}: requires --word_timestamps True"
    names = [output_name(audio) for audio in options["audio"]]
    if twice := [name for name in names if names.count(name) > 1]:
        return f"argument AUDIO: the output of {names.count(twice[0])} files would have the name '{twice[0]}'"
    return None


# ---- commands ------------------------------------------------------------------------------------------------------


def convert(source: str, destination: str) -> int:
    from .checkpoint import convert

    print(convert(source, destination))
    return 0


def compile_ahead(model: str, model_dir: str | None, target: str, dtype: str, out: str) -> int:
    from .whisper import compile_model

    compile_model(model, target, out, model_dir, dtype)
    print(out)
    return 0


def doctor(json: bool) -> int:
    """Prints the report; returns 1 if something keeps MAX from using a GPU."""
    from .doctor import examine

    report = examine()
    print(report.json() if json else report.text())
    return 1 if report.red else 0


def transcribe(parser: Parser, **options: Any) -> int:
    """Transcribes every file it can; returns 1 if there was one that it could not."""
    if reason := unusable(options):
        parser.error(reason)
    output_dir, output_format = options.pop("output_dir"), options.pop("output_format")
    with unfinished(output_dir):
        pass  # a folder that cannot be written to shows before the work, not after
    # PyTorch's threads, done with their part, would wait for more at full load, on the cores that MAX computes on.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    import torch

    from .runtime import device_named
    from .whisper import load_model

    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    options.pop("fp16")
    how = {name: options.pop(name) for name in ("device", "artifacts", "or_compile", "dtype")}
    how["device"] = device_named(how["device"])
    model = load_model(options.pop("model"), download_root=options.pop("model_dir"), **how)
    files, layout = options.pop("audio"), {name: options.pop(name) for name in WORD_OPTIONS}
    options["temperature"] = temperatures(options["temperature"], options.pop("temperature_increment_on_fallback"))
    options["language"] = spoken(options["language"], model.is_multilingual)
    failures = []
    with shown(files, options) as tell:
        for number, result in transcripts(model, files, options):
            audio = files[number]
            try:
                if isinstance(result, Exception):
                    raise result
                write(result, audio, output_dir, output_format, layout)
                tell(audio, result)
            except BrokenPipeError:
                raise
            except MaxWhisperError as error:
                failures.append(str(error) if audio in str(error) else f"{audio}: {error}")
            except Exception as error:  # one file must not take the others down
                failures.append(f"{audio}: {type(error).__name__}: {error}")
    return max(map(failed, failures), default=0)


def transcripts(model: Any, files: list[str], options: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """The number of every file and its result, or what was raised, as each is done."""
    from .batched import BATCH_SIZE, transcribe_batched
    from .together import attempt, loaded, transcribe_many

    batch_size, batched = options.pop("batch_size"), options.pop("batched")
    if not batched:
        return transcribe_many(model, files, batch_size or 1, **options)
    if options.pop("clip_timestamps") != "0":
        raise OptionError("--clip_timestamps cannot be combined with --batched")
    run = partial(transcribe_batched, model, batch_size=batch_size or BATCH_SIZE)
    return ((number, attempt(run, waveform, options)) for number, waveform in loaded(files))


@contextmanager
def shown(files: list[str], options: dict[str, Any]) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """What to call with a file that is done and its result, while `options` have the model show the rest: a progress
    bar, or the text, which of files that advance together comes when each is done."""
    if options["verbose"] is False:
        with progress_bar(files) as options["progress"]:
            yield lambda audio, result: None
    elif options["batched"] or min(options["batch_size"] or 1, len(files)) > 1:
        options["verbose"] = None
        yield show
    else:
        yield lambda audio, result: None


def show(audio: str, result: dict[str, Any]) -> None:
    """Prints a transcript as openai-whisper does, below the name of its file."""
    from whisper.utils import format_timestamp

    print(f"{audio}:")
    for segment in result["segments"]:
        start, end = (format_timestamp(segment[name]) for name in ("start", "end"))
        print(f"[{start} --> {end}] {segment['text']}", flush=True)


@contextmanager
def progress_bar(files: list[str]) -> Iterator[Callable[[float], None]]:
    """A bar on standard error, of the seconds of audio that are done; what to call with more of them."""
    import tqdm

    from .audio import duration

    class Bar(tqdm.tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            found = super().format_dict
            return found | {"speed": f"{found['n'] / found['elapsed'] if found['elapsed'] else 0:.1f}"}

    layout = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s, {speed} x real time, {remaining} left"
    seconds = sum(map(duration, files))
    with Bar(total=seconds, bar_format=layout if seconds else None) as bar:
        yield bar.update


def compare(parser: Parser, **options: Any) -> int:
    """Prints the table; returns 1 if an engine failed."""
    if options["text"] and len(options["text"]) != len(options["audio"]):
        parser.error(f"argument --text: given {len(options['text'])} times for {len(options['audio'])} AUDIO")
    if options["model"].startswith("random:") and not options["tokens"]:
        parser.error("argument --model: random weights never end a text, say how long with --tokens")
    from .compare.command import run

    return run(**options)


def temperatures(first: float, increment: float | None) -> tuple[float, ...]:
    """What to decode with, in the order of trying."""
    import numpy as np

    if increment is None or first > 1:
        return (first,)
    return tuple(np.arange(first, 1 + 1e-6, increment).tolist())


def spoken(language: str | None, is_multilingual: bool) -> str | None:
    if is_multilingual:
        return language
    if language not in (None, "en", "English"):
        log.warning("warning: the model knows English only, --language %s is not used", language)
    return "en"


def output_name(audio: str) -> str:
    """The name of an audio file's output files, without the ending."""
    return os.path.splitext(os.path.basename(audio))[0]


@contextmanager
def unfinished(output_dir: str) -> Iterator[str]:
    """A folder in `output_dir` for files that are still being written; raises OptionError if there can be none."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".maxwhisper-", dir=output_dir) as folder:
            yield folder
    except OSError as error:
        raise OptionError(f"--output_dir {output_dir}: cannot be written to: {error.strerror or error}") from error


def write(result: dict[str, Any], audio: str, output_dir: str, output_format: str, layout: dict[str, Any]) -> None:
    """Writes the output files of one audio file; each appears when it is complete."""
    from whisper.utils import get_writer

    with unfinished(output_dir) as folder:
        get_writer(output_format, folder)(result, audio, layout)
        for file in os.listdir(folder):
            os.replace(os.path.join(folder, file), os.path.join(output_dir, file))
