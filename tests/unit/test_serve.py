"""`maxwhisper serve`, asked by OpenAI's own client: transcripts are those of `transcribe`, whoever else asks."""

import json
import math
import statistics
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from whisper.audio import pad_or_trim

from maxwhisper.audio import SAMPLE_RATE, load_audio
from maxwhisper.serving.fields import Transcription
from maxwhisper.subtitles import contents
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES
from reference.perf.serve import health_under_load

from .serving import KEY, Process, started, stop

CLIPS = {
    Path(clip["file"]).name: FIXTURES / clip["file"]
    for clip in json.loads((FIXTURES / "clips.json").read_text())["clips"]
}
SHORT, LONG = CLIPS["english-1.wav"], CLIPS["english-long.mp3"]


@pytest.fixture(scope="module")
def two_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns two sentences in one window, and one in the next."""
    path, speech = tmp_path_factory.mktemp("clips") / "two-windows.wav", load_audio(LONG)[: 9 * SAMPLE_RATE]
    audio = np.concatenate([pad_or_trim(speech[: 6 * SAMPLE_RATE]), speech[6 * SAMPLE_RATE :]])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((audio * 32768).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, two_windows: Path) -> Iterator[Process]:
    """Yields a server that at its end finishes what it is doing, and leaves no file."""
    with started(tmp_path_factory.mktemp("serve"), "--max_file_mb", "4", "--max_audio_minutes", "3") as process:
        yield process
        while process.running():  # requests whose clients have left
            time.sleep(0.005)
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(transcribe, process, two_windows, response_format="text")
            while not process.running():
                time.sleep(0.005)
            assert stop(process) == 0
            assert len(last.result()) > 100
        assert not [path for path in process.temporary.rglob("*") if path.is_file()]


def transcribe(server: Process, clip: Path, **options: Any) -> Any:
    with server.client() as client, clip.open("rb") as file:
        return client.audio.transcriptions.create(file=file, **{"model": "whisper-1", **options})


def get(server: Process, path: str) -> httpx.Response:
    with server.server.client() as client:
        return client.get(path)


def verbose_of(result: dict[str, Any], clip: Path) -> dict[str, Any]:
    """Returns what OpenAI has for a result of `transcribe`, as verbose_json with segments."""
    seconds = len(load_audio(clip)) / SAMPLE_RATE
    segments = [{name: value for name, value in segment.items() if name != "words"} for segment in result["segments"]]
    languages = {"en": "english", "de": "german"}
    return {
        "task": "transcribe",
        "language": languages[result["language"]],
        "duration": seconds,
        "text": result["text"].strip(),
        "segments": segments,
        "usage": {"type": "duration", "seconds": math.ceil(seconds)},
    }


# ---- transcripts ---------------------------------------------------------------------------------------------------


def test_a_transcript_is_asked_for_with_what_was_given_alone() -> None:
    """Temperature 0 is what OpenAI's code begins with, and makes warmer where a window fails, unless given."""
    assert Transcription(model="a").options == Transcription(model="a", temperature=0).options == {"task": "transcribe"}
    fields = {"temperature": 0.4, "prompt": "Hector", "language": "German", "timestamp_granularities": ["word"]}
    given = {"temperature": 0.4, "initial_prompt": "Hector", "language": "de", "word_timestamps": True}
    assert Transcription(model="a", **fields).options == {"task": "transcribe", **given}


def test_every_format(server: Process, model: Whisper) -> None:
    result = model.transcribe(SHORT, word_timestamps=True)
    text, expected = result["text"].strip(), verbose_of(result, SHORT)
    words = [
        {"word": word["word"].strip(), "start": word["start"], "end": word["end"]}
        for segment in result["segments"]
        for word in segment["words"]
    ]
    del expected["segments"]
    both = {"response_format": "verbose_json", "timestamp_granularities": ["word"]}
    found = transcribe(server, SHORT, **both)
    assert found.to_dict() == expected | {"words": words} and len(words) > 5

    plain = model.transcribe(SHORT)
    with ThreadPoolExecutor(4) as pool:
        wanted = ("json", "text", "srt", "vtt")
        answers = pool.map(lambda format: transcribe(server, SHORT, response_format=format), wanted)
    found, *texts = answers
    assert found.to_dict() == {"text": text, "usage": expected["usage"]}
    assert texts == [f"{text}\n", contents(plain, "srt", {}), contents(plain, "vtt", {})]


def test_requests_that_come_together_have_what_they_have_alone(
    server: Process, model: Whisper, two_windows: Path
) -> None:
    asked: list[tuple[Path, dict[str, Any]]] = [
        (two_windows, {}),
        (CLIPS["english-noisy.flac"], {}),
        (CLIPS["english-stereo.wav"], {"timestamp_granularities": ["word", "segment"]}),
        (CLIPS["german-1.wav"], {"language": "de", "prompt": "Anna, Hector"}),
        (CLIPS["silence.flac"], {}),
        (SHORT, {"language": "de"}),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        ask = [pool.submit(transcribe, server, clip, response_format="verbose_json", **each) for clip, each in asked]
        found = [each.result().to_dict() for each in ask]
    for (clip, options), each in zip(asked, found, strict=True):
        words = {"word_timestamps": True} if each.pop("words", None) else {}
        prompt = {"initial_prompt": options["prompt"]} if "prompt" in options else {}
        language = {"language": options["language"]} if "language" in options else {}
        result = model.transcribe(clip, **words, **prompt, **language)
        assert all(segment["temperature"] == 0 for segment in result["segments"])
        assert each == verbose_of(result, clip)


def test_translation(server: Process, model: Whisper) -> None:
    clip = CLIPS["german-1.wav"]
    result = model.transcribe(clip, task="translate")
    with server.client() as client:
        translate = client.audio.translations.create
        assert translate(file=clip, model="nano").to_dict() == {"text": result["text"].strip()}
        found = translate(file=clip, model="nano", response_format="verbose_json").to_dict()
    expected = verbose_of(result, clip) | {"task": "translate", "language": "english"}
    del expected["usage"]
    assert found == expected


def test_text_as_it_comes(server: Process, model: Whisper, two_windows: Path) -> None:
    with server.client() as client, two_windows.open("rb") as file:
        events = [each.to_dict() for each in client.audio.transcriptions.create(file=file, model="nano", stream=True)]
    *deltas, done = events
    assert {each["type"] for each in deltas} == {"transcript.text.delta"} and len(deltas) == 2
    assert done == {"type": "transcript.text.done", "text": model.transcribe(two_windows)["text"].strip()}
    assert "".join(each["delta"] for each in deltas) == done["text"]


def test_silence_as_it_comes(server: Process) -> None:
    with server.client() as client:
        (done,) = client.audio.transcriptions.create(file=CLIPS["silence.flac"], model="nano", stream=True)
    assert done.to_dict() == {"type": "transcript.text.done", "text": ""}


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"chunking_strategy": "auto"}, "chunking_strategy", "not supported"),
        ({"include": ["logprobs"]}, "include", "not supported"),
        ({"known_speaker_names": ["Anna"]}, "known_speaker_names", "not supported"),
        ({"known_speaker_references": ["data:"]}, "known_speaker_references", "not supported"),
        ({"keywords": ["MAX"]}, "keywords", "not supported"),
        ({"languages": ["en", "de"]}, "languages", "not supported"),
        ({"response_format": "diarized_json"}, "response_format", "diarized_json"),
        ({"response_format": "srt", "stream": True}, "response_format", "srt"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities", "verbose_json"),
        ({"timestamp_granularities": ["phone"], "response_format": "verbose_json"}, "timestamp_granularities", "phone"),
        ({"temperature": 1.5}, "temperature", "1.5"),
        ({"temperature": "nan"}, "temperature", "finite number"),
        ({"temperature": "inf"}, "temperature", "finite number"),
        ({"temperature": 1e-38}, "temperature", "1e-38"),
        ({"language": "Klingon"}, "language", "Klingon"),
        ({"language": "yue"}, "language", "first 99"),
        ({"prompt": "<|endoftext|>"}, "prompt", "special token"),
        ({"extra_body": {"vad_filter": True}}, "vad_filter", "vad_filter"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    server: Process, options: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        transcribe(server, SHORT, **options)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_other_models_do_not_exist(server: Process) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4o-transcribe.*nano or whisper-1") as caught:
        transcribe(server, SHORT, model="gpt-4o-transcribe")
    assert caught.value.code == "model_not_found"
    with server.client() as client:
        assert [each.id for each in client.models.list()] == ["nano", "whisper-1"]
        assert client.models.retrieve("whisper-1").id == "whisper-1"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("tiny")


@pytest.mark.parametrize("bytes_of_file", [b"", b"no audio", b"ffconcat version 1.0\nfile nano.pt\n"])
def test_what_is_no_audio_is_refused(server: Process, bytes_of_file: bytes) -> None:
    with server.client() as client, pytest.raises(openai.BadRequestError, match="file: ") as caught:
        client.audio.transcriptions.create(file=bytes_of_file, model="nano")
    assert caught.value.param == "file"


def test_more_than_the_limits(server: Process, tmp_path: Path) -> None:
    wav = SHORT.read_bytes()
    with server.client() as client, pytest.raises(openai.APIStatusError, match="more than 4 MB") as caught:
        client.audio.transcriptions.create(file=bytes(50_000_000), model="nano")
    assert caught.value.status_code == 413
    slow = wav[:24] + (8000).to_bytes(4, "little") + wav[28:]  # twice as long
    for rate, refused in ((8000, False), (200, True), (1, True)):
        slow = wav[:24] + rate.to_bytes(4, "little") + wav[28:]
        with server.client() as client:
            if refused:
                with pytest.raises(openai.BadRequestError, match="more than 180 s"):
                    client.audio.transcriptions.create(file=slow, model="nano")
            else:
                assert client.audio.transcriptions.create(file=slow, model="nano").usage


def test_without_a_key(server: Process) -> None:
    for key in ("wrong", "the-key-of-a-tesT"):
        with server.client(api_key=key) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
    with httpx.Client(base_url=server.server.url, verify=False) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").json() == {"status": "ok"}


# ---- many, fast and gone -------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_place(server: Process) -> None:
    url, headers = f"{server.url}/audio/transcriptions", {"authorization": f"Bearer {KEY}"}
    for stream in ("false", "true"):
        with LONG.open("rb") as file, pytest.raises(httpx.ReadTimeout):
            sent = {"files": {"file": file}, "data": {"model": "nano", "stream": stream}}
            httpx.post(url, headers=headers, timeout=httpx.Timeout(5, read=0.1), **sent)
        until = time.monotonic() + 5
        while server.running():
            assert time.monotonic() < until
    assert transcribe(server, SHORT).text


def test_metrics(server: Process) -> None:
    before = get(server, "/metrics").text
    assert transcribe(server, SHORT).text and get(server, "/nowhere").status_code == 404
    after = get(server, "/metrics").text
    counted = 'maxwhisper_requests_total{path="/v1/audio/transcriptions",status="200"}'
    figures = [dict(line.rsplit(" ", 1) for line in text.splitlines()) for text in (before, after)]
    assert float(figures[1][counted]) - float(figures[0].get(counted, "0")) == 1
    assert float(figures[1]["maxwhisper_audio_seconds_total"]) > float(figures[0]["maxwhisper_audio_seconds_total"])
    assert 'path="other",status="404"' in after


@pytest.mark.nightly
def test_a_thousand_requests_leave_nothing_in_memory(server: Process) -> None:
    process = psutil.Process(server.popen.pid)

    def ask(_: int) -> None:
        assert transcribe(server, SHORT).text

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(200)))
        before, threads, files = process.memory_info().rss, process.num_threads(), process.num_fds()
        list(pool.map(ask, range(1000)))
    assert process.memory_info().rss < before + 20 * 2**20
    assert process.num_threads() <= threads + 2 and process.num_fds() <= files + 8


def test_answers_are_not_held_back(server: Process) -> None:
    """The second packet of an answer would wait for the first one's receipt: 40 ms."""
    url = f"{server.url.removesuffix('/v1')}/health"
    with httpx.Client(verify=False) as client:
        seconds = [client.get(url).elapsed.total_seconds() for _ in range(20)]
    assert statistics.median(seconds) < 0.02


@pytest.mark.nightly
def test_health_under_load(server: Process) -> None:
    found = health_under_load(server.server, 10)
    assert found["/health under load, requests"] > 100
    assert found["/health under load, 99th percentile, ms"] < 50
