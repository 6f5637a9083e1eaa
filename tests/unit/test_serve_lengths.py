"""Lengths that a client declares, of a body or of the audio in it: what comes is what counts."""

import asyncio
import io
import struct
import wave
from threading import Event
from typing import Any

import numpy as np
import pytest
from fastapi import Request

from maxwhisper.audio import JOINED, SAMPLE_RATE, read_upload
from maxwhisper.errors import AudioError
from maxwhisper.serving.body import ROOM_FOR_FIELDS, up_to
from maxwhisper.serving.errors import APIError

MOST = 10**6 + ROOM_FOR_FIELDS
"""Bytes that the body of a request may have, of which the file has a megabyte."""


@pytest.mark.parametrize(
    ("declared", "sent", "taken"),
    [
        (None, [MOST], 1),
        (None, [MOST, 1], None),
        (MOST, [MOST - 1, 1], 2),
        (MOST + 1, [1], 0),  # nothing of it is waited for
        (1, [MOST, 1], None),  # what comes counts, whatever was declared
        ("no number", [MOST, 1], None),
    ],
)
def test_a_length_that_is_declared_is_not_relied_on(declared: Any, sent: list[int], taken: int | None) -> None:
    """taken: how many messages are; None: too many."""
    messages = iter([{"type": "http.request", "body": bytes(n), "more_body": True} for n in sent])
    received = []

    async def receive() -> Any:
        received.append(next(messages))
        return received[-1]

    headers = [] if declared is None else [(b"content-length", f"{declared}".encode())]

    async def read() -> None:
        given = up_to(Request({"type": "http", "method": "POST", "headers": headers}, receive), 1)
        for _ in sent:
            await given()

    if taken == len(sent):
        asyncio.run(read())
        return
    with pytest.raises(APIError) as error:
        asyncio.run(read())
    assert error.value.status == 413 and len(received) == (len(sent) if taken is None else taken)


@pytest.mark.parametrize("declared", [0xFFFFFFFF, 0x7FFFFFFF, 10**6])
@pytest.mark.parametrize(("seconds", "fits"), [(0.5, True), (1.5, False)])
def test_the_length_of_audio_is_that_which_comes(declared: int, seconds: float, fits: bool) -> None:
    """As of what a program writes into a pipe, which cannot know how long it will be."""
    samples = np.arange(round(seconds * SAMPLE_RATE), dtype=np.int16)
    header = struct.pack(
        "<4sI8sIHHIIHH4sI", b"RIFF", declared, b"WAVEfmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", declared
    )
    file = io.BytesIO(header + samples.tobytes())
    if fits:
        assert (read_upload(file, "file", 1.0, Event()) * 32768 == samples).all()
        return
    with pytest.raises(AudioError, match="more than 1 s of audio"):
        read_upload(file, "file", 1.0, Event())


@pytest.mark.parametrize("at", [0, JOINED - 1, JOINED, 2 * JOINED + 5])
def test_a_sample_that_is_no_number_is_named_by_its_place(at: int) -> None:
    samples = np.zeros(2 * JOINED + 9, "<f4")
    samples[at] = np.nan
    size = samples.nbytes
    header = struct.pack(
        "<4sI8sIHHIIHH4sI", b"RIFF", size + 36, b"WAVEfmt ", 16, 3, 1, 16000, 64000, 4, 32, b"data", size
    )
    with pytest.raises(AudioError, match=rf"file: sample {at} \({at / 16000:.3f} s\) is not finite"):
        read_upload(io.BytesIO(header + samples.tobytes()), "file", 60, Event())


def test_audio_may_be_as_long_as_the_limit() -> None:
    pcm = io.BytesIO()
    with wave.open(pcm, "wb") as file:
        file.setparams((1, 2, 48000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 48000))
    assert len(read_upload(io.BytesIO(pcm.getvalue()), "file", 1.0, Event())) == SAMPLE_RATE
    with pytest.raises(AudioError, match="more than 0.5 s"):
        read_upload(io.BytesIO(pcm.getvalue()), "file", 0.5, Event())
