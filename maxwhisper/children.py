"""What processes of Python need that this one starts."""

import os
import sys
from pathlib import Path


def python_path() -> str:
    """Returns the PYTHONPATH with which another process finds the modules of this one, and with -P no file of the
    folder that it is in: but for this package, should that be where it was found."""
    entries = [entry for entry in sys.path if isinstance(entry, str) and entry]  # import passes over others
    return os.pathsep.join([*entries, str(Path(__file__).parents[1])])
