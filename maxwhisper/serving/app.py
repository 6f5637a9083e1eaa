"""The routes of OpenAI's audio interface, and what runs beside them: models, health, metrics."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from .errors import APIError, add_handlers, unknown_key
from .fields import Transcription, Translation
from .metrics import Measured
from .page import add_page
from .realtime import add_realtime, key_of
from .service import Service


def create_app(service: Service, api_keys: Sequence[str] = (), race: str | None = None) -> FastAPI:
    """Returns the application, which ends the service's threads when it ends.

    api_keys: one of which a request must have, if there are any. race: a page that the first one links to.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.jobs.close)  # while the last answers go out

    def is_key(given: str) -> bool:
        # All are compared, each in a time that does not depend on where they differ.
        return not api_keys or any([hmac.compare_digest(given.encode("latin-1"), key.encode()) for key in api_keys])

    async def check_key(request: Request) -> None:
        if not is_key(key_of(request.headers)):
            raise unknown_key()

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

    add_realtime(app, service, is_key)
    add_page(app, service, keyed, race)
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")  # which probes of health send, and every server must know
    return app
