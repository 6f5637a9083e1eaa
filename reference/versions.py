"""Versions of packages, however they were installed."""

from functools import cache
from importlib import import_module, metadata

MODULES = {"openai-whisper": "whisper"}
"""What a package is imported as, where that is not its own name."""


@cache  # a judge asks for every comparison, and metadata is a file to parse
def version(package: str) -> str:
    """Returns a package's version by its metadata, or by its module's `__version__` where it was copied without any.

    Raises ImportError where neither tells.
    """
    try:
        found = metadata.version(package)
    except (metadata.PackageNotFoundError, KeyError):
        found = ""
    found = found or str(getattr(import_module(MODULES.get(package, package)), "__version__", ""))
    if found:
        return found
    raise ImportError(f"{package} has no metadata and no __version__")
