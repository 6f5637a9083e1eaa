"""Loads the suite's plugin, reference/pytest_plugin, once is set what PyTorch reads as it is imported."""

import sys

from reference.older_cpu import as_on, asked_for
from reference.quiet import keep_quiet, keep_to_share, times_nothing

if times_nothing(sys.argv[1:]):  # what is timed is PyTorch as its users have it
    keep_quiet()
keep_to_share()
as_on(asked_for())

pytest_plugins = ["reference.pytest_plugin"]
