"""python -m reference.kernel_diff HEAD BASE: what a change makes of the code that is compiled for a GPU.

HEAD and BASE are folders of artifacts, as `make compile-gate` and `make compile-base` write them; no GPU is needed.
Every kernel is read out of them: what is added, gone or changed, in which graph; how many kernels a graph launches;
what multiplies in TF32, puts parts of attention together by MAX's reducer, or copies a cache; and which blocks
need time on a GPU. Kernels are the same if their code and constants are, whatever their names.

A difference is no failure. What cannot be read is one, by its name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from maxwhisper.compare.run import written
from maxwhisper.errors import MaxWhisperError

from .diff import compare
from .graphs import read


def main(arguments: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(prog="python -m reference.kernel_diff", description=description[0])
    parser.add_argument("head", metavar="HEAD", type=Path, help="folder of artifacts")
    parser.add_argument("base", metavar="BASE", type=Path, help="folder of artifacts to compare with")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the Markdown there too")
    options = parser.parse_args(arguments)
    try:
        report = compare(read(options.base), read(options.head)).markdown()
        print(report, end="", flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            written(options.output, lambda unfinished: unfinished.write_text(report, encoding="utf-8"))
    except (MaxWhisperError, OSError) as error:
        print(f"kernel-diff: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
