"""Audio as it comes, fed to a session, and what is done if it comes faster than it is decoded."""

import logging
from collections.abc import Callable
from time import monotonic

from whisper.audio import SAMPLE_RATE

from .session import Session
from .source import Source

log = logging.getLogger("maxwhisper")

LATEST = 30.0
"""Seconds by which audio is late at most when it is decoded: of what is later, the first part is not shown."""
AT_ONCE = 20 * SAMPLE_RATE
"""Samples that are decoded at once at most, where as many wait: later text comes in fewer, longer steps."""


def listen(
    session: Session, source: Source, show: Callable[[str, str], None], clock: Callable[[], float] = monotonic
) -> None:
    """Feeds the session until the source ends.

    show: is called with the settled and the tentative text, whenever more audio was heard. clock: gives seconds.
    """
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
            show(session.settled, session.tentative)
