"""Graphs that are executed again and again on the same memory: on a GPU captured once, and then replayed."""

import logging
from collections.abc import Mapping, Sequence
from weakref import finalize

from max.driver import Buffer

from .process import refuse_after_fork
from .program import Executable

log = logging.getLogger("maxwhisper")


class Repeated:
    """A graph, and the buffers that it reads and writes at every execution.

    A GPU's graph is captured: a replay launches all its kernels at once, with nothing for Python or MAX to do between
    them. For that nothing it takes may be on the CPU, and what it finds it has to leave in its inputs.
    """

    def __init__(self, graph: Executable, named: Mapping[str, Buffer]):
        """Executes the graph, so that libraries have what they need, and captures it if all inputs are on a GPU.

        Where MAX cannot capture it, it says so in the log, and the graph is executed each time.
        """
        self.graph = graph
        self.inputs: list[Buffer] = graph.in_order(named)
        self.captured = False
        self.execute()
        if on_gpu(self.inputs):
            self._capture()

    def __call__(self) -> None:
        """Executes the graph; a GPU may go on afterwards. Raises DeviceError in a forked process."""
        if self.captured:
            refuse_after_fork()
            with self.graph.session.launching:
                self.graph.model.replay(id(self), *self.inputs)
        else:
            self.execute()

    def execute(self) -> None:
        """Executes the graph kernel by kernel, whether it is captured or not."""
        self.graph.execute(*self.inputs)

    def verify(self) -> None:
        """Executes a captured graph, and raises RuntimeError if that launches other kernels than were captured, or none
        were."""
        if not self.captured:
            raise RuntimeError(f"{self.graph.name} is not captured")
        with self.graph.session.launching:
            self.graph.model.debug_verify_replay(id(self), *self.inputs)

    def _capture(self) -> None:
        model = self.graph.model
        try:
            with self.graph.session.launching:
                self.outputs = model.capture(id(self), *self.inputs)  # which a replay writes into
        except (RuntimeError, ValueError) as error:
            log.warning("%s is not captured, and its kernels are launched one by one: %s", self.graph.name, error)
            return
        self.captured = True
        finalize(self, model.release_captured_graph, id(self)).atexit = False


def on_gpu(buffers: Sequence[Buffer]) -> bool:
    """Tells whether all are in the memory of a GPU."""
    return not any(each.device.is_host for each in buffers)
