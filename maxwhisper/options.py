"""The options of `Whisper.transcribe` and `Whisper.decode`, checked before they reach openai-whisper's code.

What that code takes is taken, and besides every form of a number or a sequence that can mean nothing else. What it
would fail at with an error about something else, or read as another option than was meant, is an OptionError here. The
combinations that it refuses itself are left to it.
"""

import inspect
import logging
import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from tiktoken import Encoding
from whisper.audio import FRAMES_PER_SECOND, HOP_LENGTH
from whisper.decoding import DecodingOptions
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE, Tokenizer, get_tokenizer
from whisper.transcribe import transcribe

from .errors import OptionError, warn_once
from .limits import COLDEST, HOTTEST, MANY_TEXTS, MOST_TEXTS, backwards

log = logging.getLogger("maxwhisper")

Options = Callable[..., DecodingOptions]
TASKS = ("transcribe", "translate")
OF_THE_LOOP = frozenset(inspect.signature(transcribe).parameters)
"""The options of `transcribe` that `decode` does not have, and temperature, which there is one number."""
OF_FASTER_WHISPER = frozenset({"hotwords", "vad_filter"})
"""Those that openai-whisper does not have."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a mel, features and samples may be in."""
DETECTOR = ("silero_vad", "onnxruntime")
"""Modules of the detector of speech."""


def transcribing(options: Mapping[str, Any], model: Whisper) -> dict[str, Any]:
    """Returns the options of `transcribe` but for clip_timestamps, as openai-whisper's code takes them.

    Raises OptionError for a value that it could not use, TypeError for an option that it does not have.
    """
    found = dict(options)
    least = dict.fromkeys(("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"), -math.inf)
    for name, limit in {**least, "hallucination_silence_threshold": 0.0}.items():
        if found.get(name) is not None:
            found[name] = number(name, found[name], limit)
    no_texts(found, ("verbose", "condition_on_previous_text", "carry_initial_prompt", "word_timestamps"))
    if found.get("prompt"):
        warn_once("prompt has no effect on transcribe, which gives every window its own: use initial_prompt")
    if "temperature" in found:
        found["temperature"] = temperatures(found["temperature"])
    for name in ("prepend_punctuations", "append_punctuations"):
        if not isinstance(found.get(name, ""), str | Sequence):
            raise refused(name, found[name], "symbols in a string")
    for name, used in (("initial_prompt", "last"), ("hotwords", "first")):
        if (text := found.get(name)) is not None:
            if not isinstance(text, str):
                raise refused(name, text, "a text")
            check_prompt(name, text, model, used)
    if not isinstance(found.get("vad_filter", False), bool):
        raise refused("vad_filter", found["vad_filter"], "True or False")
    if found.get("vad_filter") and None in map(find_spec, DETECTOR):  # before the work: live speech is not said again
        raise OptionError("vad_filter needs silero-vad and onnxruntime: pip install 'maxwhisper[batched]'")
    of_decode = {name: value for name, value in found.items() if name not in OF_THE_LOOP | OF_FASTER_WHISPER}
    checked = decoding(DecodingOptions(**of_decode), model, TASKS)
    return found | {name: getattr(checked, name) for name in of_decode}


def decoding(options: DecodingOptions, model: Whisper, tasks: Sequence[str] = (*TASKS, "lang_id")) -> DecodingOptions:
    """Returns the options of `decode` as openai-whisper's code takes them; raises OptionError for unusable ones."""
    if not isinstance(options, DecodingOptions):
        raise refused("options", options, "whisper.DecodingOptions")
    if options.task not in tasks:
        raise refused("task", options.task, " or ".join(tasks))
    if options.language is not None and not isinstance(options.language, str):
        raise refused("language", options.language, "a code or a name, as in en or English")
    check_language(options.language, model)
    no_texts(vars(options), ("without_timestamps", "suppress_blank", "fp16"))
    found: dict[str, Any] = {"temperature": temperature(options.temperature)}
    for check, name, least in (
        (whole, "sample_len", 0),
        (texts, "best_of", 0),
        (texts, "beam_size", 1),
        (number, "patience", 0),
        (number, "length_penalty", -math.inf),  # beyond 0 and 1 it is openai-whisper that refuses it
        (number, "max_initial_timestamp", 0),
    ):
        if (value := getattr(options, name)) is not None:
            found[name] = check(name, value, least)
    if (beams := found.get("beam_size")) and not 0.5 < beams * (found.get("patience") or 1) < math.inf:
        raise refused("patience", found["patience"], f"more than half a text of beam_size {beams}, and finite")
    for name in ("best_of",) if found["temperature"] else ("beam_size",):
        if (found.get(name) or 0) > MANY_TEXTS:
            warn_of_cost(name, found[name], model.dims)
    for name in ("prompt", "prefix"):
        found[name] = text_or_tokens(name, getattr(options, name), model)
    if options.suppress_tokens is not None:
        found["suppress_tokens"] = token_ids("suppress_tokens", parts(options.suppress_tokens), model.dims.n_vocab, -1)
    return replace(options, **found)


def refused(name: str, value: object, expected: str) -> OptionError:
    """Returns the error of a value that an option cannot have."""
    shown = " ".join(reprlib.repr(value).split())
    return OptionError(f"{name} is {shown}, expected {expected}")


def check_dense(name: str, x: torch.Tensor) -> None:
    """Raises OptionError for a tensor whose values are not all there, one beside the other."""
    if x.is_nested:
        raise OptionError(f"{name} is nested, expected torch.strided, with rows of one length")
    if x.layout != torch.strided:
        raise OptionError(f"{name} is {x.layout}, expected torch.strided, as to_dense() gives")
    if x.is_meta:
        raise OptionError(f"{name} is on the device meta, which has no values, expected one on the CPU or a GPU")


def no_texts(options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises OptionError where True or False is given as a text: each would be taken for True."""
    for name in names:
        if isinstance(options.get(name), str):
            raise refused(name, options[name], "True or False")


def check_calls(given: Mapping[str, Any]) -> None:
    """Raises OptionError for what cannot be called, before the work at whose end it would be."""
    for name, value in given.items():
        if value is not None and not callable(value):
            raise refused(name, value, "a function")


def scalar(value: Any) -> Any:
    """Returns Python's number in the place of NumPy's or PyTorch's."""
    return value.item() if isinstance(value, np.generic | np.ndarray | torch.Tensor) and value.ndim == 0 else value


def number(name: str, value: Any, least: float = 0.0) -> Any:
    """Returns a finite number from `least` on; any number, infinities too, where that is minus infinity. Raises
    OptionError for another value, as the functions below do."""
    found, finite = scalar(value), least > -math.inf
    try:
        real = float(found) if isinstance(found, Real) else math.nan
    except OverflowError:  # of a whole number
        real = math.inf
    if not real >= least or finite and math.isinf(real):
        raise refused(name, value, f"a finite number from {least:g} on" if finite else "a number")
    return found if isinstance(found, Integral) else real


def whole(name: str, value: Any, least: float, most: float = math.inf) -> int:
    """Returns a whole number from `least` to `most`."""
    found = scalar(value)
    if not isinstance(found, Integral) or not least <= int(found) <= most:
        raise refused(name, value, f"a whole number from {least:g} {'on' if most == math.inf else f'to {most}'}")
    return int(found)


texts = partial(whole, most=MOST_TEXTS)


def warn_of_cost(name: str, n_text: int, dims: ModelDimensions) -> None:
    """Says what so many texts of a window cost: what is kept of each, and that each is decoded."""
    gigabytes = n_text * 2 * dims.n_text_layer * dims.n_text_ctx * dims.n_text_state * 4 / 1e9
    warn_of(f"{name} is {n_text}: a window takes the time of {n_text} texts or more, and {gigabytes:.2g} GB for them")


@cache
def warn_of(cost: str) -> None:
    """Says so once; not as `warn_once`, which `bulk` takes for an error."""
    log.warning("warning: %s", cost)


def temperature(value: Any) -> Any:
    """Returns a temperature: 0, or one that leaves logits numbers."""
    found = number("temperature", value)
    if found and not COLDEST <= found <= HOTTEST:
        raise refused("temperature", value, f"0 or a number from {COLDEST:g} to {HOTTEST:g}")
    return found


def check_language(language: str | None, model: Whisper) -> None:
    """Raises OptionError for a language that openai-whisper has, and this model no token for: Cantonese, in most."""
    code = TO_LANGUAGE_CODE.get((language or "").lower(), (language or "").lower())
    if model.is_multilingual and code in LANGUAGES and list(LANGUAGES).index(code) >= model.num_languages:
        raise refused("language", language, f"one of the first {model.num_languages} of openai-whisper's languages")


def is_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping)


def temperatures(value: Any) -> Any:
    """Returns a temperature, or those to try one after the other."""
    value = scalar(value)
    if not is_several(value):
        return temperature(value)
    if several := tuple(map(temperature, value)):
        return several
    raise refused("temperature", value, "a finite number from 0 on, or several")


def parts(value: Any) -> Any:
    """Returns the whole numbers between the commas of a string; what is none of these stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return [int(part) for part in value.split(",")] if value else []
    except ValueError:
        return value


def token_ids(name: str, value: Any, n_vocab: int, least: int = 0) -> list[int]:
    """Returns numbers of tokens."""
    expected = f"numbers of tokens from {least} to {n_vocab - 1}"
    if not is_several(value):
        raise refused(name, value, expected)
    try:
        ids = [operator.index(scalar(each)) for each in value]
    except TypeError as error:
        raise refused(name, value, expected) from error
    if wrong := [each for each in ids if not least <= each < n_vocab]:
        raise OptionError(f"{name} has {wrong[0]}, expected {expected}")
    return ids


def text_or_tokens(name: str, value: Any, model: Whisper) -> Any:
    """Returns a text or numbers of tokens; of a prompt's, as many as are of use."""
    if value is None:
        return None
    if not isinstance(value, str):
        of_use = list(value)[-longest_prompt(model) :] if name == "prompt" and is_several(value) else value
        return token_ids(name, of_use, model.dims.n_vocab)
    if name == "prompt":
        check_prompt(name, value, model)
    else:
        check_plain(name, value, model)
    return value


# ---- prompts -------------------------------------------------------------------------------------------------------


def tokenizer_of(model: Whisper, **of_text: str) -> Tokenizer:
    """Returns openai-whisper's tokenizer for a model, and maybe for a language and a task."""
    return get_tokenizer(model.is_multilingual, num_languages=model.num_languages, **of_text)


def special_token_in(text: str, encoding: Encoding) -> str | None:
    """Finds a special token whose name is in a text, if there is one: they are not made from text."""
    return next((each for each in encoding.special_tokens_set if each in text), None) if "<|" in text else None


def check_plain(name: str, text: str, model: Whisper) -> None:
    """Raises OptionError for a text with special tokens."""
    if special := special_token_in(text, tokenizer_of(model).encoding):
        raise OptionError(f"{name} holds {special}, a special token: expected text without these")


def prompt_tokens(text: str, model: Whisper) -> list[int]:
    return tokenizer_of(model).encode(" " + text.strip())


def longest_prompt(model: Whisper) -> int:
    """Returns how many tokens of a prompt a decoder is given, the last ones."""
    return model.dims.n_text_ctx // 2 - 1


def check_prompt(name: str, text: str, model: Whisper, used: str = "last") -> None:
    """Raises OptionError as `check_plain`, and warns of a text that is too long to be used whole."""
    check_plain(name, text, model)
    n_token, longest = len(prompt_tokens(text, model)), longest_prompt(model)
    if n_token > longest:
        warn_once(f"{name} has {n_token} tokens, of which the {used} {longest} are used: shorten it")


def options_of_windows(options: Mapping[str, Any], hotwords: str | None, model: Whisper) -> Options:
    """Returns what makes the options of every window of those that `transcribe` gives it.

    Where `carry_initial_prompt` has a window begin with a text that leaves no room for more, there is no more: in
    openai-whisper's loop the text before the window would push it out.
    """
    make: Options = DecodingOptions
    longest = longest_prompt(model)
    text = options.get("initial_prompt") if options.get("carry_initial_prompt") else None
    carried = prompt_tokens(text, model) if text else []
    if len(carried) >= longest:
        make = partial(with_prompt, carried[-longest:])
    if not hotwords:
        return make
    return partial(with_hotwords, prompt_tokens(hotwords, model)[:longest], len(carried), longest, make)


def with_prompt(tokens: list[int], **options: Any) -> DecodingOptions:
    return DecodingOptions(**{**options, "prompt": tokens})


def with_hotwords(first: list[int], n_carried: int, longest: int, make: Options, **options: Any) -> DecodingOptions:
    """Returns options whose prompt begins with hotwords, as faster-whisper has it: not beside a prefix. The room that
    they leave is that of the carried prompt, and then of the text before the window; of both the end counts."""
    found = make(**options)
    if found.prefix:
        return found
    given, room = list(found.prompt or ()), longest - len(first)
    carried, before = last(given[:n_carried], room), given[n_carried:]
    return replace(found, prompt=first + carried + last(before, room - len(carried)))


def last(tokens: list[int], number: int) -> list[int]:
    return tokens[max(0, len(tokens) - number) :]


# ---- times ---------------------------------------------------------------------------------------------------------


def within(timestamps: Any, n_samples: int) -> list[float]:
    """Moves the `clip_timestamps` of `transcribe` to the end of the audio where they lie behind it: openai-whisper's
    loop would never end there. Warns of a clip that is all behind it, of which there is no text.

    Raises OptionError for what is no time in seconds.
    """
    given = timestamps.split(",") if isinstance(timestamps, str) and timestamps else timestamps
    try:
        clips = [float(each) for each in given] if is_several(given) or given == "" else [math.nan]
    except (TypeError, ValueError, OverflowError):
        clips = [math.nan]
    if not all(each >= 0 for each in clips):
        shown = " ".join(str(timestamps).split())
        raise OptionError(f"clip_timestamps must be seconds from 0 on, with commas between them, not '{shown}'")
    if wrong := backwards(clips):
        raise OptionError(f"clip_timestamps {wrong}")
    end = n_samples // HOP_LENGTH / FRAMES_PER_SECOND
    if late := [start for start in clips[::2] if start > end]:
        warn_of(f"clip_timestamps: {late[0]:g} s is behind the end of the audio, at {end:g} s: no text from there")
    return [min(each, end) for each in clips]
