"""Text of speech while it is said, as OpenAI's interface has it: `/v1/realtime?intent=transcription`.

A client sends audio in events and commits it, and what it has sent until then is an item. The words of an item that are
settled come as deltas; what is said to be completed is the transcript of all its audio.
"""

import asyncio
import base64
import binascii
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, cast
from urllib.parse import unquote

from fastapi import FastAPI
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..decoding.batching import Stopped
from ..live import Session
from ..live.listening import listen
from ..live.source import Blocks, Source
from ..whisper import Whisper
from .errors import APIError, answer, unknown_key
from .jobs import Job, api_error
from .service import Service
from .settings import Format, Settings, settings_of

RATE, SAMPLE_SIZE = Format().rate, 2
"""Samples per second of a client's audio, and bytes of a sample."""
POLICY_VIOLATION = 1008
"""The code with which a connection is closed that has been silent for too long."""

IN_PROTOCOLS = "openai-insecure-api-key."
"""What the key stands behind in the protocols that a browser offers."""

Event = Mapping[str, Any]


class Item:
    """Audio that a client sends until it commits it, and its text."""

    def __init__(self, conversation: "Conversation", settings: Settings):
        self.conversation, self.settings = conversation, settings
        self.id = f"item_{uuid.uuid4().hex[:16]}"
        self.blocks: Blocks = SimpleQueue()
        self.source = Source(self.blocks, RATE)
        self.n_byte = 0
        self.sent = ""
        self.dropped = False

    @property
    def seconds(self) -> float:
        return self.n_byte / (RATE * SAMPLE_SIZE)

    def add(self, pcm: bytes) -> None:
        self.n_byte += len(pcm)
        self.blocks.put(pcm)

    def end(self) -> None:
        self.source.stop()

    def drop(self) -> None:
        """Has what is not decoded yet forgotten, and no more told of it."""
        self.dropped, self.n_byte = True, 0
        with suppress(Empty):
            while True:
                self.blocks.get_nowait()
        self.end()

    def transcribe(self) -> None:
        """Tells what is said while it is, and at the end the transcript; in a thread of its own."""
        conversation = self.conversation
        if self.dropped:
            return
        try:
            session = Session(cast(Whisper, conversation.job.caller.model), **self.settings.options)
            listen(session, self.source, self.show)
            text = session.finish()["text"].strip()
            self.show(session.settled, "")
            usage = {"type": "duration", "seconds": self.seconds}
            self._tell("completed", transcript=text, usage=usage)
            conversation.service.metrics.audio.inc(self.seconds)
        except (Stopped, CancelledError):
            pass
        except Exception as error:
            while not self.source.ended:  # the client waits for an end from when it commits the item
                self.source.take()
            if not (self.dropped or conversation.job.caller.stopped.is_set()):
                self._tell("failed", error=api_error(error).body["error"])

    def show(self, settled: str, _: str) -> None:
        """Sends what is settled more than was sent; raises Stopped where nobody wants it."""
        if self.dropped:
            raise Stopped
        if delta := settled[len(self.sent) :] if self.sent else settled.lstrip():
            self._tell("delta", delta=delta)
        self.sent = settled

    def _tell(self, kind: str, **fields: Any) -> None:
        kind = f"conversation.item.input_audio_transcription.{kind}"
        self.conversation.send({"type": kind, "item_id": self.id, "content_index": 0, **fields})


class Conversation:
    """The connection of one client, which has a place among the requests that are served."""

    def __init__(self, socket: WebSocket, service: Service, job: Job):
        self.socket, self.service, self.job = socket, service, job
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.id = f"sess_{uuid.uuid4().hex[:16]}"
        self.settings = Settings()
        self.item: Item | None = None
        self.before: str | None = None
        # One item after the other, so that nobody takes the places of others by many.
        self.thread = ThreadPoolExecutor(1, "maxwhisper-realtime")
        self.running: list[tuple[Item, Future[None]]] = []

    def send(self, event: Event) -> None:
        """Has an event sent, from whichever thread."""
        numbered = {"event_id": f"event_{uuid.uuid4().hex[:16]}", **event}
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.events.put_nowait, numbered)

    async def run(self) -> None:
        """Answers events until the client leaves, or has sent none for as long as a request may take."""
        self.send({"type": "session.created", "session": self.session})
        sending = asyncio.create_task(self._send_all())
        try:
            while True:
                async with asyncio.timeout(self.service.limits.timeout):
                    await self.events.join()  # who does not read is not listened to, lest unread events fill the memory
                    text = await self._next()
                await self._answer(text)
        except TimeoutError:
            with suppress(RuntimeError):
                await self.socket.close(POLICY_VIOLATION, "nothing has come for too long")
        except WebSocketDisconnect:
            pass
        finally:
            sending.cancel()
            await self._end()

    async def _next(self) -> str:
        try:
            return await self.socket.receive_text()
        except KeyError:  # a message of bytes, which is no event
            return ""

    async def _send_all(self) -> None:
        while True:
            event = await self.events.get()
            with suppress(WebSocketDisconnect, RuntimeError):  # of a client that has left
                await self.socket.send_text(json.dumps(event))
            self.events.task_done()

    async def _end(self) -> None:
        """Ends what is being transcribed."""
        self.job.caller.stop()
        if self.item:
            self.item.end()
        self.thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*(asyncio.wrap_future(work) for _, work in self.running), return_exceptions=True)

    @property
    def session(self) -> dict[str, Any]:
        return {"id": self.id, "object": "realtime.transcription_session", **self.settings.as_session()}

    # ---- what a client may send ------------------------------------------------------------------------------------

    async def _answer(self, text: str) -> None:
        event: Any = {}
        try:
            event = parsed(text)
            match event["type"]:
                case "session.update":
                    self._update(event)
                case "input_audio_buffer.append":
                    self._append(event)
                case "input_audio_buffer.commit":
                    self._commit()
                case "input_audio_buffer.clear":
                    self._clear()
                case other:
                    raise APIError(400, f"'{other}' is no event of a transcription session", "type", "invalid_value")
        except APIError as error:
            of_event = error.body["error"] | {"event_id": event.get("event_id")}
            self.send({"type": "error", "error": of_event})

    def _update(self, event: Event) -> None:
        settings = settings_of(event.get("session"), self.settings)
        self.service.check_realtime(settings)
        self.settings = settings  # of the next item; one that is begun goes on as it began
        self.send({"type": "session.updated", "session": self.session})

    def _append(self, event: Event) -> None:
        pcm = samples_in(event.get("audio"))
        item = self.item or Item(self, self.settings)
        self.running = [(each, work) for each, work in self.running if not work.done()]
        # An item takes memory too: one of less than a second counts as a second.
        others = sum(max(1, each.seconds) for each, _ in self.running if each is not item)
        most = self.service.limits.max_audio_minutes
        if others + item.seconds + len(pcm) / (RATE * SAMPLE_SIZE) > 60 * most:
            limit = f"there may be at most {most} minutes of audio that is not transcribed yet: commit it, and wait"
            raise APIError(400, limit, "audio")
        if not self.item:
            self.running.append((item, self.thread.submit(item.transcribe)))
            self.item = item
        item.add(pcm)

    def _commit(self) -> None:
        if not self.item or not self.item.n_byte:
            nothing = "no audio has come that could be committed"
            raise APIError(400, nothing, code="input_audio_buffer_commit_empty")
        item, self.item = self.item, None
        self.send({"type": "input_audio_buffer.committed", "item_id": item.id, "previous_item_id": self.before})
        content = [{"type": "input_audio", "transcript": None}]
        message = {"id": item.id, "object": "realtime.item", "type": "message", "role": "user", "content": content}
        for kind, status in (("added", "in_progress"), ("done", "completed")):
            named = {"item": {**message, "status": status}, "previous_item_id": self.before}
            self.send({"type": f"conversation.item.{kind}", **named})
        self.before = item.id
        item.end()

    def _clear(self) -> None:
        if self.item:
            self.item.drop()
            self.item = None
        self.send({"type": "input_audio_buffer.cleared"})


def parsed(text: str) -> dict[str, Any]:
    """Returns a client's event; raises APIError if it is none."""
    try:
        event = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"expected an event in JSON: {error}", code="invalid_json") from error
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise APIError(400, "expected an event: an object with a type", "type", "invalid_event")
    return event


def samples_in(audio: object) -> bytes:
    """Returns the samples of an event in base64; raises APIError if there are none."""
    try:
        if not isinstance(audio, str):
            raise ValueError("it is no string")
        pcm = base64.b64decode(audio, validate=True)
    except (ValueError, binascii.Error) as error:
        raise APIError(400, f"'audio' is no base64: {error}", "audio", "invalid_value") from error
    return pcm


def add_realtime(app: FastAPI, service: Service, is_key: Callable[[str], bool]) -> None:
    """Adds the route. is_key: tells whether a request with this key may be answered."""

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        offered = socket.scope["subprotocols"]
        try:
            if not is_key(key_of(socket.headers, offered)):
                raise unknown_key()
            if (intent := socket.query_params.get("intent")) != "transcription":
                raise APIError(400, f"'intent' is '{intent}': expected transcription", "intent", "invalid_value")
            service.check_realtime(Settings(socket.query_params.get("model")))
            job = service.jobs.new()
        except APIError as error:
            await socket.send_denial_response(answer(error))
            return
        try:
            await socket.accept("realtime" if "realtime" in offered else None)
            await Conversation(socket, service, job).run()
        finally:
            job.stop()


def key_of(headers: Mapping[str, str], offered: Sequence[str] = ()) -> str:
    """Returns the key of a client: of a browser, which can send no header, one of the protocols that it offers, with %
    and two digits for what no protocol's name may have, as / and =."""
    named = (unquote(each.removeprefix(IN_PROTOCOLS), "latin-1") for each in offered if each.startswith(IN_PROTOCOLS))
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return next(named, key if scheme.lower() == "bearer" else "")
