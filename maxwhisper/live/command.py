"""What `maxwhisper live` does once its options are read: listen, show, and give the transcript."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from whisper.audio import SAMPLE_RATE

from ..errors import AudioError
from ..whisper import Whisper
from .hypotheses import prepare
from .policies import POLICIES
from .screen import Screen
from .session import Session
from .source import Source, microphone, standard_input

log = logging.getLogger("maxwhisper")

LATEST = 30.0
"""Seconds by which audio is late at most when it is decoded: of what is later, the first part is not shown."""
AT_ONCE = 20 * SAMPLE_RATE
"""Samples that are decoded at once at most, where as many wait: later text comes in fewer, longer steps."""


def live(model: Whisper, policy: str, from_pipe: bool, rate: int, screen: Screen, **options: Any) -> dict[str, Any]:
    """Listens until the audio ends or Ctrl-C is pressed, and returns the transcript of all of it.

    options: of `Whisper.transcribe`. Raises AudioError if nothing came, and what the source raises.
    """
    session = Session(model, POLICIES[policy], **options)
    prepare(model)
    with standard_input(rate) if from_pipe else microphone(rate) as source, ending(source):
        if not from_pipe:
            log.info("listening; Ctrl-C ends")
        listen(session, source, screen)
    if not session.seconds:
        raise AudioError("nothing came to listen to")
    log.info("transcribing %.0f s", session.seconds)
    result = session.finish()
    screen.show(session.settled, "")
    screen.close()
    return result


def listen(session: Session, source: Source, screen: Screen, clock: Callable[[], float] = monotonic) -> None:
    """Feeds the session until the source ends. clock: gives seconds."""
    begun: float | None = None
    while not source.ended:
        samples = source.take()
        begun = clock() if begun is None else begun
        # What is read from a file comes faster than it was said, and is not late.
        late = min(len(samples) / SAMPLE_RATE, clock() - begun - session.seconds)
        if late > LATEST:
            start = session.seconds
            session.skip(samples[:-AT_ONCE])
            samples = samples[-AT_ONCE:]
            missing = f"the text from {start:.0f} to {session.seconds:.0f} s is only in the transcript"
            log.warning("warning: this machine is too slow: %s", missing)
        for at in range(0, len(samples), AT_ONCE):
            session.feed(samples[at : at + AT_ONCE])
            screen.show(session.settled, session.tentative)


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
