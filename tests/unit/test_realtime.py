"""`/v1/realtime?intent=transcription`, asked by OpenAI's own client over loopback."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from types import SimpleNamespace
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from maxwhisper.errors import AudioError
from maxwhisper.serving.app import create_app
from maxwhisper.serving.jobs import Limits
from maxwhisper.serving.realtime import Conversation, Item
from maxwhisper.serving.service import Service
from maxwhisper.serving.settings import Settings
from maxwhisper.whisper import Whisper
from reference.fixtures import FIXTURES

from .command import StubModel
from .serving import KEY, LIMITS, in_thread

pytestmark = pytest.mark.usefixtures("encodes_once")

CLIP = FIXTURES / "clips" / "english-2.flac"
TRANSCRIPTION = "conversation.item.input_audio_transcription."
RATE = 24000


@dataclass
class Server:
    """A server in a thread of this process."""

    url: str
    service: Service

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=KEY)

    def running(self) -> int:
        return len(self.service.jobs.running)


@pytest.fixture(scope="module")
def server(model: Whisper) -> Iterator[Server]:
    with in_thread(model, keys=[KEY], max_requests=2, max_audio_minutes=1) as (address, service):
        yield Server(f"{address}/v1", service)


@pytest.fixture(scope="module")
def pcm() -> bytes:
    """Returns the clip as a client's microphone gives it: 16-bit samples at 24 kHz."""
    with av.open(str(CLIP)) as file:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        frames = [each for frame in file.decode(audio=0) for each in resampler.resample(frame)]
        frames += resampler.resample(None)
    return b"".join(frame.to_ndarray()[0].tobytes() for frame in frames)


class Client:
    """A connection of OpenAI's client."""

    def __init__(self, connection: Any):
        self.connection = connection
        assert self.next().type == "session.created"

    def next(self) -> Any:
        return self.connection.recv()

    def append(self, pcm: bytes, at_once: int = RATE) -> None:
        for start in range(0, len(pcm), at_once):
            audio = base64.b64encode(pcm[start : start + at_once]).decode()
            self.connection.input_audio_buffer.append(audio=audio)

    def until(self, kind: str) -> list[Any]:
        """Returns all events up to one of this type."""
        found = [self.next()]
        while found[-1].type != kind:
            assert found[-1].type != "error", found[-1]
            found.append(self.next())
        return found

    def refused(self, **event: Any) -> Any:
        """Returns the error that an event gets."""
        self.connection.send(event)
        answer = self.next()
        assert answer.type == "error", answer
        return answer.error


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client().realtime.connect(extra_query={"intent": "transcription"}) as connection:
        yield Client(connection)


def expected(model: Whisper, pcm: bytes) -> str:
    """Returns what `transcribe` gives of these samples."""
    from maxwhisper.live.source import Source

    source: Any = Source(None, RATE)  # type: ignore[arg-type]
    source.ended = True
    return model.transcribe(source._converted(pcm), language="en")["text"].strip()


def test_settled_words_come_while_audio_does_and_the_transcript_at_last(
    client: Client, model: Whisper, pcm: bytes
) -> None:
    session: Any = {"type": "transcription", "audio": {"input": {"transcription": {"language": "English"}}}}
    client.connection.session.update(session=session)
    updated = client.next()
    assert updated.type == "session.updated" and updated.session.audio.input.transcription.language == "en"
    for start in range(0, len(pcm), RATE):
        client.append(pcm[start : start + RATE])
        time.sleep(0.1)
    early = client.until(f"{TRANSCRIPTION}delta")
    client.connection.input_audio_buffer.commit()
    events = early + client.until(f"{TRANSCRIPTION}completed")
    *others, completed = events
    deltas = [event.delta for event in others if event.type == f"{TRANSCRIPTION}delta"]
    transcript = expected(model, pcm)
    assert completed.transcript == transcript
    assert completed.usage.type == "duration" and completed.usage.seconds == len(pcm) / (2 * RATE)
    assert len(deltas) > 1 and "".join(deltas).split()[:5] == transcript.split()[:5]
    kinds = [event.type for event in others if event.type != f"{TRANSCRIPTION}delta"]
    assert kinds == ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]
    items = {getattr(event, "item_id", completed.item_id) for event in events}
    assert items == {completed.item_id}


def test_items_follow_one_another_and_audio_that_is_cleared_is_none(client: Client, model: Whisper, pcm: bytes) -> None:
    half = pcm[: len(pcm) // 4 * 2]
    client.append(pcm)
    client.connection.input_audio_buffer.clear()
    client.until("input_audio_buffer.cleared")
    before = None
    for each in (half, pcm):
        client.append(each)
        client.connection.input_audio_buffer.commit()
        events = client.until(f"{TRANSCRIPTION}completed")
        assert events[-1].transcript == expected(model, each)
        [committed] = [event for event in events if event.type == "input_audio_buffer.committed"]
        assert committed.previous_item_id == before
        before = committed.item_id


def test_items_of_a_connection_are_done_in_their_order(client: Client, pcm: bytes) -> None:
    """A short one does not overtake a long one: all have one thread, and the others' places stay theirs."""
    for each in (pcm, pcm[:RATE], pcm[:RATE]):
        client.append(each)
        client.connection.input_audio_buffer.commit()
    events = [event for _ in range(3) for event in client.until(f"{TRANSCRIPTION}completed")]
    committed, completed = (
        [event.item_id for event in events if event.type == kind]
        for kind in ("input_audio_buffer.committed", f"{TRANSCRIPTION}completed")
    )
    assert committed == completed and len(set(completed)) == 3


def test_odd_pieces_are_the_same_audio(client: Client, model: Whisper, pcm: bytes) -> None:
    client.append(pcm[: 4 * RATE], at_once=999)
    client.connection.input_audio_buffer.commit()
    assert client.until(f"{TRANSCRIPTION}completed")[-1].transcript == expected(model, pcm[: 4 * RATE])


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"type": "realtime"}, "session.type"),
        ("x", "session"),
        ({"type": "transcription", "audio": {"input": {"turn_detection": {"type": "server_vad"}}}}, "turn_detection"),
        ({"type": "transcription", "audio": {"input": {"noise_reduction": {"type": "near_field"}}}}, "noise_reduction"),
        ({"type": "transcription", "audio": {"input": {"format": {"type": "audio/pcmu"}}}}, "format.type"),
        ({"type": "transcription", "audio": {"input": {"transcription": {"language": "xx"}}}}, "language"),
        ({"type": "transcription", "audio": {"input": {"transcription": {"keywords": ["a"]}}}}, "keywords"),
        ({"type": "transcription", "audio": {"input": {"transcription": {"model": "gpt-5"}}}}, "model"),
        ({"type": "transcription", "audio": {"input": {"transcription": {"language": "yue"}}}}, "language"),
        ({"type": "transcription", "audio": {"input": {"transcription": {"prompt": "<|nospeech|>"}}}}, "prompt"),
        ({"type": "transcription", "audio": {"input": {"transcription": {"prompt": "a" * 2**17}}}}, "prompt"),
        ({"type": "transcription", "include": ["item.input_audio_transcription.logprobs"]}, "include"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(client: Client, session: Any, param: str) -> None:
    error = client.refused(type="session.update", event_id="mine", session=session)
    assert error.event_id == "mine" and param in (error.param or "")
    assert error.type == "invalid_request_error"


def test_an_update_leaves_what_it_does_not_name(client: Client) -> None:
    for given, expected in (
        ({"language": "German", "model": "whisper-1"}, ("de", None, "whisper-1")),
        ({"prompt": "Anna"}, ("de", "Anna", "whisper-1")),
        ({"language": None}, (None, "Anna", "whisper-1")),
        ({}, (None, "Anna", "whisper-1")),
    ):
        session: Any = {"type": "transcription", "audio": {"input": {"transcription": given}}}
        client.connection.session.update(session=session)
        found = client.next().session.audio.input.transcription
        assert (found.language, found.prompt, found.model) == expected
    client.connection.session.update(session={"type": "transcription"})
    assert client.next().session.audio.input.transcription.prompt == "Anna"


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"type": "input_audio_buffer.append", "audio": "?"}, "'audio' is no base64"),
        ({"type": "input_audio_buffer.append", "audio": 5}, "'audio' is no base64"),
        ({"type": "input_audio_buffer.append"}, "'audio' is no base64"),
        ({"type": "input_audio_buffer.commit"}, "no audio has come that could be committed"),
        ({"type": "response.create"}, "'response.create' is no event of a transcription session"),
        ({"type": None}, "expected an event"),
    ],
)
def test_events_that_cannot_be_used(client: Client, event: dict[str, Any], said: str) -> None:
    assert said in client.refused(**event).message
    assert client.refused(type="input_audio_buffer.commit").code == "input_audio_buffer_commit_empty"  # it goes on


def test_an_item_is_no_longer_than_audio_may_be(client: Client) -> None:
    minute = bytes(2 * 60 * RATE)
    client.append(minute[: -2 * RATE], at_once=2 * RATE)
    client.append(bytes(4 * RATE), at_once=4 * RATE)
    error = client.next()
    assert error.type == "error" and "at most 1 minutes" in error.error.message
    client.connection.input_audio_buffer.commit()
    completed = client.until(f"{TRANSCRIPTION}completed")[-1]
    assert completed.transcript == "" and completed.usage.seconds == 59


def test_a_connection_has_a_place_and_gives_it_back(server: Server, pcm: bytes) -> None:
    asked = {"intent": "transcription"}
    with server.client().realtime.connect(extra_query=asked) as first:
        Client(first).append(pcm)
        with server.client().realtime.connect(extra_query=asked) as second:
            Client(second)
            assert server.running() == 2
            with pytest.raises(InvalidStatus, match="429"), server.client().realtime.connect(extra_query=asked):
                pass
    for _ in range(200):
        if not server.running():
            break
        time.sleep(0.05)
    assert server.running() == 0


@pytest.mark.parametrize(
    ("query", "key", "status"),
    [("intent=transcription", "x", 401), ("intent=other", KEY, 400), ("model=x&intent=transcription", KEY, 404)],
)
def test_who_is_not_let_in(server: Server, query: str, key: str, status: int) -> None:
    address = f"{server.url.replace('http', 'ws')}/realtime?{query}"
    headers = {"authorization": f"Bearer {key}"}
    with pytest.raises(InvalidStatus, match=str(status)), connect(address, additional_headers=headers):
        pass


def test_a_browser_gives_its_key_among_its_protocols(server: Server) -> None:
    address = f"{server.url.replace('http', 'ws')}/realtime?intent=transcription"
    with connect(address, subprotocols=["realtime", f"openai-insecure-api-key.{KEY}"]) as socket:  # type: ignore[list-item]
        assert socket.subprotocol == "realtime"
        assert json.loads(socket.recv())["type"] == "session.created"
        socket.send("{")
        assert json.loads(socket.recv())["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("name", ["Protocol", "Extensions", "Key", "Version"])
@pytest.mark.parametrize("value", ["ü".encode(), b"\xfc", "realtime, openai-insecure-api-key.ü".encode()])
def test_a_handshake_that_is_not_ascii_is_refused(server: Server, name: str, value: bytes) -> None:
    headers = {b"Connection": b"Upgrade", b"Upgrade": b"websocket", b"Sec-WebSocket-Version": b"13"}
    headers |= {b"Sec-WebSocket-Key": b"dGhlIHNhbXBsZSBub25jZQ==", f"Sec-WebSocket-{name}".encode(): value}
    answer = httpx.get(f"{server.url}/realtime?intent=transcription", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].lower() == f"the header sec-websocket-{name} is not ASCII".lower()


@pytest.mark.parametrize("sent", ["[" * 100_000, b"{}", '{"type": "\\ud800", "event_id": "\\udfff"}'])
def test_what_is_no_event_is_an_error_and_no_end(server: Server, sent: str | bytes) -> None:
    """Nested deeper than Python reads, bytes, and half of a pair of surrogates, which UTF-8 does not have."""
    headers = {"authorization": f"Bearer {KEY}"}
    with connect(
        f"{server.url.replace('http', 'ws')}/realtime?intent=transcription", additional_headers=headers
    ) as socket:
        socket.recv(5)
        for _ in range(2):
            socket.send(sent)
            assert json.loads(socket.recv(5))["error"]["type"] == "invalid_request_error"


def test_a_client_that_is_silent_for_too_long_loses_its_place(model: Whisper) -> None:
    with in_thread(model, timeout=0.5) as (address, service):
        with connect(f"{address.replace('http', 'ws')}/v1/realtime?intent=transcription") as socket:
            socket.recv()
            with pytest.raises(ConnectionClosedError, match="nothing has come for too long"):
                socket.recv()
        assert not service.jobs.running


# ---- what one connection takes -------------------------------------------------------------------------------------


class Unread:
    """The socket of a client that sends and does not read."""

    received = 0

    async def receive_text(self) -> str:
        self.received += 1
        if self.received > 50:
            raise WebSocketDisconnect
        await asyncio.sleep(0)
        return "{}"

    async def send_text(self, text: str) -> None:
        await asyncio.Event().wait()

    async def close(self, code: int, reason: str) -> None:
        assert code == 1008


def test_a_client_that_does_not_read_is_not_listened_to() -> None:
    socket: Any = Unread()
    service: Any = SimpleNamespace(limits=Limits(**LIMITS | {"timeout": 0.1}))
    job: Any = SimpleNamespace(caller=SimpleNamespace(stop=lambda: None), stop=lambda: None)

    async def talk() -> None:
        await Conversation(socket, service, job).run()

    asyncio.run(talk())
    assert socket.received < 5


def test_a_client_that_leaves_before_it_is_let_in_has_no_place() -> None:
    scope = {"type": "websocket", "path": "/v1/realtime", "query_string": b"intent=transcription"}

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        raise OSError("it has left")

    async def ask() -> None:
        model: Any = StubModel()
        service = Service(model, "stub", Limits(**LIMITS))
        with suppress(OSError, WebSocketDisconnect):
            await create_app(service)({**scope, "headers": [], "subprotocols": []}, receive, send)
        assert not service.jobs.running
        service.jobs.close()

    asyncio.run(ask())


class Heard:
    """A session that notes what it is fed, during which its item is cleared."""

    settled = tentative = ""
    seconds = 0

    def __init__(self, item: Item):
        self.item, self.fed = item, 0

    def feed(self, samples: np.ndarray) -> None:
        self.fed += 1
        self.item.drop()


def test_audio_that_is_cleared_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation: Any = SimpleNamespace(job=SimpleNamespace(caller=SimpleNamespace(model=None)), send=lambda _: None)
    item = Item(conversation, Settings())
    session = Heard(item)
    monkeypatch.setattr("maxwhisper.serving.realtime.Session", lambda *_, **__: session)
    item.add(bytes(2 * 60 * RATE))
    item.transcribe()
    assert session.fed == 1
    waiting = Item(conversation, Settings())
    waiting.add(bytes(2 * RATE))
    waiting.drop()
    waiting.transcribe()
    assert session.fed == 1 and waiting.n_byte == 0 and waiting.blocks.get_nowait() is None


def test_deltas_put_together_are_the_text_without_the_space_before_it() -> None:
    sent: list[Any] = []
    conversation: Any = SimpleNamespace(send=sent.append)
    item = Item(conversation, Settings())
    for settled in ("", " Seven", " Seven", " Seven old  ones", " Seven old  ones."):
        item.show(settled, " that may change")
    assert [event["delta"] for event in sent] == ["Seven", " old  ones", "."]
    assert {event["item_id"] for event in sent} == {item.id}


def test_what_fails_early_is_told_of_what_was_committed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client waits for the end of an item from when it commits it."""

    def full(*_: Any, **__: Any) -> None:
        raise AudioError("audio: cannot be kept in a temporary file: No space left on device")

    monkeypatch.setattr("maxwhisper.serving.realtime.Session", full)
    client.append(bytes(2 * RATE))
    time.sleep(0.1)
    client.connection.input_audio_buffer.commit()
    *before, failed = client.until(f"{TRANSCRIPTION}failed")
    assert before[-1].type == "conversation.item.done"
    assert failed.item_id == before[0].item_id and "No space left" in failed.error.message


def test_audio_that_is_not_transcribed_yet_has_a_limit(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """All items count: by many short ones a client could fill the memory too."""
    let = Event()
    monkeypatch.setattr(Item, "transcribe", lambda _: let.wait(5))
    for _ in range(2):
        client.append(bytes(2 * 25 * RATE), at_once=2 * 25 * RATE)
        client.connection.input_audio_buffer.commit()
    client.append(bytes(2 * 9 * RATE), at_once=2 * 9 * RATE)
    client.connection.input_audio_buffer.clear()
    for _ in range(9):
        client.append(bytes(2))
        client.connection.input_audio_buffer.commit()
    client.append(bytes(2))
    for _ in range(11):
        client.until("conversation.item.done")
    error = client.next()
    let.set()
    assert error.type == "error" and "at most 1 minutes" in error.error.message
