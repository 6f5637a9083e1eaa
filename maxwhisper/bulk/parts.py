"""What a job writes while it runs, in OUTPUT/parts, and what is made of it at the end.

Ray writes rows as files of a few dozen: first their ids, checkpoint/X.pending.parquet, then the rows, rows/X-0.parquet,
and then it renames the ids to checkpoint/X.parquet, which commits them. Only what is committed counts. After a run that
was killed there may be rows without ids, ids without rows, and ids twice: `mend` takes away what is not whole, before
Ray looks at it, `retry` takes away rows with errors that may pass, and `finish` takes each id once.
"""

import fcntl
import json
import logging
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import MaxWhisperError, OptionError
from .filesystems import appearing, filesystem_of, is_local
from .rows import ROW, for_json

log = logging.getLogger("maxwhisper")

PENDING = ".pending.parquet"
ENDING = ".parquet"
AT_A_TIME = 1024
"""Rows that are written together at the end."""
READERS = 16
"""Threads that look at files, since an object store takes its time for each."""


@dataclass
class Totals:
    """How many inputs have a row, how many of these an error, and one that may pass, and of those of this run, seconds
    of audio and model."""

    rows: int = 0
    errors: int = 0
    transient: int = 0
    audio: float = 0
    model: float = 0


class Parts:
    """The folder of a job's output."""

    def __init__(self, output: str):
        """Makes the folder, if it is not there; raises OptionError if that cannot be."""
        self.output = output
        self.system, self.folder = filesystem_of(output)
        self.rows, self.checkpoint = self.within("parts/rows"), self.within("parts/checkpoint")
        self.inputs = self.within("parts/inputs.parquet")
        with self.written():
            self.system.makedirs(self.rows, exist_ok=True)
            self.system.makedirs(self.checkpoint, exist_ok=True)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Raises OptionError if what is written here cannot be."""
        try:
            yield
        except MaxWhisperError:
            raise
        except Exception as error:  # what a store's package raises, as for want of credentials, has no common class
            reason = getattr(error, "strerror", None) or error
            raise OptionError(f"OUTPUT {self.output}: cannot be written to: {reason}") from error

    def within(self, name: str) -> str:
        return posixpath.join(self.folder, name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other commands out of the folder, no longer than this process lives; an object store has no locks.

        Raises OptionError where another one is writing there.
        """
        if not is_local(self.system):
            yield
            return
        with self.written():
            file = open(self.within("parts/lock"), "wb")  # noqa: SIM115
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OptionError(
                    f"OUTPUT {self.output}: another `maxwhisper bulk` is writing there: wait for its end, or give"
                    " another folder"
                ) from error
            except OSError as error:  # a file system without locks
                log.warning("warning: OUTPUT %s: cannot be locked: %s", self.output, error.strerror)
            yield

    def claim(self, settings: dict[str, Any]) -> None:
        """Notes what transcripts depend on; raises OptionError if the folder has transcripts of other settings."""
        path = self.within("parts/settings.json")
        if not (self.system.exists(path) and self.committed()):  # a model's name that was wrong binds nobody
            with self.written(), appearing(self.system, path) as [file]:
                file.write(json.dumps(settings, indent=1).encode())
            return
        try:
            earlier = dict(json.loads(self.system.cat_file(path)))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise OptionError(f"OUTPUT {self.output}: parts/settings.json cannot be read: {error}") from error
        current = json.loads(json.dumps(settings))
        for name in current:
            if name in earlier and earlier[name] != current[name]:  # an earlier version has fewer options
                raise OptionError(
                    f"OUTPUT {self.output}: was begun with --{name} {earlier[name]}, not {current[name]}: give"
                    " that, or another folder"
                )

    def write_inputs(self, paths: list[str]) -> None:
        """Writes the names of the files to transcribe, for Ray to read."""
        with self.written(), appearing(self.system, self.inputs) as [file]:
            pq.write_table(pa.table({"path": paths}), file)

    def names(self, folder: str) -> list[str]:
        self.system.invalidate_cache(folder)
        found = self.system.ls(folder, detail=False) if self.system.exists(folder) else []
        return sorted(name for path in found if (name := posixpath.basename(path)).endswith(ENDING))

    def committed(self) -> list[str]:
        """Returns the names of the parts whose ids are committed."""
        return [name.removesuffix(ENDING) for name in self.names(self.checkpoint) if not name.endswith(PENDING)]

    def mend(self) -> None:
        """Takes away every part that is not whole, so that its inputs are transcribed again; raises OptionError if that
        cannot be.

        Ray does so for parts that are pending. It leaves ids that are committed as well, as they are after a write that
        was done and tried again, and ids whose rows are gone or cut off: their inputs would have no row for ever.
        """
        pending = {name.removesuffix(PENDING) for name in self.names(self.checkpoint) if name.endswith(PENDING)}
        committed = self.committed()
        with ThreadPoolExecutor(READERS) as readers:
            whole = {
                part
                for part, is_whole in zip(committed, readers.map(self.is_whole, committed), strict=True)
                if is_whole
            }
        whole -= pending
        with self.written():
            for name in self.names(self.rows):
                if name.removesuffix(f"-0{ENDING}") not in whole:
                    self.system.rm_file(posixpath.join(self.rows, name))
            for name in self.names(self.checkpoint):  # after the rows: while these are there, so is what tells of them
                if name.endswith(PENDING) or name.removesuffix(ENDING) not in whole:
                    self.system.rm_file(posixpath.join(self.checkpoint, name))

    def retry(self) -> None:
        """Takes away the rows whose errors may pass, so that their inputs are read again; raises OptionError if that
        cannot be."""
        parts = self.committed()
        with ThreadPoolExecutor(READERS) as readers:
            flags = list(readers.map(self.transient, parts))
        with self.written():
            for part, transient in zip(parts, flags, strict=True):
                if any(transient):
                    self._keep(part, pa.array([not each for each in transient]))

    def transient(self, part: str) -> list[bool]:
        """Returns for each row of a part whether it has an error that may pass."""
        with self.system.open(self.rows_of(part), "rb") as file:
            table = pq.read_table(file, schema=ROW, columns=["transient"])  # which rows of earlier versions lack
        return [bool(each) for each in table["transient"].to_pylist()]

    def _keep(self, part: str, kept: pa.Array) -> None:
        """Leaves those rows of a part, and their ids. While they are written, the part is one without ids."""
        with self.system.open(self.rows_of(part), "rb") as file:
            rows = pq.read_table(file, schema=ROW).filter(kept)
        self.system.rm_file(self.ids_of(part))
        if not len(rows):
            self.system.rm_file(self.rows_of(part))
            return
        for path, table in ((self.rows_of(part), rows), (self.ids_of(part), rows.select(["id"]))):
            with appearing(self.system, path) as [file]:
                pq.write_table(table, file)

    def is_whole(self, part: str) -> bool:
        """Returns whether a part has the rows of its ids."""
        return self.number(self.ids_of(part)) == self.number(self.rows_of(part)) is not None

    def number(self, path: str) -> int | None:
        """Returns how many rows are in a file; None if it is not there, or not whole."""
        try:
            with self.system.open(path, "rb") as file:
                return int(pq.ParquetFile(file).metadata.num_rows)
        except (OSError, pa.ArrowException):
            return None

    def ids_of(self, part: str) -> str:
        return posixpath.join(self.checkpoint, part + ENDING)

    def rows_of(self, part: str) -> str:
        return posixpath.join(self.rows, f"{part}-0{ENDING}")

    def unique(self, earlier: set[str], totals: Totals) -> Iterator[pa.Table]:
        """Yields the committed rows, each id once, and counts them."""
        seen: set[str] = set()
        for part in self.committed():
            with self.system.open(self.rows_of(part), "rb") as file:
                table = pq.read_table(file, schema=ROW)
            fresh = []
            for each in table["id"].to_pylist():
                fresh.append(each not in seen)
                seen.add(each)
            table = table.filter(pa.array(fresh))
            totals.rows += len(table)
            totals.errors += len(table) - table["error"].null_count
            totals.transient += table["transient"].to_pylist().count(True)
            if part not in earlier:
                totals.audio += sum(filter(None, table["duration"].to_pylist()))
                totals.model += sum(filter(None, table["transcribe_seconds"].to_pylist()))
            yield table

    def finish(self, earlier: set[str], expected: set[str] | None) -> Totals:
        """Writes transcripts.parquet and transcripts.jsonl of all that is committed, and returns the totals.

        earlier: parts of runs before this one. expected: ids that must be there.
        Raises MaxWhisperError if one is missing, or the files cannot be written.
        """
        totals, missing = Totals(), set(expected or ())
        names = [self.within(name) for name in ("transcripts.parquet", "transcripts.jsonl")]
        with self.written(), appearing(self.system, *names) as [parquet, lines]:
            with pq.ParquetWriter(parquet, ROW, compression="zstd") as writer:
                for table in row_groups(self.unique(earlier, totals)):
                    writer.write_table(table)
                    missing.difference_update(table["id"].to_pylist())
                    for row in table.to_pylist():
                        lines.write(json.dumps(for_json(row), ensure_ascii=False).encode() + b"\n")
            if missing:
                raise MaxWhisperError(f"OUTPUT {self.output}: {len(missing)} inputs have no row: run the command again")
        return totals


def row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yields the same rows in tables that are large enough to be row groups."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= AT_A_TIME:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
