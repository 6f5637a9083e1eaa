"""Files that are whole or not there."""

import re
from pathlib import Path

import pytest

from maxwhisper.checkpoint import convert
from maxwhisper.errors import OptionError
from maxwhisper.files import replacing
from maxwhisper.whisper import compile_model, load_model
from reference.fixtures import NANO


def test_a_name_may_be_as_long_as_names_are(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)  # 254 bytes of 255
    with replacing(path) as unfinished:
        unfinished.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_name() -> None:
    with pytest.raises(OSError, match="embedded null byte"), replacing(Path("a\0b")):
        pass
    with pytest.raises(OptionError, match="cannot be written: embedded null byte"):
        convert(NANO, "a\0.safetensors")
    for folder in ("", "a\0b"):
        with pytest.raises(OptionError, match=f"out is {re.escape(repr(folder))}, expected the name of a folder"):
            compile_model(NANO, "host", folder)
        with pytest.raises(OptionError, match=f"artifacts is {re.escape(repr(folder))}, expected the name of a folder"):
            load_model(NANO, artifacts=folder)


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (link := tmp_path / "link.json").symlink_to(tmp_path / "there" / "file.json")
    for content in ("first", "second"):
        with replacing(link) as unfinished:
            assert unfinished.name == link.name  # whose ending says what is written
            unfinished.write_text(content)
        assert link.is_symlink() and (tmp_path / "there" / "file.json").read_text() == content
