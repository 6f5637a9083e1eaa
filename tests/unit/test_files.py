"""Files that are whole or not there."""

from pathlib import Path

from maxwhisper.files import replacing


def test_a_name_may_be_as_long_as_names_are(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)  # 254 bytes of 255
    with replacing(path) as unfinished:
        unfinished.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
