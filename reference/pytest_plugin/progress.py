"""What is being compiled, as it is."""

import logging
from contextlib import nullcontext
from typing import Any

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    logging.getLogger("maxwhisper").setLevel(logging.INFO)
    if plugins.has_plugin("terminalreporter") and session.config.option.verbose >= 0:
        logging.getLogger("maxwhisper").addHandler(progress := Progress(plugins))
        # Or it would write to the terminal of a run inside a test, which is closed by then.
        session.config.add_cleanup(lambda: logging.getLogger("maxwhisper").removeHandler(progress))


def pytest_collection_finish() -> None:
    """Has PyTorch's loggers hand on to the root logger what they are given. To each logger that does not, of which
    PyTorch has some fifty, pytest attaches a handler three times a test."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            logger.propagate = True


class Progress(logging.Handler):
    """Shows what is being compiled, and for how long, which pytest would keep to itself."""

    def __init__(self, plugins: pytest.PytestPluginManager):
        super().__init__(logging.INFO)
        self.reporter: Any = plugins.get_plugin("terminalreporter")
        capture = plugins.get_plugin("capturemanager")
        self.uncaptured = capture.global_and_fixture_disabled if capture else nullcontext

    def emit(self, record: logging.LogRecord) -> None:
        with self.uncaptured():  # a test runs, and its output is kept
            self.reporter.ensure_newline()
            self.reporter.write_line(record.getMessage(), flush=True)
