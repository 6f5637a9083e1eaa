"""Where files are kept that can be made again."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """`$XDG_CACHE_HOME/maxwhisper/<kind>`, or the same under `~/.cache`."""
    return Path(os.getenv("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxwhisper" / kind
