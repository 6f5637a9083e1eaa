"""The options of `maxwhisper transcribe`: those of OpenAI's `whisper` command, and a few of our own."""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..limits import COLDEST, HOTTEST, MOST_TEXTS, backwards
from ..pipes import is_regular, is_terminal, not_a_file, pipe_behind
from .model_options import add_model
from .option_types import above_zero, language, optional_float, optional_int, prompt, str2bool
from .outputs import FORMATS, WORD_OPTIONS, output_name

FINITE = sys.float_info.max
RANGES = {
    "best_of": (1, MOST_TEXTS, f"from 1 to {MOST_TEXTS}"),
    "beam_size": (1, MOST_TEXTS, f"from 1 to {MOST_TEXTS}"),
    "patience": (math.ulp(0), FINITE, "above 0 and finite"),
    "length_penalty": (0, 1, "from 0 to 1"),
    "temperature_increment_on_fallback": (0.001, FINITE, "from 0.001 on and finite"),
    "hallucination_silence_threshold": (0, FINITE, "from 0 on and finite"),
    "compression_ratio_threshold": (-math.inf, math.inf, "a number"),
    "logprob_threshold": (-math.inf, math.inf, "a number"),
    "no_speech_threshold": (-math.inf, math.inf, "a number"),
}
"""The least and the most that an option may be, and how that is said."""


def add_transcribe(commands: Any) -> argparse.ArgumentParser:
    """Adds the command `transcribe` to those of a parser."""
    parser = commands.add_parser(
        "transcribe",
        help="write the text of audio files",
        description="Write the text of audio files, with the options and output files of OpenAI's whisper command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    audio = "audio or video files or pipes, of any format libav reads; - is standard input"
    parser.add_argument("audio", nargs="+", metavar="AUDIO", help=audio)
    add_files_and_devices(parser.add_argument_group("model, device and files").add_argument)
    add_clips(add_decoding(parser))
    add_fallback(parser)
    add_words(parser)
    return parser


def add_files_and_devices(add: Callable[..., Any]) -> None:
    add_model(add)
    add("--output_dir", "-o", default=".", help="folder for the output files, made if it is not there")
    add("--output_format", "-f", default="all", choices=[*FORMATS, "all"], help="which output files to write")
    add("--verbose", type=str2bool, default=True, help="True prints the text as it comes, False shows a progress bar")
    together = (
        "how many files to decode together, on a CPU with the transcripts they have one at a time; with --batched,"
    )
    add("--batch_size", type=above_zero, metavar="N", help=f"{together} how many pieces; 1, and 8, unless given")
    batched = "cut audio at silences into pieces that decode together: not the same transcript"
    add("--batched", action="store_true", help=batched)
    add("--threads", type=optional_int, default=0, help="threads of PyTorch, not of MAX; 0 or None: its choice")
    fp16 = "has no effect: weights keep the precision they are stored in, and arithmetic is as --dtype says"
    add("--fp16", type=str2bool, default=True, help=fp16)


def add_decoding(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Adds what the text depends on, and returns what adds more to the group."""
    add = parser.add_argument_group("decoding").add_argument
    add("--task", default="transcribe", choices=["transcribe", "translate"], help="keep the language, or go to English")
    add("--language", type=language, help="what is spoken, as in en or English; found out by itself unless given")
    add("--temperature", type=float, default=0, help="0 takes the likeliest text; above, tokens are drawn at random")
    add("--best_of", type=optional_int, default=5, help="how many texts to draw at a temperature above 0")
    add("--beam_size", type=optional_int, default=5, help="how many texts to pursue at temperature 0; None pursues one")
    add("--patience", type=float, help="beam search stops after this times beam_size texts; 1 unless given")
    penalty = "exponent from 0 to 1 of the length penalty; unless given, the length divides"
    add("--length_penalty", type=float, help=penalty)
    add("--suppress_tokens", default="-1", help="numbers of tokens never to write, comma-separated; -1 is most symbols")
    add("--initial_prompt", type=prompt, help="text to continue from, for example with names to be spelt right")
    add("--carry_initial_prompt", type=str2bool, default=False, help="give initial_prompt to every window")
    add("--hotwords", type=prompt, help="words to expect, as names, which every window is given")
    condition = "give each window the text before it: more consistent, but errors can repeat themselves"
    add("--condition_on_previous_text", type=str2bool, default=True, help=condition)
    return add


def add_clips(add: Callable[..., Any]) -> None:
    """Adds what says which parts of a recording to transcribe."""
    add("--clip_timestamps", default="0", help="transcribe these parts only: start,end,start,end,... in seconds")


def add_fallback(parser: argparse.ArgumentParser) -> None:
    """Adds what windows are tried again by, or passed over."""
    add = parser.add_argument_group("when a window counts as failed or silent").add_argument
    increment = "how much warmer to try a failed window again, up to temperature 1; None does not try again"
    add("--temperature_increment_on_fallback", type=optional_float, default=0.2, help=increment)
    compression = "failed if gzip shortens the text by more than this factor: it repeats itself"
    add("--compression_ratio_threshold", type=optional_float, default=2.4, help=compression)
    logprob = "failed if the mean log probability of its tokens is lower"
    add("--logprob_threshold", type=optional_float, default=-1.0, help=logprob)
    silent = "silent if it failed by logprob_threshold and the probability of no speech is higher than this"
    add("--no_speech_threshold", type=optional_float, default=0.6, help=silent)
    speech = "transcribe only where a voice-activity detector hears speech; needs maxwhisper[batched]"
    add("--vad_filter", type=str2bool, default=False, help=speech)
    skip = "skip silences longer than this, in seconds, around text that looks invented; needs --word_timestamps True"
    add("--hallucination_silence_threshold", type=optional_float, help=skip)


def add_words(parser: argparse.ArgumentParser) -> None:
    """Adds the options of words and subtitles."""
    add = parser.add_argument_group("words and subtitles").add_argument
    add("--word_timestamps", type=str2bool, default=False, help="find when each word begins and ends")
    add("--prepend_punctuations", default="\"'“¿([{-", help="symbols that belong to the word after them")
    add("--append_punctuations", default="\"'.。,，!！?？:：”)]}、", help="symbols that belong to the word before them")
    needs = "needs --word_timestamps True"
    add("--highlight_words", type=str2bool, default=False, help=f"underline each word as it is said; {needs}")
    add("--max_line_width", type=optional_int, help=f"longest line of a subtitle, in characters; {needs}")
    add("--max_line_count", type=optional_int, help=f"most lines of a subtitle, with --max_line_width; {needs}")
    add("--max_words_per_line", type=optional_int, help=f"most words of a line, without --max_line_width; {needs}")


def unusable(options: dict[str, Any]) -> str | None:
    """Says what is wrong with the values of the options, if anything is; their types are right."""
    if (options["threads"] or 0) < 0:
        return f"argument --threads: must not be below 0, not {options['threads']}"
    return (
        unusable_decoding(options)
        or unusable_words(options)
        or unusable_files(options["audio"])
        or replaced(options["audio"], options["output_dir"], options["output_format"])
    )


def unusable_words(options: dict[str, Any]) -> str | None:
    """Says what is wrong with the values of the options of words and subtitles, if anything is."""
    for name in WORD_OPTIONS[1:]:
        if options[name] is not None and not options[name] > 0:
            return f"argument --{name}: must be above 0, not {options[name]}"
    if not options["word_timestamps"]:
        for name in WORD_OPTIONS:
            if options[name]:
                return f"argument --{name}: requires --word_timestamps True"
    return None


def unusable_decoding(options: dict[str, Any]) -> str | None:
    """Says what is wrong with the values of those options that the text depends on, if anything is."""
    for name, (least, most, expected) in RANGES.items():
        if (value := options.get(name)) is not None and not least <= value <= most:
            return f"argument --{name}: must be {expected}, not {value}"
    if (warm := options["temperature"]) != 0 and not COLDEST <= warm <= HOTTEST:
        return f"argument --temperature: must be 0 or from {COLDEST:g} to {HOTTEST:g}, not {warm}"
    beams, patience = options["beam_size"], options["patience"]
    if patience is not None and beams is None and options["temperature"] == 0:
        return "argument --patience: needs --beam_size"
    if patience is not None and beams and beams * patience <= 0.5:
        return f"argument --patience: must be more than half a text of --beam_size {beams}, not {patience}"
    if isinstance(suppressed := numbers("suppress_tokens", int, -1, options), str):
        return suppressed
    return unusable_clips(options) if "clip_timestamps" in options else None


def numbers(name: str, kind: Callable[[str], Any], least: float, options: dict[str, Any]) -> list[Any] | str:
    """Returns the numbers between the commas of an option, or says what is wrong with them."""
    try:
        found = [kind(part) for part in options[name].split(",") if options[name]]
    except ValueError:
        return f"argument --{name}: must be numbers with commas between them, not '{options[name]}'"
    if not all(each >= least for each in found):
        return f"argument --{name}: must be from {least} on, not '{options[name]}'"
    return found


def unusable_clips(options: dict[str, Any]) -> str | None:
    """Says what is wrong with the clips, by themselves or beside another option, if anything is."""
    clips = numbers("clip_timestamps", float, 0, options)
    if isinstance(clips, str):
        return clips
    if wrong := backwards(clips):
        return f"argument --clip_timestamps: {wrong}"
    if clips in ([], [0.0]):
        return None
    others = {"--vad_filter True": options["vad_filter"], "--batched": options.get("batched")}
    beside = next((other for other, is_given in others.items() if is_given), None)
    return beside and f"argument --clip_timestamps: cannot be combined with {beside}"


def without_effect(options: dict[str, Any]) -> Iterator[str]:
    """Yields which options have no effect beside the others, in the words of OpenAI's command where it says so."""
    if options.get("max_line_count") and not options["max_line_width"]:
        yield "--max_line_count has no effect without --max_line_width"
    if options.get("max_words_per_line") and options["max_line_width"]:
        yield "--max_words_per_line has no effect with --max_line_width"
    if options.get("hallucination_silence_threshold") is not None and not options["word_timestamps"]:
        yield "--hallucination_silence_threshold has no effect without --word_timestamps True"
    if options.get("vad_filter") and options.get("batched"):
        yield "--vad_filter has no effect with --batched, which leaves silence out anyway"
    if options.get("carry_initial_prompt") and not options["initial_prompt"]:
        yield "--carry_initial_prompt has no effect without --initial_prompt"
    if options["or_compile"] and not options["artifacts"]:
        yield "--or_compile has no effect without --artifacts"


def unusable_files(files: list[str]) -> str | None:
    """Says what is wrong with the names of the audio files, taken together or of standard input, if anything is."""
    if terminal := next(filter(is_terminal, files), None):
        return f"argument AUDIO: {not_a_file(terminal, 'terminal')}"
    names = [output_name(audio) for audio in files]
    if (most := Counter(names).most_common(1)[0])[1] > 1:
        return f"argument AUDIO: the output of {most[1]} files would have the name '{most[0]}'"
    pipes = [pipe_behind(audio) for audio in files]
    if once := [pipe for pipe in pipes if pipe and pipes.count(pipe) > 1]:
        same = [f"'{audio}'" for audio, pipe in zip(files, pipes, strict=True) if pipe == once[0]]
        return f"argument AUDIO: {' and '.join(same)} are the same pipe, which can be read once"
    return None


def replaced(files: list[str], output_dir: str, output_format: str) -> str | None:
    """Says which recording the output of one would replace, if one would."""
    recordings = {os.path.realpath(audio): audio for audio in files if is_regular(audio)}
    for name in map(output_name, files):
        for ending in FORMATS if output_format == "all" else (output_format,):
            target = os.path.join(output_dir, f"{name}.{ending}")
            if is_regular(target) and (audio := recordings.get(os.path.realpath(target))):
                return f"argument AUDIO: the output {target} would replace '{audio}'"
    return None
