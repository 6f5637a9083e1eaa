"""The page: audio in a browser, its text word by word, and the files that `transcribe` writes."""

import html
import json
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from ..subtitles import FORMATS, contents
from .answers import Streamed
from .errors import APIError
from .fields import Transcription
from .jobs import Job, Segments, Transcript
from .service import Service

SECURITY = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:;"
    " connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
MODEL, RACE = "/* the model */", "/* the race */"
"""What stands in page.html where the model's name goes, and the link to a race."""
OF_A_SEGMENT = ("start", "end", "text", "words")


def add_page(app: FastAPI, service: Service, keyed: list[Any], race: str | None) -> None:
    """Adds the page, and what it asks for: `POST /transcripts`, the form of OpenAI's interface, answered by lines.

    race: a page of its own, to be linked to.
    """
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace(MODEL, html.escape(service.names[0]))
    page = page.replace(RACE, ' &middot; <a href="race">race</a>' if race else "")

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers=SECURITY)

    if race:

        @app.get("/race")
        async def shown() -> Response:
            return HTMLResponse(race, headers=SECURITY)

    @app.post("/transcripts", dependencies=keyed)
    async def transcripts(request: Request) -> Response:
        return await service.answer(request, Transcription, streamed)


def streamed(job: Job, first: Segments | Transcript) -> Response:
    """Returns a job's segments as they come, and the output files at last, each a line of JSON."""
    return Streamed(job, lines(job, first), "application/x-ndjson")


async def lines(job: Job, found: Segments | Transcript) -> AsyncIterator[str]:
    """Yields `{"segments": ...}` for each window, then `{"files": ..., "seconds": ...}`, or `{"error": ...}`."""
    try:
        while not isinstance(found, Transcript):
            segments = [{name: segment.get(name, []) for name in OF_A_SEGMENT} for segment in found]
            yield line({"segments": segments})
            found = await job.next()
    except APIError as error:
        yield line(error.body)
        return
    of_formats = {ending: contents(found.result, ending, {}) for ending in FORMATS}
    yield line({"files": of_formats, "seconds": found.seconds})


def line(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False) + "\n"
