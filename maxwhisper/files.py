"""Files and folders that are whole or not there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST, EINVAL, ENOTEMPTY
from pathlib import Path


@contextmanager
def replacing(path: Path, or_keeping: bool = False) -> Iterator[Path]:
    """Gives a place for a file or a folder of the same name, which takes that of `path`, or of what a link there leads
    to, when it is complete: a file in one step, a folder just after an earlier one has gone. or_keeping: a folder that
    is there by then stays instead.

    Where the block raises, what was under `path` stays as it was. Raises OSError if nothing can be written there.
    """
    try:
        name, path = path.name, path.resolve()
    except ValueError as error:  # of a name with a zero byte
        raise OSError(EINVAL, str(error)) from error
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:32]}-", dir=path.parent) as folder:
        unfinished = Path(folder, name)
        yield unfinished
        if unfinished.is_dir() and path.exists() and not or_keeping:
            path.rename(Path(folder, f"{path.name}.earlier"))
        try:
            unfinished.replace(path)
        except OSError as error:
            if not (or_keeping and error.errno in (ENOTEMPTY, EEXIST)):
                raise
