"""What MAX 26.7 needs of the process that it runs in, and does to it: threads, forks, environment, and its end."""

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import max.nn  # noqa: F401 - for what it does to the environment to be undone here, before any child is started
from max import _core, mlir
from max._mlir_context import default_mlir_context, ensure_default_mlir_context

from ..errors import DeviceError
from .folders import cache_root, writable

log = logging.getLogger("maxwhisper")

COMPILER = threading.RLock()
"""Held by the thread that compiles, or looks for what is compiled: the next one finds it done."""
FORKED = threading.Event()
"""Whether this process was forked from one that had imported MAX, which starts threads: they are not in this one."""
os.register_at_fork(after_in_child=FORKED.set)
MISLEADING = ("MOJO_PYTHON_LIBRARY", "PYTHONEXECUTABLE", "PYTHONPATH")
"""What MAX changes in the C library's environment alone when `max.nn` is imported. Children that are given no
environment inherit it: they take the first Python in PATH for their own, and the folder they start in for a library."""


def restore_environment() -> None:
    """Undoes what MAX did to the environment of child processes: it is os.environ again."""
    for name in MISLEADING:
        if name in os.environ:
            os.putenv(name, os.environ[name])
        else:
            os.unsetenv(name)


restore_environment()


@contextmanager
def compiler() -> Iterator[None]:
    """Has the calling thread, whichever it is, do what compiles: no other does meanwhile, and it is in the MLIR context
    that MAX enters in the thread alone that imports it. Raises DeviceError as `refuse_after_fork` does."""
    refuse_after_fork()
    with COMPILER, ensure_default_mlir_context():
        yield


@atexit.register
def enter_context_that_max_leaves() -> None:
    """Prevents a complaint of MAX's at the end of a process, if another thread than the main one has imported it."""
    if mlir.Context.current is None:
        default_mlir_context().__enter__()


@cache
def wait_at_exit() -> None:
    """Has this process end a tenth of a second later: a thread of MAX's asks for Python's lock a while after it has
    compiled, and where Python is ending by then, the process is aborted instead."""
    atexit.register(time.sleep, 0.1)


def refuse_after_fork() -> None:
    """Raises DeviceError in a process forked from one that had imported MAX: what it asks of MAX would never return."""
    if FORKED.is_set():
        raise DeviceError(
            "this process was forked from one that had more of maxwhisper than `import maxwhisper`, and MAX's"
            " threads are not in it: load the model after the fork, or start processes with multiprocessing's 'spawn'"
        )


@cache
def find_place_for_max_cache() -> None:
    """Has MAX keep what it compiles in a temporary folder, with a warning, where it cannot in its own; it would say so
    in several lines, or, on a full disk, not compile at all."""
    folder = _core.engine.max_cache_dir()
    if folder is None:
        return
    if "MODULAR_MAX_CACHE_DIR" not in os.environ:
        folder = folder.parent  # where MAX keeps other things too
    has_been_said = writable(cache_root()) != cache_root()
    instead = writable(Path(folder), quiet=has_been_said)
    if instead != folder:
        os.environ["MODULAR_CACHE_DIR"] = str(instead)
        os.environ.pop("MODULAR_MAX_CACHE_DIR", None)


@contextmanager
def announced(message: str, slow: Callable[[], None] | None = None) -> Iterator[None]:
    """Logs `message` if the body is still running two seconds from now, when it calls `slow` too, and every thirty
    seconds from then on, with how long it has run."""
    start, done = time.perf_counter(), threading.Event()

    def report() -> None:
        if done.wait(2):
            return
        log.info("%s", message)
        if slow:
            slow()
        while not done.wait(30):
            log.info("%s (%.0f s so far)", message, time.perf_counter() - start)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
