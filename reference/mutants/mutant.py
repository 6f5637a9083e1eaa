"""What a mutant is, and the components that they are counted by."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

from maxwhisper.engine.instructions import cpu_features

COMPONENTS: tuple[tuple[str, str, str], ...] = (
    (
        "select_tokens and draft kernels",
        "steps",
        "kernels/select_tokens.mojo kernels/draft.mojo kernels/loop.mojo kernels/quantized.mojo",
    ),
    (
        "a GPU's steps",
        "a GPU's steps",
        "kernels/device_beams.mojo kernels/device_rating.mojo kernels/device_select.mojo kernels/step_product.mojo"
        " decoding/gpu.py decoding/mirror.py",
    ),
    ("kernels", "blocks", "kernels/*.mojo"),
    ("network", "blocks", "network/*.py"),
    (
        "decoding",
        "steps",
        "decoding/cpu.py decoding/speculative.py decoding/rules.py decoding/cache.py decoding/stepper.py",
    ),
    ("transcripts", "transcript", "decoding/openai_loop.py decoding/module_cache.py alignment.py whisper.py frozen.py"),
    ("loaders", "loading", "checkpoint/*.py audio.py"),
)
"""By component: its name, which tests are its right ones, and its files; the first that matches counts.

Not here: what only a GPU executes, batches of recordings (tests/unit/test_scheduling.py has them), the command, and
what compiles and keeps graphs.
"""

NOT_MUTATED = (
    "kernels/__init__.mojo",
    "kernels/device_attention.mojo",
    "kernels/product.mojo",
    "kernels/split_attention.mojo",
    "kernels/store.mojo",
    "network/backends.py",
)
"""Files of components above that only a GPU executes."""

WITH_AMX = ("kernels/amx.mojo", "kernels/amx_attention.mojo")
"""Files that only a CPU with AMX executes."""

OWN_BLOCKS = {
    "kernels/amx.mojo": "encoder.mlp",
    "kernels/amx_attention.mojo": "encoder.attention",
    "kernels/attention.mojo": "decoder.attention.cached or decoder.cross_attention.step",
    "kernels/convolution.mojo": "encoder.stem",
    "kernels/decoder_block.mojo": "decoder.block.step",
    "kernels/gelu.mojo": "decoder.block.step",
    "kernels/layer_norm.mojo": "decoder.block.step",
    "kernels/linear.mojo": "decoder.mlp.step",
    "kernels/pointers.mojo": "decoder.mlp.step",
    "kernels/softmax.mojo": "encoder.attention or decoder.attention.cached",
    "kernels/team.mojo": "decoder.block.step",
    "kernels/tiled_attention.mojo": "encoder.attention",
    "kernels/tiles.mojo": "encoder.mlp",
}
"""By kernel the words for pytest's -k that find the smallest blocks that use it."""

RIGHT_TESTS = {
    "blocks": "tests/parity/test_isolated.py",
    "steps": "tests/parity/test_steps.py",
    "transcript": "tests/parity/test_transcript.py",
    "loading": "tests/parity/test_loading.py",
    "a GPU's steps": "tests/unit/test_on_device.py",
}

UNIT_TESTS: tuple[tuple[str, str], ...] = (
    ("kernels/draft.mojo kernels/quantized.mojo decoding/speculative.py", "speculation decoding_host text_decoder"),
    (
        "kernels/select_tokens.mojo kernels/loop.mojo decoding/rules.py",
        "decoding decoding_host text_decoder speculation",
    ),
    ("decoding/cpu.py decoding/cache.py decoding/stepper.py", "decoding_host text_decoder speculation scheduling"),
    ("kernels/step_product.mojo", "kernels on_device"),
    ("kernels/device_*.mojo decoding/gpu.py decoding/mirror.py", "device_rules on_device"),
    ("decoding/openai_loop.py", "decoding_host text_decoder whisper openai_object decoding on_device"),
    ("decoding/*.py frozen.py", "decoding_host text_decoder whisper openai_object decoding"),
    ("kernels/*attention.mojo kernels/softmax.mojo", "attention_kernels"),
    ("kernels/decoder_block.mojo kernels/team.mojo", "speculation text_decoder"),
    ("kernels/*.mojo", "kernels attention_kernels"),
    ("network/*.py", "gelu gpu_graphs wrapped on_device"),
    ("alignment.py", "alignment_heads text_decoder whisper"),
    ("whisper.py", "whisper openai_object transcribe_options speech"),
    (
        "checkpoint/*.py",
        "checkpoint checkpoint_named checkpoint_refused checkpoints_in_transformers loaders"
        " alignment_heads vocabulary wrapped",
    ),
    ("audio.py", "audio timeline pipes inputs"),
)
"""By the first pattern of files that a mutant's matches, the unit tests of what they hold: tests/unit/test_*.py."""


@dataclass(frozen=True)
class Mutant:
    """A fault at one place.

    number: of the switch. file: below maxwhisper/. operator: what was done. before, after: the code there.
    """

    number: int
    file: str
    line: int
    operator: str
    before: str
    after: str

    @property
    def component(self) -> str:
        return component_of(self.file)[0]

    @property
    def right(self) -> str:
        """Returns which tests name the component: a key of RIGHT_TESTS."""
        return component_of(self.file)[1]

    @property
    def right_file(self) -> str:
        """Returns the file of the tests that name the component."""
        return RIGHT_TESTS[self.right]

    @property
    def in_kernel(self) -> bool:
        """Tells whether it is compiled, and so tried without a switch and without others."""
        return self.file.endswith(".mojo")

    @property
    def unit_tests(self) -> list[str]:
        """Returns the files of unit tests that hold its file to what it promises."""
        names = next(names for files, names in UNIT_TESTS if any(fnmatch(self.file, each) for each in files.split()))
        return [f"tests/unit/test_{name}.py" for name in names.split()]

    def __str__(self) -> str:
        return f"{self.number} {self.file}:{self.line} {self.operator}: {self.before} -> {self.after}"


Choose = Callable[[str, int, str, str, str], int | None]
"""From file, line, operator, before and after to the number of a mutant that is wanted there."""


def is_executed(file: str) -> bool:
    """Tells whether tests on this machine can reach a file of the components."""
    return file not in NOT_MUTATED and (file not in WITH_AMX or "amx_bf16" in cpu_features())


def component_of(file: str) -> tuple[str, str]:
    """Returns the component of a file below maxwhisper/ and its right tests; raises LookupError if it has none."""
    for name, right, patterns in COMPONENTS:
        if any(fnmatch(file, pattern) for pattern in patterns.split()) and is_executed(file):
            return name, right
    raise LookupError(f"{file} is of no component that is mutated")


def next_digit(literal: str) -> str | None:
    """Returns a number with its last digit one higher, 9 becoming 8; None for what has no such digit."""
    mantissa, exponent = (literal.lower().split("e") + [""])[:2]
    if not mantissa[-1:].isdigit() or mantissa.startswith("0x"):
        return None
    digit = int(mantissa[-1])
    last = str(digit - 1 if digit == 9 else digit + 1)
    return mantissa[:-1] + last + (f"e{exponent}" if exponent else "")
