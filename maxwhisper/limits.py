"""Which numbers options may be, for modules that are imported before PyTorch and MAX, which take seconds."""

from collections.abc import Sequence

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures above 0: what logits divided by much less, or by much more, come to is no float32 any more."""
MANY_TEXTS, MOST_TEXTS = 32, 1000
"""Beams, or texts that are drawn, of one window: more than those that anybody publishes results of, at which the cost
is told; and more than anybody can wait for, as openai-whisper's loop compares every beam's likeliest tokens, as many
as there are beams."""


def backwards(clips: Sequence[float]) -> str | None:
    """Says which of the clips, start, end, start, end, ... in seconds, ends before it starts, if one does."""
    for start, end in zip(clips[::2], clips[1::2], strict=False):
        if end < start:
            return f"has an end at {end} s, before its start at {start} s"
    return None
