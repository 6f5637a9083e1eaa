"""Files that are whole or not there."""

from pathlib import Path

from maxwhisper.files import replacing


def test_a_name_may_be_as_long_as_names_are(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)  # 254 bytes of 255
    with replacing(path) as unfinished:
        unfinished.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (link := tmp_path / "link.json").symlink_to(tmp_path / "there" / "file.json")
    for content in ("first", "second"):
        with replacing(link) as unfinished:
            assert unfinished.name == link.name  # whose ending says what is written
            unfinished.write_text(content)
        assert link.is_symlink() and (tmp_path / "there" / "file.json").read_text() == content
