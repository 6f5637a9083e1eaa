"""What a server bears: bodies of any kind, slow clients, more of them than it serves, models that fail."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxwhisper.audio import SAMPLE_RATE, load_audio
from maxwhisper.errors import AudioError, OptionError
from maxwhisper.serving.command import bound, keys_in
from maxwhisper.serving.errors import APIError
from maxwhisper.serving.service import Service
from maxwhisper.serving.settings import Settings

from .command import CLIP, StubModel, status
from .serving import client_of, in_thread


class SlowModel(StubModel):
    """Transcribes once it is let, and fails where that is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.let, self.error = Event(), None

    def transcribe(self, audio: np.ndarray, **options: Any) -> dict[str, Any]:
        assert self.let.wait(30)
        if self.error:
            raise self.error
        return super().transcribe(audio, **options) | {"segments": []}


@pytest.fixture
def model() -> Iterator[SlowModel]:
    found = SlowModel()
    found.let.set()
    yield found
    found.let.set()


def post(url: str, timeout: Any = 30, **options: Any) -> httpx.Response:
    files, data = {"file": ("talk.wav", CLIP.read_bytes())}, {"model": "whisper-1", **options}
    return ask("POST", f"{url}/v1/audio/transcriptions", files=files, data=data, timeout=timeout)


def ask(method: str, url: str, **options: Any) -> httpx.Response:
    """Asks without the certificates, which nothing here has and which take 20 ms to read."""
    return httpx.request(method, url, verify=False, **options)


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_full_server_says_when_to_come_again(model: SlowModel) -> None:
    model.let.clear()
    with in_thread(model, max_requests=2) as (url, service), ThreadPoolExecutor(2) as pool:
        served = [pool.submit(post, url) for _ in range(2)]
        until(lambda: len(service.jobs.running) == 2)
        with (
            client_of(f"{url}/v1") as client,
            pytest.raises(openai.RateLimitError, match="2 requests") as caught,
        ):
            client.audio.transcriptions.create(file=bytes(5_000_000), model="whisper-1")
        assert caught.value.response.headers["retry-after"] == "2"
        assert ask("GET", f"{url}/health").status_code == 200
        model.let.set()
        assert {each.result().status_code for each in served} == {200}
        assert post(url).status_code == 200


def test_no_more_windows_decode_together_than_requests_are_served(model: SlowModel) -> None:
    """There is memory for each of them, which a machine need not have."""
    with in_thread(model, batch_size=10**30, max_requests=3) as (_, service):
        assert service.jobs.scheduler.deterministic._max_workers == 3


def test_audio_that_takes_too_long_is_not_sent_again(model: SlowModel) -> None:
    model.let.clear()
    with in_thread(model, timeout=0.2) as (url, service):
        found = post(url)
        assert found.status_code == 400 and found.json()["error"]["code"] == "timeout"
        (job,) = service.jobs.running  # until its thread has noticed
        assert job.caller.stopped.is_set()
        model.let.set()
        until(lambda: not service.jobs.running)


def test_a_client_that_stops_sending_frees_its_place(model: SlowModel) -> None:
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nConnection: close\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    for sent in (b"", b"--x\r\n", b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF'):
        with in_thread(model, timeout=0.2) as (url, service), socket.create_connection(address(url)) as client:
            client.sendall(head + sent)
            answer = client.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 408") and b"has not come within" in answer
            assert not service.jobs.running


def test_a_client_that_leaves_while_it_sends_frees_its_place(model: SlowModel) -> None:
    with in_thread(model) as (url, service):
        with socket.create_connection(address(url)) as client:
            client.sendall(b"POST /v1/audio/translations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n")
            client.sendall(b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
            until(lambda: service.jobs.running)
        until(lambda: not service.jobs.running)


def test_a_file_stays_open_for_who_reads_it_and_no_longer(model: SlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, left, files = Event(), Event(), []

    def read(file: Any, *_: Any) -> np.ndarray:
        files.append(file)
        reading.set()
        assert left.wait(30)
        assert file.read() == CLIP.read_bytes()
        files.append("read")
        raise AudioError("nobody waits")

    monkeypatch.setattr("maxwhisper.serving.jobs.read_upload", read)
    with in_thread(model) as (url, service):
        with pytest.raises(httpx.ReadTimeout):
            post(url, timeout=httpx.Timeout(5, read=0.3))
        assert reading.is_set()
        time.sleep(0.1)  # the server sees that it has left
        left.set()
        until(lambda: not service.jobs.running)
    assert files[1] == "read" and files[0].closed


def test_a_client_that_does_not_read_frees_its_place(model: SlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxwhisper.serving.answers.TO_READ", 0)
    text = [{"text": "word " * 2_000_000}]

    def transcribe(self: SlowModel, audio: np.ndarray, on_segments: Any, **options: Any) -> dict[str, Any]:
        for _ in range(5):
            on_segments(text)
        return {"text": "word", "segments": [], "language": "en"}

    monkeypatch.setattr(SlowModel, "transcribe", transcribe)
    with in_thread(model, timeout=1) as (url, service):
        body = httpx.Request("POST", url, files={"file": CLIP.read_bytes()}, data={"model": "stub", "stream": "true"})
        with socket.create_connection(address(url)) as client:
            head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body.read())}\r\n"
            client.sendall(f"{head}Content-Type: {body.headers['content-type']}\r\n\r\n".encode() + body.read())
            until(lambda: service.jobs.running)
            until(lambda: not service.jobs.running)
            until(lambda: 'path="/v1/audio/transcriptions"' in ask("GET", f"{url}/metrics").text)


def test_who_has_to_be_cut_off_may_ask_another_server(model: SlowModel) -> None:
    model.let.clear()
    with ThreadPoolExecutor(1) as pool:
        with in_thread(model) as (url, service):
            asked = pool.submit(post, url)
            asked.add_done_callback(lambda _: model.let.set())
            until(lambda: service.jobs.running)
        assert asked.result().status_code == 503 and asked.result().headers["retry-after"] == "2"


def test_no_proxy_holds_text_back_that_comes_as_it_is_found(served: tuple[httpx.Client, Service]) -> None:
    client, _ = served
    for path in ("transcriptions", "/transcripts"):
        answer = client.post(
            str(httpx.URL(client.base_url).join(path)), files={"file": AUDIO}, data={"model": "stub", "stream": "true"}
        )
        assert answer.status_code == 200
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")


def after_a_segment(self: SlowModel, audio: np.ndarray, on_segments: Any, **options: Any) -> dict[str, Any]:
    """Stands for `transcribe`: goes on from its first segment only when it is let."""
    on_segments([{"text": " Hello"}])
    assert self.let.wait(30)
    return {}


def test_what_takes_too_long_in_mid_stream(model: SlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.let.clear()
    monkeypatch.setattr(SlowModel, "transcribe", after_a_segment)
    with in_thread(model, timeout=0.5) as (url, _), client_of(f"{url}/v1") as client:
        with pytest.raises(openai.APIError, match="within the limit of 0.5 s"):
            list(client.audio.transcriptions.create(file=CLIP, model="stub", stream=True))
        model.let.set()


def test_a_client_that_leaves_in_mid_stream_is_not_transcribed_for(
    model: SlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.let.clear()
    monkeypatch.setattr(SlowModel, "transcribe", after_a_segment)
    with in_thread(model) as (url, service):
        sent: dict[str, Any] = {"files": {"file": AUDIO}, "data": {"model": "stub", "stream": "true"}}
        with httpx.stream("POST", f"{url}/v1/audio/transcriptions", verify=False, **sent) as answer:
            assert "Hello" in next(answer.iter_text())
            (job,) = service.jobs.running
        until(lambda: job.caller.stopped.is_set())
        model.let.set()


def test_what_fails_in_mid_stream_is_an_error_of_the_client(model: SlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def transcribe(self: SlowModel, audio: np.ndarray, on_segments: Any, **options: Any) -> dict[str, Any]:
        on_segments([{"text": " Hello"}])
        raise OptionError("something is wrong")

    monkeypatch.setattr(SlowModel, "transcribe", transcribe)
    with in_thread(model) as (url, _), client_of(f"{url}/v1") as client:
        events = iter(client.audio.transcriptions.create(file=CLIP, model="stub", stream=True))
        assert next(events).to_dict() == {"type": "transcript.text.delta", "delta": "Hello"}
        with pytest.raises(openai.APIError, match="something is wrong"):
            next(events)


@pytest.mark.parametrize(
    ("error", "code"), [(OptionError("language is x, expected y"), 400), (RuntimeError("secret"), 500)]
)
def test_failures(model: SlowModel, error: Exception, code: int, caplog: pytest.LogCaptureFixture) -> None:
    model.error = error
    with in_thread(model) as (url, _):
        found = post(url)
    assert found.status_code == code
    assert ("secret" in found.text, "secret" in caplog.text) == (False, code == 500)
    assert found.json()["error"]["type"] == ("server_error" if code == 500 else "invalid_request_error")


def test_the_seconds_that_were_transcribed_are_counted(model: SlowModel) -> None:
    with in_thread(model) as (url, service):
        for model.error, code in ((RuntimeError("none of it"), 500), (None, 200), (RuntimeError("no more"), 500)):
            assert post(url).status_code == code
        counted = service.metrics.registry.get_sample_value("maxwhisper_audio_seconds_total")
    assert counted == len(load_audio(CLIP)) / SAMPLE_RATE


def test_a_model_of_english_alone(model: SlowModel) -> None:
    model.is_multilingual = False
    with in_thread(model) as (url, service):
        assert post(url, language="German").json()["error"]["param"] == "language"
        assert post(url, language="en").status_code == 200
        sent: dict[str, Any] = {"files": {"file": AUDIO}, "data": {"model": "stub"}}
        assert ask("POST", f"{url}/v1/audio/translations", **sent).json()["error"]["param"] == "model"
        service.check_realtime(Settings(language="en"))
        with pytest.raises(APIError, match="knows English only"):
            service.check_realtime(Settings(language="de"))


def test_the_scheme_of_a_key_is_in_any_letters(model: SlowModel) -> None:
    with in_thread(model, keys=["open", "sesame"]) as (url, _):
        for given, code in (
            ("Bearer open", 200),
            ("bearer sesame", 200),
            ("BEARER sesame", 200),
            ("Basic sesame", 401),
            ("Bearer", 401),
        ):
            assert ask("GET", f"{url}/v1/models", headers={"authorization": given}).status_code == code


# ---- bodies --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[httpx.Client, Service]]:
    model = SlowModel()
    model.let.set()
    with (
        in_thread(model, max_file_mb=1) as (url, service),
        httpx.Client(base_url=f"{url}/v1/audio/", verify=False) as client,
    ):
        yield client, service


TEXTS = st.one_of(
    st.sampled_from(["", "0", "1", "true", "json", "whisper-1", "en", "word", "srt"]), st.text(max_size=9)
)
NAMES = st.one_of(
    st.sampled_from(["file", "model", "language", "prompt", "response_format", "stream", "temperature", "include[]"]),
    st.text(max_size=9),
)
AUDIO = CLIP.read_bytes()
PIECES = st.sampled_from(
    [
        b"--x",
        b"--x--",
        b"\r\n",
        b"\r\n\r\n",
        b"Content-Disposition: form-data; name=",
        b'"file"',
        b'; filename="a"',
        AUDIO,
    ]
)


@given(fields=st.lists(st.tuples(NAMES, TEXTS), max_size=6), file=st.one_of(st.just(AUDIO), st.binary(max_size=99)))
@settings(max_examples=60)
def test_any_fields(served: Any, fields: list[tuple[str, str]], file: bytes) -> None:
    data: dict[str, Any] = {"model": "stub"}
    for name, value in fields:
        data.setdefault(name, []).append(value) if isinstance(data.get(name), list) else data.update({name: [value]})
    check(served, files={"file": ("a", file)}, data=data)


@given(
    body=st.one_of(
        st.binary(max_size=99), st.lists(st.one_of(PIECES, st.binary(max_size=9)), max_size=12).map(b"".join)
    ),
    kind=st.sampled_from(["multipart/form-data; boundary=x", "multipart/form-data", "application/json", "", "a/b;;="]),
)
@settings(max_examples=60)
def test_any_body(served: Any, body: bytes, kind: str) -> None:
    check(served, content=body, headers={"content-type": kind})


def check(served: tuple[httpx.Client, Service], **sent: Any) -> None:
    """Requires a transcript, or an error of the client's in OpenAI's form; and that nothing is left of the request."""
    client, service = served
    for path in ("transcriptions", "translations"):
        answer = client.post(path, **sent)
        assert answer.status_code in (200, 400, 404, 413), answer.text
        if answer.status_code != 200:
            error = json.loads(answer.text)["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
        until(lambda: not service.jobs.running)


def test_the_limit_is_that_of_the_file(served: tuple[httpx.Client, Service]) -> None:
    client, _ = served
    for size, code in ((1_000_000, 400), (1_000_001, 413), (3_000_000, 413)):
        assert client.post("transcriptions", files={"file": bytes(size)}, data={"model": "stub"}).status_code == code


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("prompt", "'prompt' has more than 64 KB"),
        ("file", "'file' has more than 64 KB: only a file may, and a file comes with a file name"),
        ("audio", "'audio' is one too many: Too many files"),
    ],
)
def test_a_field_that_cannot_be_taken_is_named(served: tuple[httpx.Client, Service], field: str, said: str) -> None:
    client, _ = served
    name = "talk.wav" if field == "audio" else None  # without one it is no file
    sent: list[Any] = [("file", ("talk.wav", AUDIO)), (field, (name, bytes(70_000)))]
    answer = client.post("transcriptions", files=sent, data={"model": "stub"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and said in error["message"]


def test_a_body_without_a_length_is_read_up_to_its_limit(served: tuple[httpx.Client, Service]) -> None:
    client, _ = served

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield bytes(100_000)

    answer = client.post("transcriptions", content=body(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413 and "more than 1 MB" in answer.text


@pytest.mark.parametrize("charset", ["punycode", "undefined", "unicode_escape", "utf-7", "base64", "nothing", "UTF8"])
def test_an_odd_charset_is_the_clients_error(served: tuple[httpx.Client, Service], charset: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n\\ud800+2AA-\r\n--x--\r\n'
    check(served, content=part, headers={"content-type": f"multipart/form-data; boundary=x; charset={charset}"})


def test_lists_and_objects_in_the_spellings_of_other_clients(served: tuple[httpx.Client, Service]) -> None:
    client, _ = served
    sent: dict[str, Any] = {"files": {"file": AUDIO}}
    data = {"model": "stub", "response_format": "verbose_json"}
    for name in ("timestamp_granularities", "timestamp_granularities[]", "timestamp_granularities[0]"):
        answer = client.post("transcriptions", data={**data, name: "segment"}, **sent)
        assert answer.status_code == 200 and answer.json()["segments"] == []
    for name in ("chunking_strategy[type]", "include[0]", "known_speaker_names[]"):
        error = client.post("transcriptions", data={**data, name: "server_vad"}, **sent).json()["error"]
        assert (error["param"], error["code"]) == (name.partition("[")[0], "unsupported_parameter")


def test_other_methods_and_paths(served: tuple[httpx.Client, Service]) -> None:
    client, _ = served
    assert client.get("transcriptions").json()["error"]["message"].endswith("Method Not Allowed")
    assert client.post("speech").status_code == 404
    for path in ("/", "/health", "/metrics", "/v1/models"):
        found = client.head(str(client.base_url.join(path)))
        assert found.status_code == 200 and not found.content and "content-type" in found.headers
    assert client.head("transcriptions").status_code == 405


# ---- before it serves ----------------------------------------------------------------------------------------------


def test_what_keeps_it_from_starting_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert status(["serve", "--port", port]) == 1
        assert f"--port {port}: cannot be listened at" in capsys.readouterr().err
    (tmp_path / "keys").write_text(" \n")
    for keys in (tmp_path / "keys", tmp_path / "none"):
        with pytest.raises(OptionError, match=f"--api_key_file {keys}"):
            keys_in(str(keys))
    assert status(["serve", "--port", "70000"]) == 2
    with pytest.raises(OptionError, match="--host a..b --port 0: cannot be listened at"):
        bound("a..b", 0)


def test_the_extra_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("maxwhisper.cli.serve_command.find_spec", lambda name: None if name == "fastapi" else sys)
    assert status(["serve"]) == 1
    assert "needs fastapi: pip install 'maxwhisper[serve]'" in capsys.readouterr().err


def test_nothing_else_imports_it() -> None:
    code = "import sys, maxwhisper.cli; maxwhisper.cli.build_parser(); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"fastapi", "starlette", "uvicorn", "prometheus_client", "maxwhisper.serving"} & set(found)
