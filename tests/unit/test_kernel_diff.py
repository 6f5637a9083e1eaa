"""What is read out of compiled code, and how two revisions of it differ: artifacts made by hand."""

import struct
from pathlib import Path
from unittest.mock import patch

import pytest

from reference.kernel_diff import graphs
from reference.kernel_diff.__main__ import main
from reference.kernel_diff.diff import Change, Difference, Report, compare
from reference.kernel_diff.elf import CUDA, X86_64, Elf
from reference.kernel_diff.graphs import Compiled, compiled, fused, read
from reference.kernel_diff.kernels import multiplies_tf32

from .compiled_code import FFMA, MOVE, Entry, Made, Step, kernel, written

CACHE, ROW = '!mgp.tensor<?x?x2x64xf32, <"gpu", 0>>', '!mgp.tensor<?x1x128xf32, <"gpu", 0>>'
HMMA = {"float16": 0x004FE6000000180C, "bfloat16": 0x004FE6000004180C, "TF32": 0x004FE6000008100C}
HGMMA = {"float16": 0x000FE60008000818, "bfloat16": 0x000FE60008001818, "TF32": 0x000FE60008002818}
"""The high words of `mma` and `wgmma` with sums in float32, as ptxas 13.0 assembles them for sm_90a."""
TENSOR_CORES = {
    **{f"HMMA {dtype}": high << 64 | 0x000000080404723C for dtype, high in HMMA.items()},
    **{f"HGMMA {dtype}": high << 64 | 0x00000000041879F0 for dtype, high in HGMMA.items()},
}
MULTIPLY = kernel("gemm_00112233", FFMA, MOVE)
COPY = kernel("foreach_00112233", MOVE)


def made(**kernels: list[bytes]) -> Made:
    """Returns a graph "encoder" with an operation for each of the functions, which load these kernels."""
    entries = {name: Entry(name.encode(), programs) for name, programs in kernels.items()}
    return Made(entries, {"encoder": [Step(name) for name in entries]})


SPLIT = made(a=[kernel("mha_splitk_reduce_float32_float32_c1b3de77", FFMA)])


def only(artifact: Made) -> Compiled:
    (found,) = compiled(artifact.content(), Path("made.mef"))
    return found


def compared(tmp_path: Path, base: Made, head: Made) -> Report:
    folders = [written(tmp_path / name, each) for name, each in (("base", base), ("head", head))]
    return compare(*map(read, folders))


def the_difference(tmp_path: Path, base: Made, head: Made) -> Difference:
    (found,) = compared(tmp_path, base, head).differences
    return found


# ---- what differs --------------------------------------------------------------------------------------------------


def test_kernels_are_added_gone_and_changed(tmp_path: Path) -> None:
    """And counted by the operations that may launch them: two of them launch what has changed."""
    base = made(a=[kernel("norm_1", MOVE), MULTIPLY], b=[MULTIPLY], c=[kernel("gelu_00112233", FFMA)])
    slower = kernel("gemm_44556677", FFMA, MOVE, MOVE)
    head = made(a=[kernel("norm_1", MOVE), slower], b=[slower], c=[kernel("copy_00112233", MOVE, MOVE, MOVE)])
    found = the_difference(tmp_path, base, head)
    assert found.changes == {Change("gemm", 32, 48): 2, Change("gelu", 16, None): 1, Change("copy", None, 48): 1}
    assert [change.kind for change in sorted(found.changes, key=lambda each: each.name)] == ["added", "gone", "changed"]
    assert not found.same


def test_an_operation_more_of_the_same_kernel_is_seen(tmp_path: Path) -> None:
    found = the_difference(tmp_path, made(a=[COPY]), made(a=[COPY], b=[COPY]))
    assert found.changes == {Change("foreach", None, 16): 1}


def test_the_same_code_is_the_same_whatever_its_names_and_places(tmp_path: Path) -> None:
    """Names carry hashes of types; functions and kernels stand in another order, beside those of other graphs, which
    MAX's cache has added."""
    base = made(a=[MULTIPLY], b=[COPY])
    entries = {
        "other": Entry(b"o", [kernel("other", FFMA, FFMA)]),
        "z": Entry(b"b", [kernel("foreach_89abcdef", MOVE)]),
    }
    entries["y"] = Entry(b"a", [kernel("product_0123456789abcdef", FFMA, MOVE)])
    head = Made(entries, {"encoder": [Step("y"), Step("z")]})
    assert head.content() != base.content()
    assert the_difference(tmp_path, base, head).same


def test_a_launch_of_another_size_is_a_difference(tmp_path: Path) -> None:
    """Whose code is on the CPU."""
    base, head = (Made({"a": Entry(code, [COPY])}, {"encoder": [Step("a")]}) for code in (b"grid 1", b"grid 2"))
    report = compared(tmp_path, base, head)
    assert not report.differences[0].changes and report.changed
    assert "launched otherwise" in report.markdown()


def test_a_block_with_intermediates_is_tested_as_the_block(tmp_path: Path) -> None:
    names = ("encoder with intermediates", "decoder.mlp.step")
    base, head = (
        Made({"a": Entry(kernels=[each])}, {name: [Step("a")] for name in names}) for each in (COPY, MULTIPLY)
    )
    assert compared(tmp_path, base, head).selection == "decoder.mlp.step or encoder"


def test_what_a_helper_launches_counts_for_the_operation() -> None:
    entries = {"a": Entry(calls=["helper"]), "helper": Entry(b"h", [MULTIPLY]), "host": Entry(b"c")}
    found = only(Made(entries, {"encoder": [Step("a"), Step("host")]}))
    assert [each.name for each in found.kernels] == ["gemm"] and len(found.launches) == 1


def test_graphs_that_only_one_revision_has_are_new_or_gone(tmp_path: Path) -> None:
    entries = {"a": Entry(kernels=[COPY])}
    base, head = (Made(entries, {name: [Step("a")]}) for name in ("encoder.mlp", "decoder.step"))
    report = compared(tmp_path, base, head)
    assert report.selection == "decoder.step"
    assert "| decoder.step (parts) | float32 | none → 1 |" in report.markdown()
    assert "no longer there" in report.markdown()


# ---- what is counted and flagged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSOR_CORES)
def test_tf32_is_told_from_other_products_of_tensor_cores(name: str) -> None:
    assert multiplies_tf32(TENSOR_CORES[name].to_bytes(16, "little")) == name.endswith("TF32")
    found = only(made(a=[kernel("mha", TENSOR_CORES[name])]))
    assert found.flags == ({"TF32 kernel": 1} if name.endswith("TF32") else {})


def test_no_other_instruction_is_tf32() -> None:
    assert not any(multiplies_tf32((HMMA["TF32"] << 64 | low).to_bytes(16, "little")) for low in (0x7223, 0x7202, 0))


@pytest.mark.parametrize(
    ("dtype", "tf32", "flagged"), [("f32", "true", True), ("f32", "false", False), ("bf16", "true", False)]
)
def test_cublas_is_seen_and_where_it_may_round_to_tf32(dtype: str, tf32: str, flagged: bool) -> None:
    matmul = f"blas::_cublas_matmul[::DType](x),c_type={dtype},a_type={dtype},b_type={dtype},use_tf32={tf32},handle"
    entries = {"a": Entry(calls=[matmul]), matmul: Entry(b"m", calls=["_cublas::cublasGemmEx"])}
    found = only(Made(entries, {"encoder": [Step("a")]}))
    assert found.n_launch == 1 and found.launches[0][1].vendor
    assert found.flags == ({"cuBLAS in TF32": 1} if flagged else {})


def test_the_split_reducer_is_flagged() -> None:
    assert only(SPLIT).flags == {"split reducer": 1}


def test_what_is_no_longer_flagged_is_said(tmp_path: Path) -> None:
    assert "| split reducer: 1 → 0 |" in compared(tmp_path, SPLIT, made(a=[COPY])).markdown()


@pytest.mark.parametrize(
    ("summary", "takes", "copies"),
    [
        ("Sequence(mgp.tensor.extract.buffer, mo.transpose)", (0,), 1),
        ("Prologue(mo.slice, mo.concat, operandIndices=[0])", (0, 1), 1),
        ("View(mo.static.reshape, mo.cast)", (2,), 1),
        ("Sequence(mo.transpose, mo.transpose, custom__mo.mha.no_cache)", (0, 1), 2),
        ("custom__maxwhisper.split_attention", (0, 1), 0),
        ("Sequence(Elementwise(mo.cast, mo.add), custom__maxwhisper.store)", (0, 1), 0),
        ("View(mo.static.broadcast_to, Elementwise(mo.greater, mo.select))", (0,), 0),
        ("View(mo.static.reshape)", (0,), 0),
        ("mo.transpose", (1,), 0),
    ],
    ids=[
        "transposed",
        "joined",
        "its_memory_cast",
        "copied_to_attend",
        "attended_to",
        "stored_into",
        "its_length",
        "a_view",
        "of_a_row",
    ],
)
def test_a_copy_of_a_cache_is_told_from_its_uses(summary: str, takes: tuple[int, ...], copies: int) -> None:
    entries = {"memory": Entry(b"memory"), "a": Entry(kernels=[COPY])}
    steps = [Step("memory", "mgp.tensor.extract.buffer", (0,), 2), Step("a", summary, takes)]
    found = only(Made(entries, {"decoder.step": steps}, [CACHE, ROW]))
    assert found.flags == ({"copy of a cache": copies} if copies else {})


def test_a_copy_that_no_kernel_makes_is_seen() -> None:
    entries = {"a": Entry(calls=["AsyncRT_DeviceContext_DtoD_async"])}
    found = only(Made(entries, {"decoder.step": [Step("a", "mo.mutable.load", (0,))]}, [CACHE]))
    assert found.flags == {"copy of a cache": 1}


def test_every_part_of_an_operation_counts_as_a_launch() -> None:
    summary = (
        "Sequence(index.constant, Epilogue(mo.matmul, View(mo.add, mo.mul), operandIndices=[0]), pop.add, mo.cast)"
    )
    assert fused(summary) == ["Epilogue(mo.matmul, View(mo.add, mo.mul), operandIndices=[0])", "mo.cast"]
    steps = [Step("a", summary), Step("a", "mgp.buffer.set"), Step("host", "mo.add")]
    entries = {"a": Entry(kernels=[COPY]), "host": Entry(b"c")}
    assert only(Made(entries, {"encoder": steps})).n_launch == 3


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_report_is_markdown_and_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {"a": Entry(kernels=[MULTIPLY]), "b": Entry(b"b", [kernel("mha_ffffffff", TENSOR_CORES["HMMA TF32"])])}
    entries["host"] = Entry(b"c")
    same = {"encoder.mlp": [Step("a")], "token_rules": [Step("host")]}
    base = written(
        tmp_path / "base", Made(entries, {**same, "decoder.select_tokens": [Step("a")], "encoder": [Step("a")]})
    )
    head = written(
        tmp_path / "head", Made(entries, {**same, "decoder.select_tokens": [Step("b")], "encoder": [Step("b")] * 2})
    )
    assert main([str(head), str(base), "--output", str(tmp_path / "new" / "diff.md")]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "new" / "diff.md").read_text() == said
    assert "2 of 3 graphs differ; kernels: 1 added, 1 gone, 0 changed." in said
    assert 'make gpu-parity K="steps or transcript or encoder"' in said
    assert "| encoder (parts) | float32 | 1 → 2 | 1 | 1 | 1 |  | **TF32 kernel: 0 → 1** |" in said
    assert "| encoder.mlp (parts) | float32 | 1 | 1 |  |  |  |  |" in said
    assert "token_rules" not in said
    assert "| `mha` | added |  | 16 | decoder.select_tokens, encoder x2 |" in said


def test_nothing_is_to_be_tested_where_nothing_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(written(tmp_path / "head", made(a=[COPY])))
    assert main([folder, folder]) == 0
    said = capsys.readouterr().out
    assert "0 of 1 graphs differ" in said and "gpu-parity" not in said


DAMAGES = {
    "cut short": (lambda content: content[: len(content) // 2], ""),
    "no artifact": (lambda content: b"MLIR" + content, "starts with 4d4c, expected eef0"),
    "an operation that gives more than there is": (
        lambda content: content.replace(struct.pack("<6I", 0, 0, 0, 6, 0, 0), struct.pack("<6I", 0, 0, 0, 6, 0, 2**31)),
        "an operation gives 2147483648 values of 9",
    ),
    "a program without a kernel": (
        lambda content: content.replace(b".text.foreach", b".data.foreach"),
        "a program for a GPU has no kernel",
    ),
    "a program for another machine": (
        lambda content: content.replace(struct.pack("<HH", 1, CUDA), struct.pack("<HH", 1, X86_64)),
        "is a program for machine 62, expected 190",
    ),
}
"""What is done to an artifact, and what is said of it."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_is_an_error_by_name(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = written(tmp_path / "base", made(a=[COPY]))
    change, message = DAMAGES[damage]
    content = change(made(a=[COPY]).content())
    with patch.object(Made, "content", lambda self: content):
        folder = written(tmp_path / "head", made(a=[COPY]))
    assert main([str(folder), str(whole)]) == 1
    said = capsys.readouterr().err
    assert f"kernel-diff: {folder / 'made.mef'}: is no artifact of MAX 26.7: " in said and message in said


def test_less_than_was_asked_for_is_an_error() -> None:
    program = Elf(COPY)
    with pytest.raises(ValueError, match=r"section \.shstrtab is cut short"):
        program.bytes_of(program.sections[-1], 0, 1000)


def test_a_kernel_that_is_nowhere_is_an_error() -> None:
    """Rather than a graph that seems to launch nothing."""
    entries = {"a": Entry(calls=["AsyncRT_DeviceContext_loadFunction"])}
    with pytest.raises(graphs.ArtifactError, match=r"made\.mef: .* function a loads a kernel, and none is found"):
        only(Made(entries, {"encoder": [Step("a")]}))


def test_folders_and_files_that_are_missing_or_damaged_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged, lacking, strange = (written(tmp_path / name, made(a=[COPY])) for name in "abcd")
    (damaged / "made.mef").write_bytes(b"other")
    (lacking / "made.mef").unlink()
    (strange / "manifest.json").write_text("[]")
    expected = {
        damaged: f"{damaged / 'made.mef'}: sha256 is ",
        lacking: f"{lacking / 'made.mef'}: cannot be read: No such file",
        strange: f"{strange / 'manifest.json'}: is no manifest of artifacts",
        tmp_path / "nowhere": f"{tmp_path / 'nowhere' / 'manifest.json'}: cannot be read: No such file",
    }
    for folder, message in expected.items():
        assert main([str(whole), str(folder)]) == 1
        assert f"kernel-diff: {message}" in capsys.readouterr().err
