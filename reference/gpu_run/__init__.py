"""One run on a GPU machine, whose time is rare: steps in order of worth, each under a limit, then a table, an archive.

`scripts/gpu-runner.sh` starts it. What runs on that machine before anything is installed is of the standard library,
for any Python from 3.10: `__main__`, `steps`, `held`, `limits`, `findings`, `results`, `offline`. `bundle` makes what a
machine without network is given, and `kernels` is a step's own program.
"""
