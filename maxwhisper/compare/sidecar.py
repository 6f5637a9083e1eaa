"""Where the text of a recording lies beside it."""

import os


def text_beside(audio: str) -> str:
    """Returns the name of the file that holds what is said in a recording, unless another is given."""
    return os.path.splitext(audio)[0] + ".txt"  # pathlib refuses names as "." for it
