"""What `maxwhisper live` does once its options are read: listen, show, and give the transcript."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import AudioError
from ..whisper import Whisper
from .hypotheses import prepare
from .listening import listen
from .policies import POLICIES
from .screen import Screen
from .session import Session
from .source import Source, microphone, standard_input

log = logging.getLogger("maxwhisper")


def live(model: Whisper, policy: str, from_pipe: bool, rate: int, screen: Screen, **options: Any) -> dict[str, Any]:
    """Listens until the audio ends or Ctrl-C is pressed, and returns the transcript of all of it.

    options: of `Whisper.transcribe`. Raises AudioError if nothing came, and what the source raises.
    """
    session = Session(model, POLICIES[policy], **options)
    prepare(model)
    with standard_input(rate) if from_pipe else microphone(rate) as source, ending(source):
        if not from_pipe:
            log.info("listening; Ctrl-C ends")
        listen(session, source, screen.show)
    if not session.seconds:
        raise AudioError("nothing came to listen to")
    log.info("transcribing %.0f s", session.seconds)
    result = session.finish()
    screen.show(session.settled, "")
    screen.close()
    return result


@contextmanager
def ending(source: Source) -> Iterator[None]:
    """Has Ctrl-C end the audio; a second one ends the program."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        source.stop()

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
