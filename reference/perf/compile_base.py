"""python -m reference.perf.compile_base BASE TARGETS: compiles the graphs of the git revision BASE by its own code.

For `python -m reference.perf.gate BASE --base_artifacts build/artifacts-base/TARGET`, on a machine that has the target.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..commands import status
from ..models import FIXTURE
from .gate import GateError, Trees, checked_out


def compile_base(trees: Trees, targets: str, out: Path, size: str, dtype: str) -> None:
    """Has base's compile gate write into a folder by target. Raises GateError where that fails, or base has none."""
    command = [sys.executable, "-m", "pytest", "tests/parity", "--compile-only", targets]
    command += ["--artifacts", str(out), "--size", size, "--dtype", dtype]
    done = subprocess.run(command, cwd=trees.base, env={**os.environ, "PYTHONPATH": str(trees.base)})
    if done.returncode:
        raise GateError(
            f"base {trees.revision}: its graphs were not compiled: pytest ended with status {done.returncode}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reference.perf.compile_base", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("base", metavar="BASE", help="git revision")
    add("targets", metavar="TARGETS", help="as those of pytest --compile-only")
    add("--size", default=FIXTURE, help="as that of pytest (default: %(default)s)")
    add("--dtype", default="float32", help="as that of pytest (default: %(default)s)")
    add("--out", default="build/artifacts-base", help="the graphs go there, by target (default: %(default)s)")
    options = parser.parse_args(arguments)

    def compile_there() -> int:
        with checked_out(options.base) as trees:
            compile_base(trees, options.targets, Path(options.out).resolve(), options.size, options.dtype)
        return 0

    return status("compile-base", compile_there)


if __name__ == "__main__":
    sys.exit(main())
