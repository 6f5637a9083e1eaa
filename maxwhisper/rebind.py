"""openai-whisper's own functions, over parts of ours."""

from collections.abc import Callable
from types import FunctionType
from typing import Any


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
