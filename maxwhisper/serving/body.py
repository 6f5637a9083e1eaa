"""How a request's body is read: no further than its limit, and into files that have no name."""

from contextlib import aclosing
from typing import IO

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Message, Receive

from .errors import APIError

MAX_FIELDS = 64
MAX_FIELD = 2**16
"""Bytes of a field that is no file: a prompt has 223 tokens at most that count."""
ROOM_FOR_FIELDS = 2**20
"""Bytes that a body may have beside its file."""


async def form_of(request: Request, max_file_mb: int) -> FormData:
    """Reads the form of a request, whose file is to be closed.

    What is larger than a megabyte is on the disk in a file without a name, which ends with the process too.
    Raises APIError for a body of another type, that is too long, or that is no form.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise APIError(400, "expected a body of type multipart/form-data with the audio in its field 'file'", "file")
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):  # some codecs fail with other errors, or find half of a character
        raise APIError(400, f"the charset of the form is {charset!r}, expected utf-8")
    async with aclosing(Request(request.scope, up_to(request, max_file_mb)).stream()) as body:
        parser = Parser(request.headers, body, max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD)
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise APIError(400, error.message) from error


class Parser(MultiPartParser):
    """Names the field that cannot be taken."""

    def on_headers_finished(self) -> None:
        """Begins a field; raises APIError for one more than there may be."""
        try:
            super().on_headers_finished()
        except MultiPartException as error:
            if not (name := self._current_part.field_name):
                raise
            raise APIError(400, f"'{name}' is one too many: {error.message}", name) from error

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Takes a piece of a field; raises APIError where it has too many bytes for one that is no file."""
        try:
            super().on_part_data(data, start, end)
        except MultiPartException as error:
            name, most = self._current_part.field_name, MAX_FIELD // 1024
            message = f"'{name}' has more than {most} KB: only a file may, and a file comes with a file name"
            raise APIError(400, message, name, "invalid_value") from error


def up_to(request: Request, max_file_mb: int) -> Receive:
    """Returns what receives a request's body; it raises APIError once there is more than a file may have."""
    most = max_file_mb * 10**6 + ROOM_FOR_FIELDS
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large(max_file_mb)
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > most:
            raise too_large(max_file_mb)
        return message

    return receive


def too_large(max_file_mb: int) -> APIError:
    return APIError(413, f"the file has more than {max_file_mb} MB, which is the limit here", "file")


def file_in(form: FormData, max_file_mb: int) -> IO[bytes]:
    """Returns the file of a form; raises APIError if there is none, or if it is too large."""
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise APIError(400, "you must provide a file parameter, with the audio", "file", "missing_required_parameter")
    if (file.size or 0) > max_file_mb * 10**6:
        raise too_large(max_file_mb)
    return file.file
