"""The options of `maxwhisper transcribe`: those of OpenAI's command, their values and defaults, and our own."""

import argparse
import importlib
import inspect
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from maxwhisper import __version__
from maxwhisper.batched import BATCH_SIZE
from maxwhisper.cli import build_parser
from maxwhisper.cli.transcribe_command import in_english, telling, transcripts
from maxwhisper.errors import OptionError
from maxwhisper.whisper import load_model
from reference.fixtures import ROOT

from .command import CLIP, StubModel, assert_one_line, status

# The options whose values differ from OpenAI's on purpose.
DIFFERENCES = {
    "--model": "checked when it is loaded, as it may also be a file or a folder of another kind",
    "--device": "cpu unless asked for, and gpu as the device's name",
}
OWN = {
    "--artifacts": None,
    "--or_compile": False,
    "--dtype": "float32",
    "--batch_size": None,
    "--batched": False,
    "--hotwords": None,
    "--vad_filter": False,
}
"""The options that OpenAI's command has not, and their defaults."""
VALUES = ("0", "1", "2.5", "-1", "None", "True", "False", "false", "en", "English", "english", "Klingon", "text", "")


class ParserFound(Exception):
    pass


@pytest.fixture(scope="module")
def openai_parser() -> argparse.ArgumentParser:
    def stop(self: argparse.ArgumentParser, *_: Any) -> None:
        raise ParserFound(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ParserFound) as found:
            importlib.import_module("whisper.transcribe").cli()
    return found.value.args[0]


def our_options() -> dict[str, argparse.Action]:
    commands = next(each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return {name: each for each in commands.choices["transcribe"]._actions for name in each.option_strings}


def parsed(parser: argparse.ArgumentParser, *arguments: str) -> dict[str, Any] | None:
    """Returns the parsed options, None if the parser refuses them."""
    try:
        options = vars(parser.parse_args(arguments))
    except SystemExit:
        return None
    options.pop("run", None)
    return options


def test_options_have_openais_names_and_defaults(openai_parser: argparse.ArgumentParser) -> None:
    theirs = {name: each for each in openai_parser._actions for name in each.option_strings}
    assert our_options().keys() == theirs.keys() | OWN.keys()
    ours = parsed(build_parser(), "transcribe", "a.wav")
    expected = parsed(openai_parser, "a.wav")
    assert ours is not None and expected is not None
    assert ours | {"device": None} == expected | {"device": None} | own_defaults()
    assert (ours["device"], ours["model"]) == ("cpu", "turbo")


def test_every_option_takes_and_refuses_what_openais_does(
    openai_parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, compared = build_parser(), 0
    for action in openai_parser._actions:
        names = [name for name in action.option_strings if name not in ("-h", "--help")]
        if not names or names[0] in DIFFERENCES:
            continue
        values = {*VALUES, *(action.choices or ())}
        for value in values:
            argument = f"{names[0]}={value}"
            assert parsed(ours, "transcribe", "a.wav", argument) == _on_cpu(parsed(openai_parser, "a.wav", argument))
            compared += 1
    assert compared > len(VALUES) * (len(openai_parser._actions) - 5)


def _on_cpu(options: dict[str, Any] | None) -> dict[str, Any] | None:
    return options and options | {"device": "cpu"} | own_defaults()


def own_defaults() -> dict[str, Any]:
    return {name.removeprefix("--"): default for name, default in OWN.items()}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--fp16", "yes", "must be True or False, not 'yes'"),
        ("--beam_size", "2.5", "must be a whole number or None, not '2.5'"),
        ("--logprob_threshold", "none", "must be a number or None, not 'none'"),
    ],
)
def test_a_value_of_another_kind_is_told_what_was_expected(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["transcribe", CLIP, option, value]) == 2
    assert_one_line(capsys, f"argument {option}: {expected}")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", "inf", "must be 0 or from 1e-30 to 1e+30, not inf"),
        ("--temperature", "nan", "must be 0 or from 1e-30 to 1e+30, not nan"),
        ("--temperature", "-0.5", "must be 0 or from 1e-30 to 1e+30, not -0.5"),
        ("--temperature", "1e-40", "must be 0 or from 1e-30 to 1e+30, not 1e-40"),
        ("--temperature", "1e39", "must be 0 or from 1e-30 to 1e+30, not 1e+39"),
        ("--patience", "inf", "must be above 0 and finite, not inf"),
        ("--patience", "nan", "must be above 0 and finite, not nan"),
        ("--patience", "0.05", "must be more than half a text of --beam_size 5, not 0.05"),
        ("--hallucination_silence_threshold", "-1", "must be from 0 on and finite, not -1.0"),
        ("--hallucination_silence_threshold", "nan", "must be from 0 on and finite, not nan"),
        ("--hallucination_silence_threshold", "inf", "must be from 0 on and finite, not inf"),
        ("--temperature_increment_on_fallback", "inf", "must be from 0.001 on and finite, not inf"),
        ("--temperature_increment_on_fallback", "1e-9", "must be from 0.001 on and finite, not 1e-09"),
        ("--temperature_increment_on_fallback", "0", "must be from 0.001 on and finite, not 0.0"),
        ("--compression_ratio_threshold", "nan", "must be a number, not nan"),
        ("--logprob_threshold", "nan", "must be a number, not nan"),
        ("--no_speech_threshold", "nan", "must be a number, not nan"),
        ("--beam_size", "1001", "must be from 1 to 1000, not 1001"),
        ("--best_of", "0", "must be from 1 to 1000, not 0"),
    ],
)
@pytest.mark.parametrize(
    "command", [["transcribe", CLIP], ["live", "-"], ["bulk", CLIP, "texts"]], ids=lambda it: it[0]
)
def test_a_number_that_nothing_can_be_decoded_with(
    command: list[Any], option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status([*command, f"{option}={value}"]) == 2
    assert_one_line(capsys, f"argument {option}: {expected}")


@pytest.mark.parametrize("command", [["transcribe", CLIP], ["bulk", CLIP, "texts"]], ids=lambda it: it[0])
def test_a_clip_that_ends_before_it_starts(command: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert status([*command, "--clip_timestamps", "0,1,3,2"]) == 2
    assert_one_line(capsys, "argument --clip_timestamps: has an end at 2.0 s, before its start at 3.0 s")


@pytest.mark.parametrize("value", ["", "a\0b"], ids=["empty", "nul"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((["transcribe", CLIP], option) for option in ("--output_dir", "--model", "--model_dir", "--artifacts")),
        *((["live", "-"], option) for option in ("--output_dir", "--model", "--artifacts")),
        *((["serve"], option) for option in ("--api_key_file", "--race", "--model", "--model_dir")),
        *((["compare", CLIP], option) for option in ("--json", "--plot", "--text", "--artifacts", "--model")),
        *((["race", CLIP], option) for option in ("--json", "--html", "--svg", "--text", "--model")),
        (["compile", "--model", "tiny", "--target", "host"], "--out"),
        (["bulk", CLIP, "texts"], "--artifacts"),
        (["convert", CLIP], "OUT"),
        (["bulk", CLIP], "OUTPUT"),
        (["bulk"], "INPUT"),
    ],
    ids=lambda it: it if isinstance(it, str) else it[0],
)
def test_an_option_that_names_no_file(
    command: list[Any], option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an empty name a folder would be the one that one happens to be in, and a file of keys would be none."""
    given = [f"{option}={value}"] if option[0] == "-" else [value, "texts"] if option == "INPUT" else [value]
    assert status([*command, *given]) == 2
    assert_one_line(capsys, f"argument {option}: must be the name of a file or folder, not {value!r}")


@pytest.mark.parametrize("command", [["transcribe", CLIP], ["live"]], ids=lambda each: each[0])
def test_the_model_is_loaded_as_the_options_say(
    command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = inspect.signature(load_model)

    def refuse(*given: Any, **named: Any) -> None:
        raise OptionError(str(taken.bind(*given, **named).arguments))

    monkeypatch.setattr("maxwhisper.whisper.load_model", refuse)
    monkeypatch.chdir(tmp_path)
    of_model = {"model": "tiny", "device": "cuda:0", "model_dir": "kept", "artifacts": "graphs", "or_compile": "True"}
    options = [part for name, value in (of_model | {"dtype": "float16"}).items() for part in (f"--{name}", value)]
    assert status([*command, *options]) == 1
    loaded = {"name": "tiny", "device": "gpu", "download_root": "kept", "artifacts": "graphs", "or_compile": True}
    assert_one_line(capsys, str(loaded | {"dtype": "float16"}))


def test_patience_needs_beams(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["transcribe", CLIP, "--beam_size", "None", "--patience", "2"]) == 2
    assert_one_line(capsys, "argument --patience: needs --beam_size")


def test_threads_that_nobody_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: StubModel())
    assert status(["transcribe", CLIP, "-o", tmp_path, "--threads", "None"]) == 0


@pytest.mark.parametrize("more", [10**6, 10**20])
def test_more_threads_than_cpus(more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would end the process where it cannot start them all."""
    asked: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    monkeypatch.setattr("maxwhisper.whisper.load_model", lambda *_, **__: StubModel())
    assert status(["transcribe", CLIP, "-o", tmp_path, "--threads", more]) == 0
    assert asked == [os.cpu_count()]


def test_help_says_what_a_checkpoint_may_be_and_a_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("transcribe", "convert"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "path of a .pt or .safetensors file or of a Hugging Face folder" in said
        assert ") (default: " not in said


def test_every_option_has_help() -> None:
    assert all(action.help for action in our_options().values())


def test_version_is_the_distributions() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


def test_english_is_what_english_only_models_know(caplog: pytest.LogCaptureFixture) -> None:
    for language in (None, "en", "English"):
        found = in_english({"language": language, "task": "transcribe", "beam_size": 5})
        assert found == {"language": "en", "task": "transcribe", "beam_size": 5}
    assert not caplog.text


@pytest.mark.parametrize(
    ("n_file", "batch_size", "batched", "at_the_end"),
    [(1, None, False, False), (1, 4, False, False), (2, 1, False, False), (2, 2, False, True), (1, None, True, True)],
)
def test_text_comes_as_it_is_found_where_files_do_not_advance_together(
    n_file: int, batch_size: int | None, batched: bool, at_the_end: bool
) -> None:
    options = {"verbose": True, "batched": batched, "batch_size": batch_size}
    with telling(["a"] * n_file, options):
        assert options["verbose"] is (None if at_the_end else True)


@pytest.mark.parametrize(
    ("batched", "given", "expected"), [(False, None, 1), (False, 3, 3), (True, None, BATCH_SIZE), (True, 3, 3)]
)
def test_as_many_decode_together_as_the_option_says(
    batched: bool, given: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("maxwhisper.scheduling.transcribe_many", lambda _, files, n, **__: asked.append(n) or files)
    monkeypatch.setattr("maxwhisper.batched.transcribe_batched", lambda *_, batch_size: asked.append(batch_size))
    list(transcripts(None, [str(CLIP)], {"batched": batched, "batch_size": given}))
    assert asked == [expected]
