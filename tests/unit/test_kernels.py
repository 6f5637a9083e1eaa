"""The Mojo kernels of products and of attention, on sizes that fill no vector and no tile."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue
from max.nn.layer import Module
from torch import Tensor

from maxwhisper.decoding.gpu import mask_behind
from maxwhisper.engine import kernel_library
from maxwhisper.engine.folders import cache_folder
from maxwhisper.engine.program import Artifact, Executable, Program
from maxwhisper.engine.session import TORCH_DTYPE, Policy
from maxwhisper.errors import OptionError
from maxwhisper.network.keys_values import Cache, KeyValue, Slots
from maxwhisper.network.model import MultiHeadAttention
from maxwhisper.network.products import convolution, convolution_by_product, linear, text_product
from maxwhisper.network.shapes import causal_mask
from reference.formulas import bound_of_sums, judge_formula
from reference.judge import UNIT_ROUNDOFF, Comparison, judge

STORED = (DType.float32, DType.float16, DType.bfloat16)


class Product(Module):
    def __call__(self, x: TensorValue, weight: TensorValue) -> list[TensorValue]:
        return [text_product(x, weight)]


@cache
def graphs() -> dict[str, Executable]:
    """All of this file, by name: most of a compilation does not depend on how many there are."""
    programs = [*products(), *convolutions(), *affine(), *attentions()]
    return Artifact("kernels", programs, "cpu").init({})


def products() -> list[Program]:
    """One graph per dtype that weights are stored in, every dimension symbolic."""
    cpu = DeviceRef.CPU()

    def program(stored: DType) -> Program:
        x = TensorType(DType.float32, ["batch", "token", "n_in"], cpu)
        weight = TensorType(stored, ["n_out", "n_in"], cpu)
        return Program(stored.name, "", Product(), Product.__call__, {"x": x, "weight": weight})

    return [program(stored) for stored in STORED]


@settings(max_examples=60, deadline=None)
@given(
    stored=st.sampled_from(STORED),
    batch=st.integers(1, 3),
    n_token=st.integers(1, 9),
    n_in=st.integers(1, 300),
    n_out=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_value_is_the_sum_of_its_products(
    stored: DType, batch: int, n_token: int, n_in: int, n_out: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_token, n_in, generator=generator)
    weight = torch.randn(n_out, n_in, generator=generator).to(TORCH_DTYPE[stored])
    (y,) = graphs()[stored.name](x, weight)
    exact, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= bound_of_sums(n_in, terms)).all()


def test_a_product_large_enough_for_several_threads() -> None:
    x, weight = torch.randn(2, 7, 384), torch.randn(51865, 384).half()
    (y,) = graphs()["float16"](x, weight)
    found = judge_formula(
        "product",
        lambda given: [given["x"] @ given["weight"].T],
        {"x": x, "weight": weight.float()},
        [y],
        longest_reduction=384,
    )
    assert found.passed, f"\n{found}"


def test_a_row_is_bitwise_the_same_among_any_others() -> None:
    x, weight = torch.randn(1, 13, 1000), torch.randn(77, 1000).half()
    (together,) = graphs()["float16"](x, weight)
    alone = [graphs()["float16"](row[None, None], weight)[0] for row in x[0]]
    assert together.equal(torch.cat(alone, 1))


# ---- convolution ---------------------------------------------------------------------------------------------------

N_FRAME, N_IN, N_OUT = 291, 182, 80  # rows and a panel that are not full; with three taps more terms than one sum has
FORMS = {"product": (1, 1), "convolution": (3, 1), "every second frame": (3, 2)}
"""Taps and stride."""


class Convolution(Module):
    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def by_kernel(self, x: TensorValue, weight: TensorValue) -> list[TensorValue]:
        return [convolution(x, weight, self.stride)]

    def as_on_a_gpu(self, x: TensorValue, weight: TensorValue) -> list[TensorValue]:
        return [convolution_by_product(x, weight, stride=self.stride)]

    def __call__(self) -> None:
        raise NotImplementedError


def convolutions() -> list[Program]:
    cpu = DeviceRef.CPU()

    def program(
        name: str, taps: int, stride: int, how: Callable[..., list[TensorValue]], dtype: DType = DType.float32
    ) -> Program:
        x = TensorType(dtype, ["batch", N_FRAME, N_IN], cpu)
        weight = TensorType(DType.float16, [N_OUT, N_IN, taps], cpu)
        return Program(name, "", Convolution(stride), how, {"x": x, "weight": weight})

    ours = [program(name, *form, Convolution.by_kernel) for name, form in FORMS.items()]
    ours += [program(f"{name}, bfloat16", *form, Convolution.by_kernel, DType.bfloat16) for name, form in FORMS.items()]
    theirs = [program(f"{name}, as on a GPU", *form, Convolution.as_on_a_gpu) for name, form in FORMS.items()]
    return [*ours, *theirs]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", ["", ", as on a GPU"])
@pytest.mark.parametrize("batch", [1, 3])
def test_convolution(name: str, how: str, batch: int) -> None:
    taps, stride = FORMS[name]
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, N_FRAME, N_IN, generator=generator)
    weight = torch.randn(N_OUT, N_IN, taps, generator=generator).half()

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(x.transpose(1, 2), weight, stride=stride).transpose(1, 2)

    (y,) = graphs()[name + how](x, weight)
    expected, terms = exact(x.double(), weight.double()), exact(x.double().abs(), weight.double().abs())
    assert y.shape == expected.shape
    assert ((y - expected).abs() <= bound_of_sums(N_IN * taps, terms)).all()


@pytest.mark.parametrize("name", FORMS)
def test_convolution_in_bfloat16(name: str) -> None:
    taps, stride = FORMS[name]
    x, weight = torch.randn(2, N_FRAME, N_IN).bfloat16(), torch.randn(N_OUT, N_IN, taps).half()

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(x.transpose(1, 2), weight, stride=stride).transpose(1, 2)

    (y,) = graphs()[f"{name}, bfloat16"](x, weight)
    rounded = weight.bfloat16().double()
    expected, terms = exact(x.double(), rounded), exact(x.double().abs(), rounded.abs())
    assert y.dtype == torch.float32
    assert ((y - expected).abs() <= bound_of_sums(N_IN * taps, terms)).all()


@pytest.mark.parametrize("name", FORMS)
def test_a_window_is_bitwise_the_same_in_a_batch(name: str) -> None:
    x, weight = torch.randn(3, N_FRAME, N_IN), torch.randn(N_OUT, N_IN, FORMS[name][0]).half()
    (together,) = graphs()[name](x, weight)
    assert together.equal(torch.cat([graphs()[name](window[None], weight)[0] for window in x]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_so(value: float) -> None:
    x = torch.zeros(1, 1, 40)
    x[0, 0, 39] = value
    (y,) = graphs()["float32"](x, torch.ones(5, 40))
    assert not y.isfinite().any()


def test_sources_that_do_not_compile_are_reported_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, kept = tmp_path / "wrong", tmp_path / "kept"
    wrong.mkdir()
    (wrong / "__init__.mojo").write_text("def f():\n    return nowhere\n")
    monkeypatch.setattr(kernel_library, "KERNELS", wrong)
    with pytest.raises(RuntimeError, match=r"(?s)wrong does not compile:.*nowhere"):
        kernel_library.compile_kernels(kept / "a.mojoc")
    assert not list(kept.iterdir())


def test_a_folder_that_cannot_keep_kernels_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=f"{tmp_path / 'file'}: compiled kernels cannot be kept there"):
        kernel_library.compile_kernels(tmp_path / "file" / "a.mojoc")


def test_kernels_are_known_by_one_path_wherever_they_are_kept() -> None:
    """Or a cache of MAX's that was copied or mounted elsewhere would know none of them."""
    [package] = kernel_library.kernel_library().library_paths()
    assert package.parent == Path(f"/proc/self/fd/{kernel_library.FOLDER_DESCRIPTOR}")
    assert package.resolve() == cache_folder("kernels").resolve() / package.name


# ---- products with a bias ------------------------------------------------------------------------------------------

HALVES = (DType.float16, DType.bfloat16)


class Affine(Module):
    def __call__(self, x: TensorValue, weight: TensorValue, bias: TensorValue) -> list[TensorValue]:
        return [linear(x, weight, bias)]


def affine() -> list[Program]:
    """In each dtype, for texts, whose length is symbolic, and for audio."""
    cpu = DeviceRef.CPU()
    weights = {"weight": TensorType(DType.float16, [N_OUT, N_IN], cpu), "bias": TensorType(DType.float32, [N_OUT], cpu)}

    def program(dtype: DType, name: str, n_row: str | int) -> Program:
        x = TensorType(dtype, ["batch", n_row, N_IN], cpu)
        return Program(f"{name}, {dtype.name}", "", Affine(), Affine.__call__, {"x": x, **weights})

    rows: list[tuple[str, str | int]] = [("text", "token"), ("audio", N_FRAME)]
    return [program(dtype, *row) for dtype in HALVES for row in rows]


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("rows", ["text", "audio"])
def test_a_product_is_rounded_once_with_its_bias(rows: str, dtype: DType) -> None:
    half = TORCH_DTYPE[dtype]
    x, weight, bias = torch.randn(2, N_FRAME, N_IN).to(half), torch.randn(N_OUT, N_IN).half(), torch.randn(N_OUT)
    (y,) = graphs()[f"{rows}, {dtype.name}"](x, weight, bias)
    exact, terms = (
        f(x.double()) @ f(weight.to(half).double()).T + f(bias.double()) for f in (torch.positive, torch.abs)
    )
    added = bound_of_sums(N_IN + 1, terms)
    assert y.dtype == half
    assert ((y - exact).abs() <= added + UNIT_ROUNDOFF[half] * (exact.abs() + added)).all()


# ---- attention -----------------------------------------------------------------------------------------------------

N_CHANNEL = 64
ATTENTION, SCORES = 0, 1


class Attention(Module):
    def cross(self, q: TensorValue, k: TensorValue, v: TensorValue) -> list[TensorValue]:
        return [self.attn.by_kernel(q, KeyValue(k, v))]

    def scores(self, q: TensorValue, k: TensorValue, v: TensorValue) -> tuple[TensorValue, ...]:
        return self.attn.scores_by_kernel(q, KeyValue(k, v))

    def cached(
        self, q: TensorValue, k: TensorValue, v: TensorValue, length: TensorValue, *new: TensorValue
    ) -> list[TensorValue]:
        return [self.attn.by_kernel(q, KeyValue(*new), cache=Cache(k, v, length))]

    def scattered(
        self, q: TensorValue, k: TensorValue, v: TensorValue, length: TensorValue, *others: TensorValue
    ) -> list[TensorValue]:
        *new, rows = others
        return [self.attn.by_kernel(q, KeyValue(*new), cache=Cache(k, v, length, rows))]

    def written_out(
        self, q: TensorValue, k: TensorValue, v: TensorValue, length: TensorValue, *new: TensorValue
    ) -> tuple[TensorValue, ...]:
        """What takes the kernels' place in faults."""
        kv, cache = KeyValue(*new), Cache(k, v, length)
        scores = self.attn.heads_attention(q, cache.followed_by(kv), None)[SCORES]
        return self.attn.written_out(q, kv, cache=cache), scores

    def in_place(self, q: TensorValue, *others: Any) -> list[TensorValue]:
        k, v, n_past, k_new, v_new, k_written, v_written = others
        slots = Slots(k, v, k_written, v_written, n_past, mask_behind(n_past, k))
        queries, kv = slots.filled(q, KeyValue(k_new, v_new))
        return [self.attn.written_out(queries, kv, slots.mask)]

    def causal(self, q: TensorValue, k: TensorValue, v: TensorValue) -> list[TensorValue]:
        return [self.attn.by_kernel(q, KeyValue(k, v), causal_mask(q.shape[1], self.attn.policy))]

    @property
    def attn(self) -> MultiHeadAttention:
        """One without weights of its own: a graph would want their values."""
        policy = Policy(DeviceRef.CPU(), DType.float32, DType.float32)
        return MultiHeadAttention(2 * N_CHANNEL, 2, policy)

    def __call__(self) -> None:
        raise NotImplementedError


def attentions() -> list[Program]:
    cpu = DeviceRef.CPU()

    def queries(state: str | int, number: str | int = 1) -> dict[str, TensorType]:
        return {"q": TensorType(DType.float32, ["batch", number, state], cpu)}

    def heads(rows: str, positions: str | int, n_head: str | int = "head") -> TensorType:
        return TensorType(DType.float32, [rows, n_head, positions, N_CHANNEL], cpu)

    def behind_a_cache(n_head: str | int) -> dict[str, TensorType]:
        positions, new = heads("batch", "position", n_head), heads("batch", 1, n_head)
        return {"k": positions, "v": positions, "length": length, "k_new": new, "v_new": new}

    length, lengths = TensorType(DType.int64, [], cpu), TensorType(DType.int64, ["batch"], cpu)
    cross = {**queries("state"), "k": heads("row", "key"), "v": heads("row", "key")}
    cached = {**queries("state"), **behind_a_cache("head")}
    scattered = {**cached, "rows": TensorType(DType.int64, ["batch", "position"], cpu)}
    written_out = {**queries(2 * N_CHANNEL), **behind_a_cache(2)}
    slot = TensorType(DType.float32, ["batch", "position", 2, N_CHANNEL], cpu)
    in_place = {**written_out, "k": slot, "v": slot, "length": lengths}
    in_place |= {f"{name} written": slot.as_buffer() for name in "kv"}
    many = {**cross, **queries("state", "token")}
    half = {name: TensorType(DType.bfloat16, kind.shape, cpu) for name, kind in many.items()}
    causal = {**many, **dict.fromkeys(("k", "v"), heads("row", "token"))}
    return [
        Program("many", "", Attention(), Attention.scores, many),
        Program("many, bfloat16", "", Attention(), Attention.scores, half),
        Program("causal", "", Attention(), Attention.causal, causal),
        Program("cross", "", Attention(), Attention.cross, cross),
        Program("cached", "", Attention(), Attention.cached, cached),
        Program("of other lengths", "", Attention(), Attention.cached, {**cached, "length": lengths}),
        Program("of other rows", "", Attention(), Attention.scattered, scattered),
        Program("written out", "", Attention(), Attention.written_out, written_out),
        Program("in place", "", Attention(), Attention.in_place, in_place),
    ]


def expected(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> list[Tensor]:
    """Attention, and its scores; k and v are repeated for the texts that share them."""
    n_head, shared = k.shape[1], len(q) // len(k)
    k, v = (x.repeat_interleave(shared, 0) for x in (k, v))
    split = q.unflatten(2, (n_head, N_CHANNEL)).transpose(1, 2)
    scores = split @ k.transpose(2, 3) * N_CHANNEL**-0.5
    if causal:
        scores = scores + torch.full(scores.shape[2:], float("-inf")).triu(1)
    return [(scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores if k.dtype == torch.float64 else scores.float()]


ROUNDINGS = 3
"""Of values in a row, in PyTorch: scores, their softmax, and weighted values."""


def check(
    name: str, ours: list[Tensor], q: Tensor, k: Tensor, v: Tensor, causal: bool = False, output: int = 0
) -> None:
    comparison = Comparison("a kernel", q.dtype, name, 0, "random", "cpu")
    oracle, peer = expected(q.double(), k.double(), v.double(), causal), expected(q, k, v, causal)
    terms = max(k.shape[2], N_CHANNEL)
    three = [[each[output]] for each in (oracle, peer, ours)]
    found = judge(comparison, *three, longest_reduction=terms, roundings=ROUNDINGS, n_vocab=0)
    assert found.passed, f"\n{found}"


SIZES = {"rows": st.integers(1, 3), "n_head": st.integers(1, 3), "seed": st.integers(0, 2**32 - 1)}


@settings(max_examples=60, deadline=None)
@given(shared=st.integers(1, 9), n_key=st.integers(1, 300), **SIZES)
def test_attention_of_texts_that_share_keys(rows: int, shared: int, n_head: int, n_key: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows * shared, 1, n_head * N_CHANNEL, generator=generator)
    k, v = torch.randn(2, rows, n_head, n_key, N_CHANNEL, generator=generator)
    check("cross", graphs()["cross"](q, k, v), q, k, v)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shared=st.integers(1, 3),
    n_token=st.integers(2, 80),
    n_key=st.integers(1, 300),
    **SIZES,
)
def test_attention_of_many_queries(
    dtype: torch.dtype, rows: int, shared: int, n_head: int, n_token: int, n_key: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows * shared, n_token, n_head * N_CHANNEL, generator=generator).to(dtype)
    k, v = torch.randn(2, rows, n_head, n_key, N_CHANNEL, generator=generator).to(dtype)
    name = "many" if dtype == torch.float32 else "many, bfloat16"
    check(name, graphs()[name](q, k, v), q, k, v, output=ATTENTION)
    q, k = q.abs(), k.abs()  # a score may be near 0 by chance else, and its relative error anything
    check(name, graphs()[name](q, k, v), q, k, v, output=SCORES)


@settings(max_examples=60, deadline=None)
@given(n_token=st.integers(2, 300), **SIZES)
def test_causal_attention(rows: int, n_head: int, n_token: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, n_token, n_head * N_CHANNEL, generator=generator)
    k, v = torch.randn(2, rows, n_head, n_token, N_CHANNEL, generator=generator)
    check("causal", graphs()["causal"](q, k, v), q, k, v, causal=True)


@settings(max_examples=60, deadline=None)
@given(n_past=st.integers(0, 300), n_free=st.integers(0, 20), **SIZES)
def test_attention_behind_a_cache_reads_nothing_that_is_not_filled(
    rows: int, n_head: int, n_past: int, n_free: int, seed: int
) -> None:
    check_cached("cached", rows, n_head, n_past, n_free, seed)


@pytest.mark.parametrize("n_past", [1, 17])
@pytest.mark.parametrize("n_free", [0, 3])
def test_attention_behind_a_cache_written_out(n_past: int, n_free: int) -> None:
    check_cached("written out", 3, 2, n_past, n_free, seed=0)
    check_cached("written out", 3, 2, n_past, n_free, seed=0, output=SCORES)


@settings(max_examples=60, deadline=None)
@given(n_position=st.integers(1, 300), rows=st.integers(1, 4), data=st.data())
def test_attention_behind_a_cache_in_place(n_position: int, rows: int, data: st.DataObject) -> None:
    n_past = torch.tensor([data.draw(st.integers(0, n_position - 1)) for _ in range(rows)])
    q, k_new, v_new = torch.randn(rows, 1, 2 * N_CHANNEL), *torch.randn(2, rows, 2, 1, N_CHANNEL)
    caches = torch.randn(2, rows, n_position, 2, N_CHANNEL)
    before = caches.clone()
    (ours,) = graphs()["in place"](q, *caches, n_past, k_new, v_new, *caches)
    for row, place in enumerate(n_past.tolist()):
        before[:, row, place] = torch.stack([k_new, v_new])[:, row, :, 0]
        k, v = before[:, row : row + 1, : place + 1].transpose(2, 3)
        check("in place", [ours[row : row + 1]], q[row : row + 1], k, v)
    assert caches.equal(before)


def check_cached(
    graph: str, rows: int, n_head: int, n_past: int, n_free: int, seed: int, output: int = ATTENTION
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, 1, n_head * N_CHANNEL, generator=generator)
    k, v = torch.randn(2, rows, n_head, n_past + 1, N_CHANNEL, generator=generator)
    if output == SCORES:
        q, k = q.abs(), k.abs()
    nothing = torch.full((rows, n_head, n_free, N_CHANNEL), float("nan"))
    caches = (torch.cat([x[:, :, :n_past], nothing], 2) for x in (k, v))
    ours = graphs()[graph](q, *caches, torch.tensor(n_past), k[:, :, n_past:], v[:, :, n_past:])
    check(graph, ours, q, k, v, output=output)


def test_attention_of_a_text_is_bitwise_the_same_among_any_others() -> None:
    q, (k, v) = torch.randn(11, 1, 6 * N_CHANNEL), torch.randn(2, 1, 6, 1500, N_CHANNEL)
    (together,) = graphs()["cross"](q, k, v)
    assert together.equal(torch.cat([graphs()["cross"](each[None], k, v)[0] for each in q]))


def test_a_query_is_bitwise_the_same_among_any_others() -> None:
    q, (k, v) = torch.randn(3, 400, 2 * N_CHANNEL), torch.randn(2, 3, 2, 131, N_CHANNEL)
    together, _ = graphs()["many"](q, k, v)
    for text, n_token in ((0, 400), (1, 399), (2, 5)):
        alone, _ = graphs()["many"](q[text : text + 1, -n_token:], k[text : text + 1], v[text : text + 1])
        assert together[text : text + 1, -n_token:].equal(alone)


@pytest.mark.parametrize("n_key", [5, 100, 131])
@pytest.mark.parametrize("name", ["cross", "many", "many, bfloat16"])
def test_a_key_that_is_no_number_is_seen(name: str, n_key: int) -> None:
    """Wherever it stands among those that are compared with each other for the greatest score."""
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    q, (k, v) = (
        torch.ones(1, 1 if name == "cross" else 7, N_CHANNEL, dtype=dtype),
        torch.ones(2, 1, 1, n_key, N_CHANNEL),
    )
    for place in (0, n_key // 2, n_key - 1):
        broken = k.to(dtype)
        broken[:, :, place] = float("nan")
        assert graphs()[name](q, broken, v.to(dtype))[0].isnan().all()


def test_texts_of_other_lengths_attend_as_they_do_alone() -> None:
    q, lengths = torch.randn(4, 1, 3 * N_CHANNEL), [5, 0, 17, 1]
    k, v, k_new, v_new = (torch.randn(4, 3, n, N_CHANNEL) for n in (20, 20, 1, 1))
    (together,) = graphs()["of other lengths"](q, k, v, torch.tensor(lengths), k_new, v_new)
    rows = [[x[i : i + 1] for x in (q, k, v, k_new, v_new)] for i in range(4)]
    alone = [graphs()["cached"](*row[:3], torch.tensor(n), *row[3:])[0] for row, n in zip(rows, lengths, strict=True)]
    assert together.equal(torch.cat(alone))


@settings(max_examples=60, deadline=None)
@given(n_past=st.integers(0, 300), **SIZES)
def test_places_may_be_read_from_any_row(rows: int, n_head: int, n_past: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k_new, v_new = (torch.randn(rows, *shape, generator=generator) for shape in (
        (1, n_head * N_CHANNEL), (n_head, 1, N_CHANNEL), (n_head, 1, N_CHANNEL)
    ))  # fmt: skip
    k, v = torch.randn(2, rows, n_head, n_past + 2, N_CHANNEL, generator=generator)
    rows = torch.randint(0, rows, (rows, n_past + 2), generator=generator)
    gathered = (x[rows, :, torch.arange(n_past + 2)].transpose(1, 2) for x in (k, v))
    (ours,) = graphs()["of other rows"](q, k, v, torch.tensor(n_past), k_new, v_new, rows)
    assert ours.equal(graphs()["cached"](q, *gathered, torch.tensor(n_past), k_new, v_new)[0])
