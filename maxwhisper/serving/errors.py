"""Errors as OpenAI's interface has them: a status, and a body that its clients read."""

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

RETRY_AFTER = 2
"""Seconds until another try makes sense: a window takes about as long, and with it a short clip."""


class APIError(Exception):
    """What a client is told. Clients try again by themselves after 408, 409, 429 and from 500 on."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """Returns what OpenAI's clients make an exception of."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def full(max_requests: int) -> APIError:
    """Returns the error of a request beyond the limit, which may be sent again."""
    message = f"{max_requests} requests are being served, which is the limit here: try again later"
    return APIError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(RETRY_AFTER)})


def too_slow(timeout: float) -> APIError:
    """Returns the error of a file that takes too long: not a 5xx, after which clients would send it again."""
    message = f"'file' cannot be transcribed within the limit of {timeout:g} s: send it in parts"
    return APIError(400, message, "file", "timeout")


def stopping() -> APIError:
    """Returns the error of a request that a server which is being stopped has no time for; the next one may."""
    return APIError(503, "the server is being stopped", headers={"retry-after": str(RETRY_AFTER)})


def unknown_key() -> APIError:
    return APIError(401, "Incorrect API key provided", code="invalid_api_key")


def answer(error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def add_handlers(app: FastAPI) -> None:
    """Has every error that leaves a route answered in OpenAI's form."""

    @app.exception_handler(APIError)
    async def api_error(_: Request, error: APIError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = error.detail if error.status_code == 400 else f"{request.method} {request.url.path}: {error.detail}"
        return answer(APIError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return answer(APIError(500, "the server failed; its log says why"))
