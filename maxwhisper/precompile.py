"""Compiles units of a model for the CPU into a cache, for the process that starts this one with jobs as JSON:

python -m maxwhisper.precompile [--idle] JOB ...
"""

import json
import sys
from pathlib import Path

from max.dtype import DType
from max.graph import DeviceRef
from whisper.model import ModelDimensions

from .compiled import programs_of
from .engine.artifacts import Cache
from .engine.precompile import IDLE, Job, give_way
from .engine.program import Artifact
from .engine.session import Policy


def main() -> None:
    jobs = [argument for argument in sys.argv[1:] if argument != IDLE]
    if len(jobs) < len(sys.argv) - 1:
        give_way()
    for line in jobs:
        job = Job(**json.loads(line))
        dims, policy = ModelDimensions(**job.dims), Policy(DeviceRef.CPU(), DType[job.storage], DType[job.compute])
        load = Cache(Path(job.folder)).loader(job.unit, dims, policy)
        Artifact(job.unit, programs_of(job.unit, dims, policy), "cpu", load)
        print(line, flush=True)


if __name__ == "__main__":
    main()
