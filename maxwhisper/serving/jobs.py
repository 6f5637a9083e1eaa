"""The threads that transcribe, one for each request, and what the event loop awaits of them."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from ..audio import SAMPLE_RATE, read_upload
from ..callers import Caller, Scheduler
from ..errors import MaxWhisperError
from ..rebind import Segments
from .errors import APIError, full, too_slow

log = logging.getLogger("maxwhisper")


@dataclass(frozen=True)
class Limits:
    """What one server does at most.

    batch_size: windows that decode together. max_requests: those being received or transcribed. max_file_mb: of 10^6
    bytes. timeout: seconds from a request's first byte to its answer's last.
    """

    batch_size: int
    max_requests: int
    max_file_mb: int
    max_audio_minutes: int
    timeout: float


@dataclass(frozen=True)
class Transcript:
    """What `Whisper.transcribe` returns of `seconds` of audio."""

    result: dict[str, Any]
    seconds: float


Found = Segments | Transcript | APIError


class Jobs:
    """All requests that are being received or transcribed."""

    def __init__(self, scheduler: Scheduler, limits: Limits, count: Callable[[float], None]):
        """Takes `count`, which is called with the seconds of audio that were transcribed."""
        self.scheduler, self.limits, self.count = scheduler, limits, count
        self.threads = ThreadPoolExecutor(limits.max_requests, "maxwhisper-request")
        self.running: set[Job] = set()

    def new(self) -> "Job":
        """Returns the job of a request that has come; raises APIError where there are as many as there may be."""
        if len(self.running) >= self.limits.max_requests:
            raise full(self.limits.max_requests)
        job = Job(self)
        self.running.add(job)
        return job

    def close(self) -> None:
        """Ends all jobs, and waits for their threads."""
        for job in list(self.running):
            job.stop()
        self.threads.shutdown()
        self.scheduler.close()


class Job:
    """A request's place among those that are served: from when it comes until its thread ends, if it gets to one."""

    def __init__(self, jobs: Jobs):
        self.jobs = jobs
        self.caller = Caller(jobs.scheduler)
        self.loop = asyncio.get_running_loop()
        self.deadline = self.loop.time() + jobs.limits.timeout
        self.found: asyncio.Queue[Found] = asyncio.Queue()
        self.started = False

    def start(self, file: IO[bytes], options: dict[str, Any], in_pieces: bool) -> None:
        """Transcribes a file, which it closes. in_pieces: tell the segments of each window as they are there."""
        self.started = True
        self.jobs.threads.submit(self._work, file, options, in_pieces)

    async def next(self) -> Segments | Transcript:
        """Returns what is there next, a transcript at last; raises APIError if there will be none, or not in time."""
        try:
            async with asyncio.timeout_at(self.deadline):
                found = await self.found.get()
        except TimeoutError as error:
            raise too_slow(self.jobs.limits.timeout) from error
        if isinstance(found, APIError):
            raise found
        return found

    def stop(self) -> None:
        """Gives the place away, as soon as the thread has come to its next few tokens."""
        self.caller.stop()
        if not self.started:
            self._leave()

    def _leave(self) -> None:
        self.jobs.running.discard(self)

    def _work(self, file: IO[bytes], options: dict[str, Any], in_pieces: bool) -> None:
        try:
            with file:
                waveform = read_upload(file, "file", 60 * self.jobs.limits.max_audio_minutes, self.caller.stopped)
            tell = {"on_segments": self._tell} if in_pieces else {}
            result = self.caller.transcribe(waveform, **tell, **options)
            seconds = len(waveform) / SAMPLE_RATE
            self.jobs.count(seconds)
            self._tell(Transcript(result, seconds))
        except Exception as error:
            if not self.caller.stopped.is_set():
                self._tell(api_error(error))
        finally:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self.loop.call_soon_threadsafe(self._leave)

    def _tell(self, found: Found) -> None:
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.found.put_nowait, found)


OF_OPENAI = {
    "file": "file",
    "audio": "file",
    "initial_prompt": "prompt",
    "language": "language",
    "temperature": "temperature",
}
"""Fields of OpenAI's interface by what our own errors begin with."""


def api_error(error: Exception) -> APIError:
    """Returns what a client is told of an error. One that the same request would meet again is no failure of ours."""
    if not isinstance(error, MaxWhisperError):
        log.error("a transcription failed", exc_info=error)
        return APIError(500, "the server failed; its log says why")
    param = next((name for ours, name in OF_OPENAI.items() if str(error).startswith(ours)), None)
    return APIError(400, str(error).removeprefix("initial_"), param, "invalid_value")
