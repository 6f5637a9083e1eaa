"""Servers to ask: the command in a process of its own, and the application in a thread, with any model."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import uvicorn

from maxwhisper.serving.app import create_app
from maxwhisper.serving.handshake import Handshake
from maxwhisper.serving.jobs import Limits
from maxwhisper.serving.service import Service
from reference.fixtures import NANO
from reference.perf.serve import Server

KEY = "the-key-of-a-test"
LIMITS: dict[str, Any] = {
    "batch_size": 2,
    "max_requests": 8,
    "max_file_mb": 4,
    "max_audio_minutes": 3,
    "timeout": 30,
}


def client_of(url: str, **options: Any) -> openai.OpenAI:
    """Returns OpenAI's client, without the certificates, which nothing here has and which take 20 ms to read."""
    plain = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(**{"base_url": url, "api_key": "none", "max_retries": 0, "http_client": plain, **options})


@dataclass
class Process:
    """A server that was started as users start it."""

    popen: subprocess.Popen[str]
    url: str
    temporary: Path

    def client(self, **options: Any) -> openai.OpenAI:
        return client_of(self.url, **{"api_key": KEY, **options})

    @property
    def server(self) -> Server:
        return Server(self.url.removesuffix("/v1"), KEY)

    def running(self) -> float:
        return self.server.running()


@contextmanager
def started(folder: Path, *options: str) -> Iterator[Process]:
    """Starts `maxwhisper serve` with the trained fixture, and kills what is left of it."""
    keys, temporary = folder / "keys", folder / "temporary"
    keys.write_text(f"another-key\n{KEY}\n")
    temporary.mkdir()
    command = [sys.executable, "-m", "maxwhisper", "serve", "--model", str(NANO), "--port", "0"]
    # What finds words is Python here: numba takes a second to load what it compiled.
    environment = {**os.environ, "TMPDIR": str(temporary), "NUMBA_DISABLE_JIT": "1"}
    with subprocess.Popen(
        [*command, "--api_key_file", str(keys), *options], stdout=subprocess.PIPE, text=True, env=environment
    ) as popen:
        try:
            assert popen.stdout
            name, _, url = popen.stdout.readline().split()
            assert name == "nano"
            yield Process(popen, url, temporary)
        finally:
            popen.kill()


def stop(process: Process) -> int:
    """Ends a server as a supervisor does, and returns its exit status."""
    process.popen.send_signal(signal.SIGTERM)
    return process.popen.wait(30)


@contextmanager
def in_thread(
    model: Any, name: str = "stub", keys: Sequence[str] = (), race: str | None = None, **limits: Any
) -> Iterator[tuple[str, Service]]:
    """Serves a model in this process, and gives the address; at the end, what runs has a second."""
    service = Service(model, name, Limits(**LIMITS | limits))
    app, quiet = create_app(service, keys, race), {"log_level": "critical", "timeout_graceful_shutdown": 1}
    config = uvicorn.Config(app, port=0, ws=Handshake, **quiet)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}", service
    finally:
        server.should_exit = True
        thread.join()
