"""`maxwhisper race`: a record of `compare` as a race, in a terminal and as a page."""

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from maxwhisper.cli import main
from maxwhisper.cli.serve_command import race_page
from maxwhisper.compare import run
from maxwhisper.compare.race.lanes import MISSING, RIGHT, WRONG, Race, Word, race_of
from maxwhisper.compare.race.page import page_of, write_page
from maxwhisper.compare.race.terminal import AT_A_TIME, frame, latest, panel, replay
from reference.fixtures import NANO, ROOT

from .command import assert_one_line, options_of, status
from .engines import CLIP
from .test_compare import StubWorker, stub  # noqa: F401, a fixture


def row(name: str, *rounds: tuple[float, list[tuple[float, str]]], error: str = "") -> dict[str, Any]:
    """Returns a row of `compare`, with the total of each round, and when which text was there."""
    pieces = [[{"recording": 0, "seconds": at, "text": text} for at, text in texts] for _, texts in rounds]
    return {"name": name, "total_s": [total for total, _ in rounds], "pieces": pieces, "error": error}


def record(*rows: dict[str, Any], text: str | None = None, pytorch: str = "Seven apples, and a dog.") -> dict[str, Any]:
    return {
        "model": "nano",
        "options": {"languages": ["en"], "threads": 2},
        "machine": {"processor": "a processor"},
        "recordings": [{"name": "talk.mp3", "seconds": 10.0, "text": text, "pytorch": pytorch}],
        "audio_s": 10.0,
        "rows": list(rows),
    }


FAST = row("fast", (2.0, [(0.5, " Seven apples,"), (1.5, " and a dog.")]))
SLOW = row("slow", (8.0, [(7.0, " so seven apple and uh dog")]))


def words(race: Race, name: str) -> list[tuple[float, str, str]]:
    [lane] = [lane for lane in race.lanes if lane.name == name]
    return [(word.seconds, word.text, word.mark) for word in lane.words]


def test_words_have_the_time_at_which_they_were_there_and_what_is_wrong_with_them() -> None:
    race = race_of(record(SLOW, FAST), "talk.json")
    assert [lane.name for lane in race.lanes] == ["fast", "slow"] and race.total_s == 8.0
    assert words(race, "fast") == [
        (0.5, "Seven", RIGHT),
        (0.5, "apples,", RIGHT),
        (1.5, "and", RIGHT),
        (1.5, "a", RIGHT),
        (1.5, "dog.", RIGHT),
    ]
    # A case and a sound are no difference; a word in another's place is, and so is one that was not said.
    assert [word[1:] for word in words(race, "slow")] == [
        ("so", WRONG),
        ("seven", RIGHT),
        ("apples,", MISSING),
        ("apple", WRONG),
        ("and", RIGHT),
        ("uh", RIGHT),
        ("a", MISSING),
        ("dog", RIGHT),
    ]
    assert race.lanes[0].wer == 0 and race.lanes[1].wer == 3 / 5


def test_words_are_held_against_what_was_said_where_it_is_known() -> None:
    race = race_of(record(FAST, text="seven apples"), "talk.json")
    assert race.against == "what was said"
    assert [mark for *_, mark in words(race, "fast")] == [RIGHT, RIGHT, WRONG, WRONG, WRONG]
    nothing = race_of(record(FAST, text=""), "talk.json")
    assert {mark for *_, mark in words(nothing, "fast")} == {WRONG}


def test_what_an_engine_leaves_out_at_its_end_is_missing() -> None:
    race = race_of(record(row("one", (1.0, [(0.5, "Seven apples, and")]))), "talk.json")
    assert words(race, "one")[2:] == [(0.5, "and", RIGHT), (0.5, "a", MISSING), (0.5, "dog.", MISSING)]


def test_what_is_missing_stands_where_it_would_have_been_said() -> None:
    """Before what is wrong there, between what is right, and behind a sound at the end."""
    heard = row("one", (1.0, [(0.5, "uh Seven pears"), (0.75, "dog uh")]))
    race = race_of(record(heard, pytorch="Seven apples and a dog and cats"), "talk.json")
    assert [word[1:] for word in words(race, "one")] == [
        ("uh", RIGHT),
        ("Seven", RIGHT),
        ("apples", MISSING),
        ("pears", WRONG),
        ("and", MISSING),
        ("a", MISSING),
        ("dog", RIGHT),
        ("uh", RIGHT),
        ("and", MISSING),
        ("cats", MISSING),
    ]


def test_an_engine_that_only_lacks_words_is_shown_with_them() -> None:
    race = race_of(record(FAST, row("lacking", (2.0, [(0.5, "Seven apples, and")]))), "talk.json")
    out = " ".join(shown(lambda console: replay(race, console)).split())
    assert "lacking: Seven apples, and a dog." in out and "fast: " not in out


def test_what_is_missing_does_not_count_for_how_far_an_engine_is() -> None:
    race = race_of(record(row("one", (2.0, [(0.5, "Seven"), (1.5, "dog")]))), "talk.json")
    bars = [panel(race, race.lanes[0], at, 3, 40).renderable.renderables[0].renderable for at in (1.0, 2.0)]
    assert [(bar.completed, bar.total) for bar in bars] == [(1, 2), (2, 2)]
    deaf = race_of(record(row("one", (2.0, []))), "talk.json")
    bars = [panel(deaf, deaf.lanes[0], at, 3, 40).renderable.renderables[0].renderable for at in (1.0, 2.0)]
    assert [(bar.completed, bar.total) for bar in bars] == [(0, 1), (1, 1)]


def test_the_median_round_is_shown() -> None:
    three = row("three", (9.0, [(1.0, " late")]), (2.0, [(2.0, " early")]), (3.0, [(3.0, " median")]))
    [lane] = race_of(record(three, pytorch="median"), "talk.json").lanes
    assert lane.total_s == 3.0 and [(word.seconds, word.text) for word in lane.words] == [(3.0, "median")]
    assert (lane.at(2.9), lane.at(3.0)) == ([], lane.words)
    two = row("two", (3.0, [(3.0, " late")]), (2.0, [(2.0, " early")]))
    assert race_of(record(two), "talk.json").total_s == 2.0


def test_words_that_are_wrong_and_missing_are_counted_apart() -> None:
    race = race_of(record(row("one", (1.0, [(0.5, "Seven apples, and a dog and cats")]))), "talk.json")
    assert re.search("one +│ +1.00 │ .* │ +2 │ +0 │", shown(lambda console: replay(race, console)))


@pytest.mark.parametrize("said, heard", [("", " dog"), ("dog", ""), ("", "")])
def test_silence(said: str, heard: str) -> None:
    race = race_of(record(row("one", (1.0, [(0.5, heard)])), pytorch=said), "talk.json")
    assert race.lanes[0].wer == (1.0 if said else None)
    assert [mark for *_, mark in words(race, "one")] == [WRONG] * bool(heard) + [MISSING] * bool(said)


def test_an_engine_that_heard_nothing_takes_part() -> None:
    race = race_of(record(FAST, row("deaf", (1.0, []))), "talk.json")
    assert [lane.name for lane in race.lanes] == ["deaf", "fast"] and race.lanes[0].wer == 1.0
    assert [mark for *_, mark in words(race, "deaf")] == [MISSING] * 5
    assert race_of(record(row("deaf", (1.0, [])), pytorch=""), "talk.json").lanes[0].words == []


def test_what_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(record({**FAST, "name": 5, "error": None}, {})))
    assert main(["race", str(tmp_path / "x.json")]) == 0


def test_a_text_of_signs_alone_has_no_words() -> None:
    german = {"options": {"languages": ["de"], "threads": 2}}  # the normalizer for English leaves no blank
    [lane] = race_of(record(FAST, text="♪ — ♪") | german, "talk.json").lanes
    assert lane.wer is None


def shown(draw: Callable[[Console], object], **terminal: Any) -> str:
    out = io.StringIO()
    draw(Console(file=out, width=80, height=24, **terminal))
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue())


def test_a_record_has_no_orders_for_the_terminal() -> None:
    wild = record(row("x\x1b]0;y\x07", (1.0, [(0.5, "a\x1b[2J\x9b5m")])), text="b\x1b[1m\x00")
    wild["recordings"][0]["name"] = wild["model"] = wild["machine"]["processor"] = "c\x1b[3m"
    out = io.StringIO()
    replay(race_of(wild, "talk.json"), Console(file=out, width=80, height=24))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out.getvalue())


def test_a_frame_shows_what_is_there_by_then() -> None:
    race = race_of(record(FAST, SLOW), "talk.json")
    early, late = (shown(lambda console, at=at: console.print(frame(race, at, console))) for at in (1.0, 7.5))
    assert "Seven apples," in early and "dog." not in early and "fast, 1.0 s" in early
    assert "and a dog." in late and "apples, apple and uh a dog" in late, late
    assert "fast, 2.00 s, 5 x" in late and "slow, 7.5 s" in late


def test_a_frame_is_no_larger_than_the_terminal() -> None:
    long = row("long", (2.0, [(0.5, " word" * 600)]))
    for n_lane in (1, 2, 5):
        race = race_of(record(*[long] * n_lane), "x")
        lines = shown(lambda console, race=race: console.print(frame(race, 1.0, console)))
        assert len(lines.splitlines()) <= 24
    for width in range(1, 8):
        assert shown(lambda console, width=width: console.print(frame(race, 1.0, Console(width=width))))


def test_a_frame_of_a_long_text_is_its_end() -> None:
    """Without the work of wrapping all of it, and with lines that stay where they are when a word comes."""
    words = [Word(float(n), f"{n}", RIGHT) for n in range(10_000)]
    assert latest(words[:50], 1000) == words[:50] and latest([], 1000) == []
    shown = [latest(words[:n], 1000) for n in range(9000, 9000 + AT_A_TIME)]
    assert all(each[-1].seconds == 8999 + n and 200 <= len(each) < 200 + AT_A_TIME for n, each in enumerate(shown))
    assert len({each[0] for each in shown}) == 2


def test_it_is_replayed_at_true_speed_in_a_terminal_and_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    race = race_of(record(FAST, SLOW), "talk.json")
    out = shown(lambda console: replay(race, console, lambda: now[0]), force_terminal=True)
    assert 13.0 <= now[0] < 13.1
    assert re.search("slow +│ +8.00 │", out)
    assert "slow: so seven apples, apple and uh a dog" in " ".join(out.split())
    now[0] = 0.0
    out = shown(lambda console: replay(race, console, lambda: now[0]))
    assert re.search("slow +│ +8.00 │", out) and now[0] == 0.0


def test_the_documents_show_what_is_printed() -> None:
    fast = row("faster-whisper batched", (0.41, [(0.4, "Seven apples, and a dog.")]))
    out = shown(lambda console: replay(race_of(record(fast), "talk.json"), console)).splitlines()
    assert "\n".join(out[:3]) + "\n│ maxwhisper  " in (ROOT / "docs" / "race.md").read_text()


def test_the_page_holds_all_and_needs_nothing(tmp_path: Path) -> None:
    nasty = row("nasty", (1.0, [(0.5, " </script><!-- <b>\u2028 ü")]))
    source, page, picture = tmp_path / "talk.json", tmp_path / "race.html", tmp_path / "race.svg"
    raced = record(FAST, nasty)
    raced["recordings"][0]["name"] = "\udcfc[b].mp3"  # a byte of Latin-1 in a file's name
    source.write_text(json.dumps(raced))
    assert main(["race", str(source), "--html", str(page), "--svg", str(picture)]) == 0
    text = page.read_text()
    [data] = re.findall(r"(?m)^const race = (.*);$", text)
    heard = [word["text"] for word in json.loads(data)["lanes"][0]["words"] if word["mark"] != MISSING]
    assert heard == ["</script><!--", "<b>", "ü"]
    assert text.count("</script>") == 1 and "default-src 'none'" in text
    assert not re.search(r"https?:|src=|@import|url\(", text)
    drawn = picture.read_text()
    assert "Seven" in drawn and "?[b].mp3" in drawn and drawn.startswith("<svg") and "url(http" not in drawn


def test_what_a_server_shows_is_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "talk.json"
    source.write_text(json.dumps(record(FAST)))
    assert race_page(str(source)) == page_of(race_of(record(FAST), "talk.json"))
    assert main(["serve", "--model", str(NANO), "--race", str(tmp_path / "none.json")]) == 1
    assert "none.json: cannot be read as what" in capsys.readouterr().err


def test_a_browser_shows_the_end_to_whom_moving_things_disturb(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or pytest.skip("Chromium is not installed: apt install chromium")
    page = tmp_path / "race.html"
    write_page(race_of(record(FAST, SLOW), "talk.json"), page)
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    headless = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", *quiet]
    command = [chromium, *headless, "--force-prefers-reduced-motion", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    [lanes] = re.findall(r"(?s)<main.*</main>", found)
    assert "2.00 s, 5 x real time" in lanes and "8.00 s, 1 x real time" in lanes
    assert "2 wrong, 2 missing, word error rate 60.00 %" in lanes
    assert lanes.count('dir="auto"') == 2  # or a text in Arabic has its full stops at the wrong end
    assert '<del class="missing">apples, </del>' in lanes and 'hidden=""' not in lanes


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot be read as what `maxwhisper compare --json` writes"),
        ("[1]", "it is other JSON"),
        ("[" * 100_000, "cannot be read as what `maxwhisper compare --json` writes"),
        (json.dumps(record(FAST) | {"recordings": [{}, {}]}), "expected the record of one recording, it has 2"),
        (json.dumps(record({"name": "older", "total_s": [1.0]})), "expected a record without --tokens"),
        (json.dumps(record(row("x", (1.0, []))) | {"options": {"tokens": 9}}), "expected a record without --tokens"),
        (json.dumps(record({**FAST, "pieces": [[{"seconds": 1}]]})), "is not whole"),
        (json.dumps(record(FAST) | {"machine": None}), "is not whole"),
        (json.dumps(record(FAST) | {"audio_s": None}), "is not whole"),
        (json.dumps(record(row("x", (0, [])))), "is not whole"),
        (json.dumps(record({**FAST, "pieces": [[{"seconds": "x", "text": "y"}]]})), "is not whole"),
    ],
)
def test_a_record_that_cannot_be_used(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    assert main(["race", str(path), "--html", str(tmp_path / "race.html")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"maxwhisper: error: {path}: ") and message in error
    assert [each.name for each in tmp_path.iterdir()] == ["talk.json"]


VALUES = {"device": "cpu", "against": "whisper.cpp", "batch_size": "8", "rounds": "1", "model": "tiny"}
"""Of options that do not take any word: their defaults, as far as they have one."""


@pytest.mark.parametrize("option", sorted(options_of("race") - {"--html", "--svg", "--help"}))
def test_what_a_record_leaves_nothing_to_do_for(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, value = tmp_path / "talk.json", VALUES.get(option.removeprefix("--"), "2")
    path.write_text(json.dumps(record(FAST)))
    assert status(["race", path, option, value]) == 2
    assert_one_line(capsys, f"argument {option}: has no effect on {path}, a record")


def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["race", "nothing.mp3", "--html", "no/such/race.html"]) == 1
    assert "--html no/such/race.html: there is no folder 'no/such'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "talk.wav", "--json", "./talk.wav"],
        ["compare", "talk.wav", "--text", "talk.txt", "--plot", "talk.txt"],
        ["race", "talk.wav", "--text", "talk.txt", "--json", "talk.txt"],
        ["race", "talk.wav", "--json", "talk.txt"],
        ["compare", "other.wav", "talk.wav", "--plot", "./talk.txt"],
        ["compare", "talk.wav", "--model", str(NANO), "--json", str(NANO)],
        ["race", "talk.wav", "--model", str(NANO), "--html", str(NANO)],
        ["race", "talk.json", "--html", "talk.json"],
        ["race", "talk.wav", "--svg", "talk.html", "--html", "./talk.html"],
    ],
)
def test_no_file_replaces_another_of_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert ": would replace another file of this command" in capsys.readouterr().err


def test_what_is_replayed_is_what_compare_has_measured(
    stub: type[StubWorker],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = tmp_path / "race.json"
    options = ["--model", str(NANO), "--against", "whisper.cpp", "--json", str(measured)]
    assert main(["race", str(CLIP), *options]) == 0
    live = capsys.readouterr().out
    assert main(["race", str(measured)]) == 0
    assert capsys.readouterr().out == live
    lines = {cells[0]: cells for line in live.splitlines() if len(cells := re.findall(r"[^│]+", line)) == 6}
    found = {name.strip(): [cell.strip() for cell in rest] for name, *rest in lines.values()}
    assert found["maxwhisper"][2:] == ["0.00 %", "0", "0"] and found["whisper.cpp"][2:] == ["50.00 %", "1", "1"]


def test_an_engine_that_fails_is_named(
    stub: type[StubWorker],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub.broken = "whisper.cpp"
    assert main(["race", str(CLIP), "--model", str(NANO), "--against", "whisper.cpp"]) == 1
    assert "whisper.cpp: failed: RuntimeError: no luck\n" in capsys.readouterr().out


def test_pieces_of_several_recordings_follow_one_another(stub: type[StubWorker]) -> None:  # noqa: F811
    found = run.compare(
        [str(CLIP), str(CLIP)], str(NANO), ["whisper.cpp"], device="cpu", batch_size=1, threads=1, rounds=1
    )
    [subject] = [row for row in found.rows if row.name == "maxwhisper"]
    assert found.audio_s == 2 * found.recordings[0]["seconds"] and subject.total_s == [1.0]
    assert [(piece.recording, piece.seconds, piece.text) for piece in subject.pieces[0]] == [
        (0, 0.25, " apples jump"),
        (1, 0.75, " apples jump"),
    ]
