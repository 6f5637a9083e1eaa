"""Which blocks a word after -k selects: everybody's names of a thing find it, and what finds none fails."""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from whisper.model import ModelDimensions, Whisper

from maxwhisper.network.blocks import BLOCKS
from reference.fixtures import NANO, ROOT
from reference.judge import Comparison, Judgement
from reference.models import CHECKPOINT, FIXTURE
from reference.precompile import TRANSCRIBING
from reference.pytest_plugin.parameters import identify
from reference.pytest_plugin.selection import (
    block_of,
    compares,
    jobs_of_others,
    left_out,
    of_parity,
    parameters,
)
from reference.pytest_plugin.words import all_words, finds, words_of
from tests.parity.test_isolated import message

PARITY, PERF = ROOT / "tests" / "parity", ROOT / "tests" / "perf"

pytest_plugins = ["pytester"]

STEM, NORM, ENCODER_ATTENTION = {"encoder.stem"}, {"encoder.layer_norm"}, {"encoder.attention"}
CAUSAL, CACHED = {"decoder.attention.causal"}, {"decoder.attention.cached"}
KEYS_VALUES = {"decoder.cross_attention.keys_values"}
CROSS_ATTENTION = {"decoder.cross_attention.prefill", "decoder.cross_attention.step"}
CROSS, SELF = KEYS_VALUES | CROSS_ATTENTION, ENCODER_ATTENTION | CAUSAL | CACHED
MLP = {"encoder.mlp", "decoder.mlp.prefill", "decoder.mlp.step"}
TEXT_BLOCKS = {"decoder.block.prefill", "decoder.block.step"}
BLOCK = {"encoder.block"} | TEXT_BLOCKS
LOGITS = {"decoder.logits.prefill", "decoder.logits.step"}
ENCODER = STEM | NORM | ENCODER_ATTENTION | {"encoder.mlp", "encoder.block", "encoder"}
DECODER = {name for name in BLOCKS if name.startswith("decoder")}
CACHE = CACHED | {"decoder.block.step", "decoder.step"}

SELECTS: dict[str, set[str]] = {
    "log_mel or mel": {"log_mel"},
    "spectrogram": {"log_mel"},
    "conv": STEM,
    "conv1 or Conv1d": STEM,
    "stem": STEM,
    "gelu": STEM | MLP,
    "positional": STEM | {"decoder.embedding"},
    "encoder.positional_embedding": STEM,
    "embedding": {"decoder.embedding"},
    "token_embedding": {"decoder.embedding"} | LOGITS,
    "LayerNorm": NORM,
    "layer_norm": NORM,
    "layer-norm": NORM,
    "ln": NORM | LOGITS,
    "decoder.ln": LOGITS,
    "attn_ln": NORM | TEXT_BLOCKS,
    "mlp_ln": BLOCK,
    "ln_post": {"encoder"},
    "attention": SELF | CROSS,
    "attn": SELF | CROSS,
    "MultiHeadAttention": SELF | CROSS,
    "self": SELF,
    "self_attention": SELF,
    "self-attention": SELF,
    "cross": CROSS,
    "cross_attn": CROSS,
    "attention and not cross": SELF,
    "query": SELF | CROSS_ATTENTION,
    "softmax": SELF | CROSS_ATTENTION,
    "causal": CAUSAL,
    "kv": CACHE | KEYS_VALUES | {"decoder.keys_values"},
    "kv_cache": CACHE,
    "cache": CACHE,
    "mlp": MLP,
    "ffn and not decoder": {"encoder.mlp"},
    "block": BLOCK,
    "ResidualAttentionBlock": BLOCK,
    "block and not decoder": {"encoder.block"},
    "encoder": ENCODER,
    "encoder and not block": ENCODER - BLOCK,
    "AudioEncoder": {"encoder"},
    "decoder": DECODER,
    "logits": LOGITS,
    "prefill": {name for name in BLOCKS if name.endswith("prefill")},
    "step": {name for name in BLOCKS if name.endswith("step")},
    "alignment": {"decoder.alignment"},
    "timestamps": {"decoder.alignment"},
    "network": {"encoder", "decoder.keys_values", "decoder.prefill", "decoder.start", "decoder.step"}
    | {"decoder.alignment"},
    "transcript or no_such_block": set(),
}


class Collected:
    """Keeps what a run inside this process has collected before -k chooses from it."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items, self.config = list(session.items), session.config

    def selected(self, expression: str) -> list[pytest.Item]:
        """Returns the tests that are left by pytest and by the suite's plugin with -k."""
        items = list(self.items)
        for item in items:
            item.extra_keyword_matches.clear()
        self.config.option.keyword = expression
        self.config.hook.pytest_collection_modifyitems(session=items[0].session, config=self.config, items=items)
        return items

    def blocks(self, expression: str, of: Callable[[pytest.Item], bool] = lambda item: True) -> set[str]:
        return {block for item in self.selected(expression) if of(item) and (block := block_of(item))}


@pytest.fixture
def collect(pytester: pytest.Pytester) -> Callable[..., Collected]:
    def collect(*options: str | Path) -> Collected:
        collected = Collected()
        pytester.inline_run(
            "-q", "-p", "no:cacheprovider", "--collect-only", *map(str, options), "--rootdir", ROOT, plugins=[collected]
        )
        return collected

    return collect


@pytest.fixture(scope="module")
def parity() -> Collected:
    """Returns the comparisons of the fixture in float32."""
    collected, before = Collected(), set(sys.modules)
    options = ["-q", "-p", "no:cacheprovider", "--collect-only", str(PARITY), "--size", "fixture", "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        assert pytest.main(options, plugins=[collected]) == pytest.ExitCode.OK
    for name in set(sys.modules) - before:
        if name.startswith("tests."):  # whose parameters are another table's in test_table.py
            del sys.modules[name]
    return collected


def differing(found: Callable[[str], set[str]], selects: dict[str, set[str]]) -> dict[str, list[str]]:
    """Returns, by expression, the blocks that are selected and should not be, or should be and are not."""
    return {word: sorted(wrong) for word, blocks in selects.items() if (wrong := blocks ^ found(word))}


def test_words_select_what_they_say(parity: Collected) -> None:
    assert not differing(lambda word: parity.blocks(word, compares), SELECTS)
    assert all(compares(item) for item in parity.selected("transcript and not wrong and not heads"))
    faults = {item.name for item in parity.selected("conv1") if not compares(item)}
    assert any("conv_bias_dropped" in name for name in faults) and not any("query" in name for name in faults)


def test_benchmarks_are_selected_by_the_same_words(collect: Callable[..., Collected]) -> None:
    perf = collect(PERF / "test_speed.py")
    assert not differing(perf.blocks, SELECTS | {"network": set()})


def test_what_is_compiled_alone_is_selected_by_the_same_words(collect: Callable[..., Collected]) -> None:
    compiled = collect(PARITY, "--compile-only", "sm_80", "--size", "fixture", "--dtype", "float32")
    assert not differing(compiled.blocks, SELECTS | {"network": set(), "log_mel or mel": {"log_mel"}})


def test_what_takes_few_graphs_comes_first(parity: Collected) -> None:
    """The first verdict waits for what it needs, while another process compiles the rest."""
    for expression, jobs, first in (
        ("attention", ["fixture:float32"], SELF | CROSS),
        ("", ["fixture:float32", TRANSCRIBING], {n for n, block in BLOCKS.items() if block.unit == "network"}),
    ):
        items = parity.selected(expression)
        few = [item for item in items if "comparison" in parameters(item) and block_of(item) in first]
        assert {block_of(item) for item in few} == first
        assert items[: len(few)] == few
        assert jobs_of_others(parity.config, items) == jobs
    assert not jobs_of_others(parity.config, parity.selected("attention and isolated"))


@pytest.mark.parametrize(
    ("options", "models"),
    [
        ((), ["fixture-float32", "fixture-bfloat16", "tiny-float32"]),
        (("--nightly",), ["fixture-float32", "fixture-bfloat16", "tiny-float32", "tiny-bfloat16"]),
        (("--size", "tiny"), ["tiny-float32", "tiny-bfloat16"]),
        (("--dtype", "bfloat16"), ["fixture-bfloat16", "tiny-bfloat16"]),
    ],
)
def test_random_weights_below_float32_run_at_night_unless_asked_for(
    options: tuple[str, ...], models: list[str], collect: Callable[..., Collected]
) -> None:
    items = collect(PARITY / "test_network.py", "-k", "test_chain", *options).items
    assert [item.name for item in items] == [f"test_chain[{model}]" for model in models]


def names_in_pytorch() -> Iterator[str]:
    """Yields the names of every class and attribute in openai-whisper's model, but for those of containers."""
    model = Whisper(ModelDimensions(4, 10, 8, 2, 1, 30, 12, 8, 2, 1))
    for path, module in model.named_modules():
        yield from (name for name in path.split(".") if name.isidentifier())
        if type(module).__name__ not in ("Whisper", "ModuleList"):
            yield type(module).__name__


def test_every_name_in_pytorchs_model_finds_a_block() -> None:
    assert not {name for name in names_in_pytorch() if not any(finds(name, block) for block in BLOCKS)}


def test_no_other_word_is_one_of_a_blocks_own_name() -> None:
    """Whose meaning must not grow with the table."""
    own = {part for name in BLOCKS for part in name.split(".")}
    others = set().union(*map(words_of, BLOCKS))
    assert others and not others & own
    assert all_words() == [*sorted(own), *sorted(others)]


def test_what_leaves_no_comparison_is_named(parity: Collected) -> None:
    for expression in ("query_bias_dropped", "no_such_block", "no_such_test or test_cached"):
        reason = left_out(parity.config, parity.selected(expression))
        assert reason and f"-k '{expression}'" in reason and "alignment, attention" in reason
    for expression in ("conv", "transcript", "chain", "given_the_text", ""):
        assert left_out(parity.config, parity.selected(expression)) is None, expression


@pytest.mark.parametrize(
    ("file", "selection", "status"),
    [
        ("", "every_format", pytest.ExitCode.TESTS_FAILED),
        ("", "no_such_block", pytest.ExitCode.NO_TESTS_COLLECTED),
        ("test_loading.py", "every_format", pytest.ExitCode.OK),
    ],
)
def test_a_selection_that_compares_no_block_fails_and_says_so(
    file: str, selection: str, status: int, pytester: pytest.Pytester
) -> None:
    """Where what it chooses from compares any."""
    done = pytester.runpytest_inprocess(
        "-q", "-p", "no:cacheprovider", "--size", "fixture", PARITY / file, "-k", selection
    )
    assert done.ret == status
    assert ("no block was compared with PyTorch" in done.stdout.str()) == (not file)


def test_every_word_of_a_selection_in_the_documents_selects_a_test(collect: Callable[..., Collected]) -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    command = re.compile(r"pytest (tests/[\w/.*]+) -k (?:\"([^\"]+)\"|([a-z]\w*))")
    asked = {(path, one or other) for each in documents for path, one, other in command.findall(each.read_text())}
    files = {path: {str(file) for file in ROOT.glob(path)} for path, _ in asked}
    collected = collect(*set().union(*files.values()), "--size", "fixture", "--dtype", "float32", "--nightly")
    unselected = {
        (path, word)
        for path, expression in asked
        for word in [expression, *re.split(" or ", expression)]
        if not any(str(item.path).startswith(tuple(files[path])) for item in collected.selected(word))
    }
    assert len(asked) >= 5 and not unselected


@pytest.mark.parametrize("size", [FIXTURE, CHECKPOINT])
def test_the_command_that_repeats_a_failure_selects_it_alone(size: str, collect: Callable[..., Collected]) -> None:
    comparison = Comparison(size, torch.bfloat16, "encoder.mlp", 1, "three windows")
    node = f"{PARITY / 'test_isolated.py'}::test_isolated[{identify(comparison)}]"
    suite: Any = SimpleNamespace(model=SimpleNamespace(source=NANO))
    said = message(Judgement(comparison, (), ("shape",)), suite, node)
    (again,) = (line for line in said.splitlines() if line.startswith("again: pytest "))
    (item,) = collect(*shlex.split(again)[2:]).items
    assert item.callspec.params == {"comparison": comparison}  # type: ignore[attr-defined]


def test_a_word_in_a_tests_name_does_not_have_it_compare() -> None:
    """Else a run of unit tests alone would fail for having compared nothing."""
    assert of_parity("tests/parity/test_isolated.py::test_isolated[a]")
    assert not of_parity("tests/unit/test_options.py::test_option[tests/parity]")
