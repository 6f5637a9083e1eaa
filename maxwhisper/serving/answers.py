"""What is returned: a transcript in each of OpenAI's formats, or as events while it comes."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from whisper.tokenizer import LANGUAGES

from ..subtitles import contents
from .errors import APIError
from .fields import Transcription, Translation
from .jobs import Job, Segments, Transcript

log = logging.getLogger("maxwhisper")

TO_READ = 5
"""Seconds that a client has, after the time of its request, to read the end of an answer."""


def answer(transcript: Transcript, fields: Translation) -> Response:
    """Returns a transcript in the format that was asked for."""
    text = transcript.result["text"].strip()
    if fields.response_format == "json":
        return JSONResponse({"text": text} | usage(transcript, fields))
    if fields.response_format == "verbose_json":
        return JSONResponse(verbose(transcript, fields))
    if fields.response_format == "text":
        return PlainTextResponse(f"{text}\n")
    return PlainTextResponse(contents(transcript.result, fields.response_format, {}))


def usage(transcript: Transcript, fields: Translation) -> dict[str, Any]:
    """Returns what was used, in seconds begun, as OpenAI counts them; translations do not say."""
    if not isinstance(fields, Transcription):
        return {}
    return {"usage": {"type": "duration", "seconds": math.ceil(transcript.seconds)}}


def verbose(transcript: Transcript, fields: Translation) -> dict[str, Any]:
    """Returns the body of verbose_json: with words, segments, or both, as `timestamp_granularities` says."""
    result, wanted = transcript.result, getattr(fields, "timestamp_granularities", None) or ["segment"]
    language = "en" if fields.task == "translate" else result["language"]
    body = {
        "task": fields.task,
        "language": LANGUAGES[language],
        "duration": transcript.seconds,
        "text": result["text"].strip(),
    }
    if "word" in wanted:
        body["words"] = [
            {"word": word["word"].strip(), "start": word["start"], "end": word["end"]}
            for segment in result["segments"]
            for word in segment["words"]
        ]
    if "segment" in wanted:
        segments = result["segments"]
        body["segments"] = [{name: each[name] for name in each if name != "words"} for each in segments]
    return body | usage(transcript, fields)


class Streamed(StreamingResponse):
    """What is found of a job as it comes."""

    def __init__(self, job: Job, parts: AsyncIterator[str], media_type: str):
        # nginx would hold small pieces back until it has many.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(parts, media_type=media_type, headers=headers)
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self.job.deadline + TO_READ):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client has not read its answer in time")
        finally:
            self.job.stop()


def in_events(job: Job, first: Segments | Transcript) -> Response:
    """Returns the text of a job as it comes, in server-sent events. first: what has come of it already, since errors
    before that have a status of their own."""
    return Streamed(job, events(job, first), "text/event-stream")


async def events(job: Job, found: Segments | Transcript) -> AsyncIterator[str]:
    """Yields the events of a job; together the deltas are the text."""
    raw = sent = ""
    try:
        while not isinstance(found, Transcript):
            raw += "".join(segment["text"] for segment in found)
            for event in deltas(sent, raw.strip()):
                yield event
            sent = raw.strip()
            found = await job.next()
    except APIError as error:
        yield event_of(error.body)
        return
    text = found.result["text"].strip()
    for event in deltas(sent, text):
        yield event
    yield event_of({"type": "transcript.text.done", "text": text})


def deltas(sent: str, text: str) -> Iterator[str]:
    """Yields an event with what a text has more than was sent of it, if it has more."""
    if text != sent and text.startswith(sent):
        yield event_of({"type": "transcript.text.delta", "delta": text[len(sent) :]})


def event_of(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
