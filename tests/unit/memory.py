"""What a suite remembers its verdicts in."""

from typing import Any


class Remembering(dict[str, Any]):
    """A memory of one test's, as pytest's cache is one of all."""

    def set(self, key: str, value: object) -> None:
        self[key] = value
