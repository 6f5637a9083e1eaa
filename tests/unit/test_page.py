"""The page that `maxwhisper serve` has, in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from whisper.audio import SAMPLE_RATE

from maxwhisper.audio import load_audio
from maxwhisper.compare.race.lanes import race_of
from maxwhisper.compare.race.page import page_of
from maxwhisper.subtitles import FORMATS, contents
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES

from .serving import KEY, in_thread
from .test_race import FAST, record

CLIP = FIXTURES / "clips" / "english-1.wav"
ODD = "clé/1+="
"""A key that holds what neither a header nor a protocol can: of `openssl rand -base64`, and no ASCII."""


@pytest.fixture(scope="module")
def address(model: Whisper) -> Iterator[str]:
    race = page_of(race_of(record(FAST), "race.json"))
    with in_thread(model, "nano", [KEY, ODD], race) as (found, _):
        yield f"{found}/"


@pytest.fixture(scope="module")
def result(model: Whisper) -> dict[str, Any]:
    """Returns what the clip's transcript is."""
    return model.transcribe(load_audio(CLIP), word_timestamps=True)


def test_what_the_page_asks_for_comes_by_lines(address: str, result: dict[str, Any]) -> None:
    form = {"model": "whisper-1", "response_format": "verbose_json", "timestamp_granularities[]": "word"}
    files, headers = {"file": CLIP.read_bytes()}, {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{address}transcripts", data=form, files=files, headers=headers, timeout=60)
    assert answer.headers["content-type"] == "application/x-ndjson"
    *windows, last = map(json.loads, answer.text.splitlines())
    segments = [segment for window in windows for segment in window["segments"]]
    assert [word for segment in segments for word in segment["words"]] == [
        word for segment in result["segments"] for word in segment["words"]
    ]
    assert last["seconds"] == len(load_audio(CLIP)) / SAMPLE_RATE
    assert last["files"] == {ending: contents(result, ending, {}) for ending in FORMATS}


def test_without_a_key_there_is_the_page_alone(address: str) -> None:
    page = httpx.get(address)
    assert page.status_code == 200 and "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert "model nano" in page.text and not re.search(r"https?:", page.text)
    assert httpx.post(f"{address}transcripts").status_code == 401


# ---- in Chromium ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yields Chromium, whose microphone hears the clip."""
    chromium = shutil.which("chromium") or pytest.skip("Chromium is not installed: apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    microphone = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    heard = f"--use-file-for-fake-audio-capture={CLIP}%noloop"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-sandbox"]
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, args=[*microphone, heard, *quiet])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Yields the page, whose errors fail the test."""
    context = browser.new_context(permissions=["microphone"])
    opened, errors = context.new_page(), []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.set_default_timeout(60_000)
    opened.goto(address)
    yield opened
    context.close()
    assert errors == []


def transcribe(page: Any, key: str = KEY) -> None:
    """Has the clip transcribed, with the key that is asked for first."""
    page.set_input_files("#file", str(CLIP))
    page.fill("#key", key)
    page.press("#key", "Enter")
    page.get_by_text("Done, 0:02 of audio").wait_for()


def test_a_file_becomes_text_and_files(page: Any, result: dict[str, Any], tmp_path: Path) -> None:
    page.set_input_files("#file", str(CLIP))
    page.get_by_role("alert").filter(has_text="Incorrect API key provided").wait_for()
    transcribe(page)
    assert page.inner_text("#text").strip() == result["text"].strip()
    assert page.inner_text("#wrong") == "" and page.is_hidden("#progress")
    for ending in FORMATS:
        with page.expect_download() as download:
            page.get_by_role("link", name=f"Save as {ending}").click()
        assert download.value.suggested_filename == f"english-1.{ending}"
        assert Path(download.value.path()).read_text() == contents(result, ending, {})


def test_the_word_that_is_heard_is_lit(page: Any, result: dict[str, Any]) -> None:
    transcribe(page)
    words = [word for segment in result["segments"] for word in segment["words"]]
    for word in words[::3]:
        page.evaluate("at => { document.querySelector('audio').currentTime = at; }", (word["start"] + word["end"]) / 2)
        page.locator(".lit").filter(has_text=word["word"].strip()).wait_for()
        assert page.locator(".lit").count() == 1
    page.locator("#text span").nth(2).click()
    page.wait_for_function(f"document.querySelector('audio').currentTime >= {words[2]['start']}")


def test_the_race_is_one_link_away(page: Any) -> None:
    page.get_by_role("link", name="race").click()
    page.get_by_text("2.00 s, 5 x real time").wait_for()


def test_by_keyboard_alone(page: Any) -> None:
    focused = "document.activeElement.id || document.activeElement.tagName"
    stops = []
    for _ in range(3):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(focused))
    assert stops == ["A", "file", "record"]
    names = [page.evaluate(f"document.getElementById('{each}').labels?.length") for each in ("file", "key")]
    assert names == [1, 1]


def test_the_microphone_is_transcribed(page: Any) -> None:
    transcribe(page, ODD)  # after which the page has the key
    page.get_by_role("button", name="Speak").click()
    page.get_by_text("Listening").wait_for()
    page.locator("#text").filter(has_text="Where is").wait_for()  # while the clip is still being said, or just after
    page.wait_for_timeout(1000)
    assert page.locator("#text span").count() == 0
    page.get_by_role("button", name="Stop and transcribe").click()
    page.locator("#text span").nth(5).wait_for()
    assert "doctor" in page.inner_text("#text")


def test_speech_begins_once_and_with_nothing_of_what_was_before(page: Any) -> None:
    transcribe(page)
    page.evaluate("fail('an earlier error')")
    page.evaluate(
        """() => {
          const devices = navigator.mediaDevices, ask = devices.getUserMedia.bind(devices);
          window.asked = 0;
          devices.getUserMedia = (...wanted) => { window.asked++; return ask(...wanted); };
          for (let click = 0; click < 2; click++) document.getElementById("record").click();
        }"""
    )
    page.get_by_text("Listening").wait_for()
    assert page.evaluate("window.asked") == 1
    assert page.inner_text("#wrong") == "" and page.locator("#files a").count() == 0
    page.set_input_files("#file", str(CLIP))
    page.get_by_role("alert").filter(has_text="Stop speaking").wait_for()
    assert page.inner_text("#name") == "What is settled so far"


def test_a_browser_without_live_text_takes_no_place_for_it(page: Any) -> None:
    """Firefox, for one, takes a microphone at its own rate alone."""
    transcribe(page)
    page.evaluate(
        """() => {
          const Socket = window.WebSocket;
          window.opened = [];
          window.WebSocket = class extends Socket { constructor(...to) { super(...to); window.opened.push(this); } };
          AudioContext.prototype.createMediaStreamSource = () => { throw new Error("another rate"); };
        }"""
    )
    page.get_by_role("button", name="Speak").click()
    page.get_by_text("Listening").wait_for()
    assert page.evaluate("window.opened.every((each) => each.readyState > WebSocket.OPEN)")


def test_what_is_said_while_the_server_is_far_away_is_sent_once_it_is_there(page: Any) -> None:
    sent = page.evaluate(
        """async () => {
          const sent = [];
          let tap, socket;
          window.AudioContext = class {
            audioWorklet = { addModule() {} };
            createMediaStreamSource() { return { connect() {} }; }
          };
          window.AudioWorkletNode = class { constructor() { tap = this; this.port = {}; } };
          window.WebSocket = class {
            static OPEN = 1;
            readyState = 0;
            constructor() { socket = this; }
            send(text) { sent.push(atob(JSON.parse(text).audio).length); }
          };
          await live(null);
          const hear = () => tap.port.onmessage({ data: new Float32Array(128) });
          for (let n = 0; n < 3000; n++) hear();
          socket.readyState = 1;
          hear();
          return sent;
        }"""
    )
    assert sum(sent) == 2 * 2400 * (128 * 3001 // 2400) and max(sent) == 2 * 2400


def test_what_is_no_audio_is_an_error_in_words(page: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp3"
    broken.write_bytes(b"no audio")
    page.set_input_files("#file", str(broken))
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.get_by_role("alert").filter(has_text="cannot be read as audio").wait_for()
    assert page.is_hidden("#progress") and page.is_hidden("#cancel")


def test_what_a_proxy_answers_is_an_error_in_words(page: Any) -> None:
    page.route("**/transcripts", lambda route: route.fulfill(status=413, body="<html>413</html>"))
    page.set_input_files("#file", str(CLIP))
    page.get_by_role("alert").filter(has_text=re.compile("^413 .*Too Large")).wait_for(timeout=5000)
