"""What the values of options are read with: OpenAI's types, which refuse what OpenAI's refuse, and our own.

OpenAI's are not imported from whisper.utils: that imports PyTorch, and `maxwhisper doctor` must start where PyTorch
cannot be imported.
"""

import argparse


def above_zero(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not '{value}'")
    return int(value)


def str2bool(value: str) -> bool:
    if value not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"must be True or False, not '{value}'")
    return value == "True"


def optional_int(value: str) -> int | None:
    try:
        return None if value == "None" else int(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number or None, not '{value}'") from error


def optional_float(value: str) -> float | None:
    try:
        return None if value == "None" else float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or None, not '{value}'") from error


def prompt(value: str) -> str:
    """Returns a text without the names of special tokens as it is, and refuses another one."""
    if "<|" in value:
        from whisper.tokenizer import get_encoding

        from ..options import special_token_in

        if special := special_token_in(value, get_encoding()):
            raise argparse.ArgumentTypeError(f"holds {special}, a special token: expected text without these")
    return value


def language(value: str) -> str:
    """Returns a language's code or its capitalised name, as OpenAI's command takes them, and refuses others."""
    from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

    if value not in LANGUAGES and value not in {name.title() for name in TO_LANGUAGE_CODE}:
        raise argparse.ArgumentTypeError(f"unknown language '{value}': expected a code or a name, as in en or English")
    return value
