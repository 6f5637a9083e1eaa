"""What this process compiles, as `maxwhisper.engine.program` logs it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class CompileRecord:
    """One compilation: the artifact's name, how many graphs it holds, and how long it took, cache hits included."""

    name: str
    graphs: int
    seconds: float


class Listener(logging.Handler):
    """Hands every compilation that is logged to `keep`."""

    def __init__(self, keep: Callable[[CompileRecord], object]):
        super().__init__()
        self.keep = keep

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.keep(CompileRecord(*record.args))  # type: ignore[arg-type]


@contextmanager
def compilations(keep: Callable[[CompileRecord], object]) -> Iterator[None]:
    """Has `keep` called for every compilation of this process meanwhile, by whichever thread."""
    logger = logging.getLogger("maxwhisper.compiled")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # or what a test's log holds would depend on who listens
    logger.addHandler(listener := Listener(keep))
    try:
        yield
    finally:
        logger.removeHandler(listener)
