"""reference/perf/worker.py where nothing is timed: its decode loops are of a few tokens, by graphs that are kept, as
`load_model` has them."""

from typing import Any

import maxwhisper.whisper
from maxwhisper.engine.artifacts import Cache
from maxwhisper.engine.folders import cache_folder
from maxwhisper.whisper import Whisper
from reference.perf import worker


def kept(checkpoint: Any, device: str, artifacts: Any) -> Whisper:
    return Whisper(checkpoint, device, artifacts or Cache(cache_folder("artifacts")))


if __name__ == "__main__":
    worker.N_TOKEN = 4
    maxwhisper.whisper.Whisper = kept  # type: ignore[misc, assignment]
    worker.main()
