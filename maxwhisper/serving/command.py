"""The command `maxwhisper serve`, behind its options."""

import gc
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from whisper.audio import SAMPLE_RATE

from ..alignment import keep_alignment_compiled
from ..errors import OptionError
from ..whisper import Whisper
from .app import Service, create_app
from .handshake import Handshake
from .jobs import Limits


def serve(
    load: Callable[[], Whisper],
    name: str,
    host: str,
    port: int,
    api_key_file: str | None,
    stop_timeout: int,
    race: str | None = None,
    **limits: Any,
) -> int:
    """Serves until SIGTERM or Ctrl-C, then ends what runs within `stop_timeout` seconds; returns 0.

    load: gives the model. name: its name, for clients. race: a page to show beside. limits: of `Limits`.
    Raises OptionError for an address that cannot be listened at, or a file of keys that cannot be used.
    """
    keys = keys_in(api_key_file) if api_key_file else []
    with bound(host, port) as address:
        model = load()
        compile_all(model)
        gc.collect()
        # Two ways in which decoding would keep the event loop waiting: full collections that look at all that the
        # libraries have, and Python's lock, which a thread gives away after 5 ms unless told otherwise.
        gc.freeze()
        sys.setswitchinterval(0.001)
        app = create_app(Service(model, name, Limits(**limits)), keys, race)
        config = uvicorn.Config(
            app,
            ws=Handshake,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=stop_timeout,
        )
        signal.signal(signal.SIGTERM, ended)  # uvicorn, done, passes the signal on
        Server(config, name, address).run(sockets=[address])
    return 0


class Server(uvicorn.Server):
    """Says where it is, once it can be asked."""

    def __init__(self, config: uvicorn.Config, name: str, address: socket.socket):
        super().__init__(config)
        self.name, self.address = name, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.address.getsockname()[:2]
        print(f"{self.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)


def ended(*_: object) -> None:
    raise SystemExit(0)


def keys_in(file: str) -> list[str]:
    """Returns the keys in a file, one a line; raises OptionError if there are none."""
    try:
        keys = Path(file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--api_key_file {file}: cannot be read: {error}") from error
    if not keys:
        raise OptionError(f"--api_key_file {file}: holds no key: expected one a line")
    return keys


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket of this address, at which nothing listens yet; raises OptionError if there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)  # of none asyncio would leave TCP's delay on: 40 ms an answer
        with ExitStack() as failed:
            failed.enter_context(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            failed.pop_all()
    except (OSError, UnicodeError) as error:  # UnicodeError: what is no name of a host
        raise OptionError(f"--host {host} --port {port}: cannot be listened at: {error}") from error
    return made


def compile_all(model: Whisper) -> None:
    """Compiles what a request may need, so that none waits for it."""
    model.transcribe(np.zeros(SAMPLE_RATE, np.float32))
    model.network["decoder.alignment"]
    keep_alignment_compiled()
