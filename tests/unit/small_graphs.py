"""Graphs that files of tests run alone, compiled together: a module takes as long as ten of them more."""

from functools import cache

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.engine.program import Artifact, Executable
from reference.fixtures import NANO


@cache
def small_graphs() -> dict[str, Executable]:
    """Returns them by name, with the weights of the trained fixture where they take some, those of its second layer."""
    programs = [
        *test_attention_kernels.attentions(),
        *test_device_rules.rules_and_beams(),
        *test_speculation.verifying_and_steps(),
    ]
    assert len({program.name for program in programs}) == len(programs)
    return Artifact("small graphs", programs, "cpu").init(load_checkpoint(NANO).tensors, text_layer=1)


# Which import this one; not within a test, or hypothesis takes theirs for nested in it.
from . import test_attention_kernels, test_device_rules, test_speculation  # noqa: E402
