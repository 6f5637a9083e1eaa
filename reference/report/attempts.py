"""Parts of a page that may fail, and leave the others standing."""

from collections.abc import Callable
from typing import Any, ParamSpec

from ..reasons import one_line
from .markup import Html, element

P = ParamSpec("P")


class Attempts:
    """Parts of a page that may fail. failed: of each that could not be made, its name and why, in one line."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, what: str, make: Callable[P, Html], *args: P.args, **kwargs: P.kwargs) -> Html:
        """Returns what `make` makes of the arguments, or a paragraph that says why there is no `what`."""
        try:
            return make(*args, **kwargs)
        except Exception as error:
            line = f"no {what}: {one_line(error)}"
            if line not in self.failed:
                self.failed.append(line)
            return element("p", line, class_="bad")

    def chart(self, draw: Callable[[Any], Html]) -> Html:
        """Returns what `draw` makes of the module of charts; without matplotlib, which that needs, there is a page all
        the same."""

        def drawn() -> Html:
            from . import charts

            return draw(charts)

        return self("charts", drawn)
