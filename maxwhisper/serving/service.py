"""A model that answers requests for transcripts."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from ..callers import Scheduler
from ..errors import OptionError
from ..options import transcribing
from ..whisper import Whisper
from .answers import answer, in_events
from .body import file_in, form_of
from .errors import APIError, stopping
from .fields import Transcription, Translation, checked
from .jobs import Job, Jobs, Limits, Segments, Transcript, api_error
from .metrics import Metrics
from .settings import Settings

ALIASES = ("whisper-1",)
"""Names that clients send for whichever Whisper there is."""
REALTIME_ALIASES = ("gpt-realtime-whisper",)
"""Further names that clients of realtime sessions send for it."""
GONE = 499
"""The status, in metrics alone, of a request whose client has left; nginx's."""

T = TypeVar("T")
Respond = Callable[[Job, Segments | Transcript], Response]
"""From a job and what has come of it already to an answer while the rest comes."""


class Service:
    """A model that answers requests."""

    def __init__(self, model: Whisper, name: str, limits: Limits):
        self.model, self.names, self.limits = model, (name, *ALIASES), limits
        self.metrics = Metrics()
        n_window = min(limits.batch_size, limits.max_requests)  # there is memory for each
        self.jobs = Jobs(Scheduler(model, n_window), limits, self.metrics.audio.inc)
        self.metrics.running.set_function(lambda: len(self.jobs.running))
        self.created = int(time.time())

    async def answer(self, request: Request, fields: type[Translation], streamed: Respond | None = None) -> Response:
        """Answers a request for a transcript; raises APIError where there can be none.

        streamed: answers as the transcript comes; if not given, that is as OpenAI does, and only if asked for.
        """
        job = self.jobs.new()
        with ExitStack() as failed:
            failed.callback(job.stop)
            try:
                response = await self._answer(request, fields, streamed, job)
            except TimeoutError as error:
                message = f"the request has not come within the limit of {self.limits.timeout:g} s"
                raise APIError(408, message) from error
            except ClientDisconnect:
                return Response(status_code=GONE)
            except asyncio.CancelledError as error:  # uvicorn's, where what runs takes longer than it may at the end
                raise stopping() from error
            failed.pop_all()
        return response

    async def _answer(
        self, request: Request, fields: type[Translation], streamed: Respond | None, job: Job
    ) -> Response:
        max_file_mb = self.limits.max_file_mb
        async with asyncio.timeout_at(job.deadline):
            form = await form_of(request, max_file_mb)
        async with AsyncExitStack() as unused:
            unused.push_async_callback(form.close)
            wanted = checked(form, fields)
            self._check_model(wanted)
            if isinstance(wanted, Transcription) and wanted.stream:
                streamed = in_events
            job.start(file_in(form, max_file_mb), wanted.options, in_pieces=streamed is not None)
            unused.pop_all()  # the job reads the file, and closes it
        found = await unless_gone(request, job.next())
        if streamed:
            return streamed(job, found)
        assert not isinstance(found, list)
        return answer(found, wanted)

    def _check_model(self, wanted: Translation) -> None:
        """Raises APIError where the model is another one, or cannot do what is wanted."""
        if wanted.model not in self.names:
            raise self._no_model(wanted.model)
        language = getattr(wanted, "language", None) or "en"
        if not self.model.is_multilingual and (language != "en" or wanted.task == "translate"):
            raise self._english_only("model" if wanted.task == "translate" else "language")

    def check_realtime(self, settings: Settings) -> None:
        """Raises APIError for a model of realtime sessions that is another one, or cannot do what is wanted."""
        if settings.model not in (None, *self.names, *REALTIME_ALIASES):
            raise self._no_model(settings.model)
        if not self.model.is_multilingual and settings.language not in (None, "en"):
            raise self._english_only("language")
        try:
            transcribing(settings.options, self.model)
        except OptionError as error:
            raise api_error(error) from error

    def _no_model(self, name: str | None) -> APIError:
        message = f"The model '{name}' does not exist here: there is {' or '.join(self.names)}"
        return APIError(404, message, "model", "model_not_found")

    def _english_only(self, param: str) -> APIError:
        return APIError(400, f"the model '{self.names[0]}' knows English only", param, "invalid_value")

    def models(self) -> list[dict[str, Any]]:
        """Returns the names that requests may give, in OpenAI's form."""
        return [
            {"id": name, "object": "model", "created": self.created, "owned_by": "maxwhisper"} for name in self.names
        ]


async def unless_gone(request: Request, wanted: Coroutine[Any, Any, T]) -> T:
    """Returns what is awaited; raises ClientDisconnect if the client leaves before."""
    waiting, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        waiting.cancel()
        gone.cancel()


async def disconnected(request: Request) -> None:
    """Returns once the client of a request that has been read leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
