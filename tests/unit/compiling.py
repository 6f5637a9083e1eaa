"""What must not be compiled again."""

from collections.abc import Iterator
from contextlib import contextmanager

from reference.compile_log import CompileRecord, compilations


@contextmanager
def nothing_compiles() -> Iterator[None]:
    """Fails where this process compiles anything meanwhile."""
    compiled: list[CompileRecord] = []
    with compilations(compiled.append):
        yield
    assert not compiled
