"""The routes of OpenAI's audio interface, and what runs beside them: models, health, metrics."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

from ..callers import Together
from ..whisper import Whisper
from .answers import Events, answer
from .body import file_in, form_of
from .errors import APIError, add_handlers, stopping
from .fields import Transcription, Translation, checked
from .jobs import Job, Jobs, Limits
from .metrics import Measured, Metrics

ALIASES = ("whisper-1",)
"""Names that clients send for whichever Whisper there is."""
GONE = 499
"""The status, in metrics alone, of a request whose client has left; nginx's."""

T = TypeVar("T")


class Service:
    """A model that answers requests."""

    def __init__(self, model: Whisper, name: str, limits: Limits):
        self.model, self.names, self.limits = model, (name, *ALIASES), limits
        self.metrics = Metrics()
        self.jobs = Jobs(Together(model, limits.batch_size), limits, self.metrics.audio.inc)
        self.metrics.running.set_function(lambda: len(self.jobs.running))
        self.created = int(time.time())

    async def answer(self, request: Request, fields: type[Translation]) -> Response:
        """Answers a request for a transcript; raises APIError where there can be none."""
        job = self.jobs.new()
        with ExitStack() as failed:
            failed.callback(job.stop)
            try:
                response = await self._answer(request, fields, job)
            except TimeoutError as error:
                message = f"the request has not come within the limit of {self.limits.timeout:g} s"
                raise APIError(408, message) from error
            except ClientDisconnect:
                return Response(status_code=GONE)
            except asyncio.CancelledError as error:  # uvicorn's, where what runs takes longer than it may at the end
                raise stopping() from error
            failed.pop_all()
        return response

    async def _answer(self, request: Request, fields: type[Translation], job: Job) -> Response:
        max_file_mb = self.limits.max_file_mb
        async with asyncio.timeout_at(job.deadline):
            form = await form_of(request, max_file_mb)
        async with AsyncExitStack() as unused:
            unused.push_async_callback(form.close)
            wanted = checked(form, fields)
            self._check_model(wanted)
            stream = isinstance(wanted, Transcription) and wanted.stream
            job.start(file_in(form, max_file_mb), wanted.options, in_pieces=stream)
            unused.pop_all()  # the job reads the file, and closes it
        found = await unless_gone(request, job.next())
        if stream:
            return Events(job, found)
        assert not isinstance(found, list)
        return answer(found, wanted)

    def _check_model(self, wanted: Translation) -> None:
        """Raises APIError where the model is another one, or cannot do what is wanted."""
        if wanted.model not in self.names:
            message = f"The model '{wanted.model}' does not exist here: there is {' or '.join(self.names)}"
            raise APIError(404, message, "model", "model_not_found")
        language = getattr(wanted, "language", None) or "en"
        if not self.model.is_multilingual and (language != "en" or wanted.task == "translate"):
            param = "model" if wanted.task == "translate" else "language"
            raise APIError(400, f"the model '{self.names[0]}' knows English only", param, "invalid_value")

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


def create_app(service: Service, api_keys: Sequence[str] = ()) -> FastAPI:
    """Returns the application, which ends the service's threads when it ends.

    api_keys: one of which a request must have, if there are any.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.jobs.close)  # while the last answers go out

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        # All are compared, each in a time that does not depend on where they differ.
        if api_keys and not any([hmac.compare_digest(given, key.encode()) for key in api_keys]):
            raise APIError(401, "Incorrect API key provided", code="invalid_api_key")

    app = FastAPI(title="maxwhisper", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Measured, metrics=service.metrics)
    add_handlers(app)
    keyed = [Depends(check_key)]

    @app.post("/v1/audio/transcriptions", dependencies=keyed)
    async def transcriptions(request: Request) -> Response:
        return await service.answer(request, Transcription)

    @app.post("/v1/audio/translations", dependencies=keyed)
    async def translations(request: Request) -> Response:
        return await service.answer(request, Translation)

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    @app.get("/v1/models/{name:path}", dependencies=keyed)
    async def model(name: str) -> Response:
        for each in service.models():
            if each["id"] == name:
                return JSONResponse(each)
        raise APIError(404, f"The model '{name}' does not exist here", "model", "model_not_found")

    @app.get("/metrics", dependencies=keyed)
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    return app
