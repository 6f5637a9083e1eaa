"""The command `maxwhisper transcribe`, behind its options."""

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..errors import MaxWhisperError
from ..subtitles import as_line
from .model_options import MODEL_OPTIONS, leave_cores_to_max, load
from .outputs import WORD_OPTIONS, unfinished, write
from .terminal import failed, shown
from .transcribe_options import unusable, without_effect

# PyTorch, MAX and openai-whisper are imported where they are used: they take seconds, and Ctrl-C must work meanwhile.

log = logging.getLogger("maxwhisper")


def transcribe(parser: argparse.ArgumentParser, **options: Any) -> int:
    """Transcribes every file it can; returns 1 if there was one that it could not."""
    output_dir, output_format = before_the_work(parser, unusable(options), options)

    import torch

    from ..options import transcribing

    if threads := options.pop("threads"):
        torch.set_num_threads(min(threads, os.cpu_count() or 1))  # the process ends where it cannot start so many
    options.pop("fp16")
    model = load(**{name: options.pop(name) for name in MODEL_OPTIONS})
    files, layout = options.pop("audio"), {name: options.pop(name) for name in WORD_OPTIONS}
    options["temperature"] = temperatures(options["temperature"], options.pop("temperature_increment_on_fallback"))
    if not model.is_multilingual:
        options = in_english(options)
    transcribing({name: value for name, value in options.items() if name not in ("batch_size", "batched")}, model)
    failures = []
    with telling(files, options) as tell:
        for number, result in transcripts(model, files, options):
            audio, shown_as = files[number], files[number] or "''"
            try:
                if isinstance(result, Exception):
                    raise result
                failures += write(result, audio, output_dir, output_format, layout)
                tell(audio, result)
            except MaxWhisperError as error:
                failures.append(str(error) if str(error).startswith(f"{shown_as}: ") else f"{shown_as}: {error}")
            except Exception as error:  # one file must not take the others down
                failures.append(f"{shown_as}: {type(error).__name__}: {error}")
    return max(map(failed, failures), default=0)


def before_the_work(parser: argparse.ArgumentParser, reason: str | None, options: dict[str, Any]) -> tuple[str, str]:
    """Ends the command if there is a reason to, warns of options without effect, and returns folder and format of the
    output files, which it takes from the options. Raises OptionError for a folder that cannot be written to."""
    if reason:
        parser.error(reason)
    for idle in without_effect(options):
        log.warning("warning: %s", idle)
    output_dir = options.pop("output_dir")
    with unfinished(output_dir):
        pass
    leave_cores_to_max()
    return output_dir, options.pop("output_format")


def transcripts(model: Any, files: list[str], options: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Yields the number of every file and its result, or what was raised, as each is done."""
    from ..batched import BATCH_SIZE, transcribe_batched
    from ..scheduling import attempt, loaded, transcribe_many

    batch_size, batched = options.pop("batch_size"), options.pop("batched")
    if not batched:
        return transcribe_many(model, files, batch_size or 1, **options)
    run = partial(transcribe_batched, model, batch_size=batch_size or BATCH_SIZE)
    return ((number, attempt(run, waveform, options)) for number, waveform in loaded(files))


@contextmanager
def telling(files: list[str], options: dict[str, Any]) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Gives what to call with a file that is done and its result, while `options` have the model show the rest: a
    progress bar, or the text, which of files that advance together comes when each is done."""
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
    print(f"{shown(' '.join(audio.splitlines()))}:")
    for segment in result["segments"]:
        print(as_line(segment), flush=True)


@contextmanager
def progress_bar(files: list[str]) -> Iterator[Callable[[float], None]]:
    """Shows a bar on standard error, of the seconds of audio that are done, and gives what to call with more of them.
    Where a file's length is not known beforehand, as of a pipe, it is a count."""
    import tqdm

    from ..audio import duration

    class Bar(tqdm.tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            found = super().format_dict
            return found | {"speed": f"{found['n'] / found['elapsed'] if found['elapsed'] else 0:.1f}"}

    lengths = [duration(file) for file in files]
    total = None if None in lengths else sum(filter(None, lengths))
    layout = "{n:.0f} s, {speed} x real time"
    if total:
        layout = "{percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s, {speed} x real time, {remaining} left"
    with Bar(total=total, bar_format=layout) as bar:
        yield bar.update


def temperatures(first: float, increment: float | None) -> tuple[float, ...]:
    """Returns what to decode with, in the order of trying."""
    import numpy as np

    if increment is None or first > 1:
        return (first,)
    return tuple(np.arange(first, 1 + 1e-6, increment).tolist())


def in_english(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options for a model that knows English only, and warns of those that it cannot do."""
    if options["language"] not in (None, "en", "English"):
        log.warning("warning: the model knows English only, --language %s is not used", options["language"])
    if options["task"] == "translate":
        log.warning("warning: the model knows English only, --task translate is not used")
    return options | {"language": "en", "task": "transcribe"}
