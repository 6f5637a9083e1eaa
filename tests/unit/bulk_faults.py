"""What goes wrong in Ray's processes, each of which calls one of these as it starts."""

import resource
import time
from pathlib import Path
from typing import Any

GOOD = 2
"""Parts that are committed before anything goes wrong."""
TOO_SMALL = 8192


def committed(folder: str) -> int:
    return sum(not path.name.endswith(".pending.parquet") for path in Path(folder).glob("*.parquet"))


def stall_before_commit() -> None:
    """Has the third part wait for ever, once its rows are written and before its ids are committed."""
    from ray.data.checkpoint.checkpoint_writer import BatchBasedCheckpointWriter

    commit = BatchBasedCheckpointWriter.commit_checkpoint

    def stalling(self: Any, pending: Any) -> None:
        folder = Path(self.checkpoint_path_unwrapped)
        if committed(str(folder)) >= GOOD:
            (folder.parent / "stalled").touch()
            time.sleep(3600)
        commit(self, pending)

    BatchBasedCheckpointWriter.commit_checkpoint = stalling


def fill_the_disk() -> None:
    """Has the system cut off what is written of the third part, as a disk that is full does."""
    from ray.data._internal.datasource.parquet_datasink import ParquetDatasink

    write = ParquetDatasink.write

    def writing(self: Any, blocks: Any, ctx: Any) -> None:
        if committed(str(Path(self.path).parent / "checkpoint")) < GOOD:
            return write(self, blocks, ctx)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_SMALL, limits[1]))
        try:
            return write(self, blocks, ctx)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    ParquetDatasink.write = writing
