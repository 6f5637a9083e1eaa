"""openai-whisper's own functions, over parts of ours."""

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

Segments = list[dict[str, Any]]


def rebind(function: FunctionType, **names: Any) -> Callable[..., Any]:
    """Returns a copy of `function` that reads `names` where the original reads the globals of its module.

    So the library's own code runs over MAX, and the library itself stays as it is for everyone else.
    """
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def enumerate_and_tell(
    tell: Callable[[Segments], None], segments: Segments, start: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stands in for `enumerate` in openai-whisper's `transcribe`: only of a window's final segments does that say where
    the numbers start, and nowhere else does it show them before the end."""
    if start is not None:
        tell(segments)
    return enumerate(segments, start or 0)
