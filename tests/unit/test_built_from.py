"""What a key depends on: the graphs and the kernels that they call, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import maxwhisper.engine.built_from
from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.compiled import policy_of, programs_of, units_on
from maxwhisper.engine.built_from import built_from, graphs_of
from maxwhisper.engine.kernel_library import KERNELS, code
from maxwhisper.engine.program import Program
from maxwhisper.network.model import AudioEncoder
from reference.fixtures import NANO

STEM = AudioEncoder.stem


@pytest.fixture(scope="module")
def units() -> dict[str, list[Program]]:
    """Returns what transcribes with the fixture."""
    checkpoint = load_checkpoint(NANO)
    policy = policy_of(checkpoint.tensors, "cpu", "float32")
    return {unit: programs_of(unit, checkpoint.dims, policy) for unit in units_on("cpu")}


@pytest.fixture(scope="module")
def graphs(units: dict[str, list[Program]]) -> dict[str, tuple[str, str]]:
    """Returns their graphs, by the name of the first: to build them takes a second."""
    return {programs[0].name: graphs_of(programs) for programs in units.values()}


@pytest.fixture
def before(
    units: dict[str, list[Program]], graphs: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Returns their keys as the sources stand, and has graphs not built again."""
    monkeypatch.setattr(maxwhisper.engine.built_from, "graphs_of", lambda programs: graphs[programs[0].name])
    return keys(units)


def keys(units: dict[str, list[Program]]) -> dict[str, str]:
    return {unit: built_from(programs) for unit, programs in units.items()}


@pytest.mark.parametrize(
    ("change", "name", "of"),
    [
        (lambda text: f'"""Other words."""\n# A comment.\n{text}\n', "linear.mojo", set()),
        (lambda text: f"{text}\ncomptime MORE = 1\n", "product.mojo", set()),  # a GPU's
        (lambda text: f"{text}\ncomptime MORE = 1\n", "convolution.mojo", {"network"}),
        (lambda text: f"{text}\ncomptime MORE = 1\n", "draft.mojo", {"decoding"}),
        (lambda text: f"{text}\ncomptime MORE = 1\n", "tiles.mojo", {"network", "decoding", "alignment"}),
    ],
    ids=["a comment", "a kernel of no graph", "a kernel", "another kernel", "what kernels share"],
)
def test_a_change_to_a_kernel_counts_for_the_graphs_that_call_it(
    units: dict[str, list[Program]],
    before: dict[str, str],
    change: Callable[[str], str],
    name: str,
    of: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = tmp_path / KERNELS.name
    shutil.copytree(KERNELS, kernels)
    (kernels / name).write_text(change((kernels / name).read_text()))
    monkeypatch.setattr(maxwhisper.engine.built_from, "KERNELS", kernels)
    assert {unit for unit, key in keys(units).items() if key != before[unit]} == of


def test_a_change_to_a_block_counts_for_the_graphs_that_have_it(
    units: dict[str, list[Program]], before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maxwhisper.engine.built_from, "graphs_of", graphs_of)
    monkeypatch.setattr(AudioEncoder, "stem", lambda encoder, mel: STEM(encoder, mel) * 1)
    assert {unit for unit, key in keys(units).items() if key != before[unit]} == {"network"}


def test_what_another_compiler_has_compiled_is_not_taken(
    units: dict[str, list[Program]], before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maxwhisper.engine.built_from, "version", lambda package: f"another {package}")
    assert not [unit for unit, key in keys(units).items() if key == before[unit]]


def test_comments_are_no_code(tmp_path: Path) -> None:
    (tmp_path / "a.mojo").write_text('"""Words\n# of it."""\n\nx = 1  # a comment\ny = "# none"\n    # one more\n')
    assert code(tmp_path / "a.mojo") == 'x = 1\ny = "# none"'
