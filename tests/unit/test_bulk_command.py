"""The options of `maxwhisper bulk`, without what it needs."""

from pathlib import Path

import pytest

from maxwhisper.cli import bulk_command

from .command import assert_one_line, status


def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bulk_command, "find_spec", lambda module: None if module in ("ray", "pandas") else module)
    assert status(["bulk", tmp_path, tmp_path / "out"]) == 1
    assert_one_line(capsys, "maxwhisper bulk needs ray[data], pandas: pip install 'maxwhisper[bulk]'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gpus", "-1"], "argument --gpus: must be a number from 0 on, not '-1'"),
        (["--gpus", "inf"], "argument --gpus: must be a number from 0 on, not 'inf'"),
        (["--actors", "0"], "argument --actors: must be a whole number above 0"),
        (
            ["--vad_filter", "True", "--clip_timestamps", "1,2"],
            "--clip_timestamps: cannot be combined with --vad_filter",
        ),
        (["--beam_size", "0"], "argument --beam_size: must be from 1 to 1000, not 0"),
    ],
)
def test_unusable_options(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["bulk", "in", "out", *options]) == 2
    assert_one_line(capsys, expected)
