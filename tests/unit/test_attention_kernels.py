"""The Mojo kernels of attention, on sizes that fill no vector and no tile."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops
from max.nn.layer import Module
from torch import Tensor

from maxwhisper.engine.program import Program
from maxwhisper.engine.session import TORCH_DTYPE, Policy
from maxwhisper.network.backends import PART
from maxwhisper.network.keys_values import Cache, KeyValue, Slots, tokens_first
from maxwhisper.network.model import MultiHeadAttention
from maxwhisper.network.shapes import causal_mask
from reference.formulas import in_float64
from reference.judge import UNIT_ROUNDOFF, Comparison, condition, judge

from .small_graphs import small_graphs

N_CHANNEL = 64
DTYPES = (DType.float32, DType.float16)
AUDIO = (*DTYPES, DType.bfloat16)
N_FRAME = 150
"""Queries of audio: more than are computed at a time, and rows that are not full. Their number is known to a graph, as
AMX needs it, where a CPU has that."""
ATTENTION, SCORES = 0, 1


class Attention(Module):
    def cross(self, q: TensorValue, k: TensorValue, v: TensorValue) -> list[TensorValue]:
        return [self.attn.by_kernel(q, KeyValue(k, v))]

    def scores(self, q: TensorValue, k: TensorValue, v: TensorValue) -> tuple[TensorValue, ...]:
        return self.attn.attend_with_scores(q, KeyValue(k, v))

    def cached(self, q: TensorValue, k_new: TensorValue, v_new: TensorValue, **cache: TensorValue) -> list[TensorValue]:
        return [self.attn.by_kernel(q, KeyValue(k_new, v_new), cache=Cache(**cache))]

    def written_out(
        self, q: TensorValue, k_new: TensorValue, v_new: TensorValue, **cached: TensorValue
    ) -> tuple[TensorValue, ...]:
        """Returns what takes the kernels' place in faults."""
        kv, cache = KeyValue(k_new, v_new), Cache(**cached)
        scores = self.attn.heads_attention(q, cache.followed_by(kv), None)[SCORES]
        return self.attn.written_out(q, kv, cache=cache), scores

    def in_place(self, q: TensorValue, k_new: TensorValue, v_new: TensorValue, **slots: Any) -> list[TensorValue]:
        qkv = ops.concat([q, *(x.reshape(q.shape) for x in (k_new, v_new))], axis=2)
        return [self.attn.attend_in_place(qkv, Slots(n_past=slots.pop("length"), **slots))]

    def split(self, q: TensorValue, k: TensorValue, v: TensorValue) -> list[TensorValue]:
        return [self.attn.split_attention("split_attention", q, *tokens_first(KeyValue(k, v)))]

    def device_scores(self, q: TensorValue, k: TensorValue, v: TensorValue) -> list[TensorValue]:
        kv = KeyValue(k, v)
        return [self.attn.scores("maxwhisper.device_scores", q, kv, tokens_first(kv)[0])]

    def causal(self, q: TensorValue, k: TensorValue, v: TensorValue) -> list[TensorValue]:
        return [self.attn.by_kernel(q, KeyValue(k, v), causal_mask(q.shape[1], self.attn.policy))]

    @property
    def attn(self) -> MultiHeadAttention:
        """Returns one without weights of its own: a graph would want their values."""
        policy = Policy(DeviceRef.CPU(), DType.float32, DType.float32)
        return MultiHeadAttention(2 * N_CHANNEL, 2, policy)

    def __call__(self) -> None:
        raise NotImplementedError


def of_dtype(inputs: dict[str, TensorType], dtype: DType) -> dict[str, TensorType]:
    return {name: TensorType(dtype, kind.shape, kind.device) for name, kind in inputs.items()}


def attentions() -> list[Program]:
    cpu = DeviceRef.CPU()

    def queries(state: str | int, number: str | int = 1) -> dict[str, TensorType]:
        return {"q": TensorType(DType.float32, ["batch", number, state], cpu)}

    def heads(rows: str, places: str | int, n_head: str | int = "head") -> TensorType:
        return TensorType(DType.float32, [rows, n_head, places, N_CHANNEL], cpu)

    def behind_a_cache(n_head: str | int) -> dict[str, TensorType]:
        places, new = heads("batch", "place", n_head), heads("batch", 1, n_head)
        return {"k": places, "v": places, "length": length, "k_new": new, "v_new": new}

    length, lengths = TensorType(DType.int64, [], cpu), TensorType(DType.int64, ["batch"], cpu)
    cross = {**queries("state"), "k": heads("row", "key"), "v": heads("row", "key")}
    cached = {**queries("state"), **behind_a_cache("head")}
    scattered = {**cached, "rows": TensorType(DType.int64, ["batch", "position"], cpu)}
    written_out = {**queries(2 * N_CHANNEL), **behind_a_cache(2)}
    slot = TensorType(DType.float32, ["batch", "place", 2, N_CHANNEL], cpu)
    in_place = {**written_out, "k": slot, "v": slot, "length": lengths}
    in_place |= {f"{name}_written": slot.as_buffer() for name in "kv"}
    in_place["rows"] = TensorType(DType.int64, ["batch", "place"], cpu)
    many = {**cross, **queries("state", "token")}
    half = of_dtype(many, DType.bfloat16)
    audio = {**cross, **queries("state", N_FRAME)}
    causal = {**many, **dict.fromkeys(("k", "v"), heads("row", "token"))}
    return [
        Program("many", "", Attention(), Attention.scores, many),
        Program("many, bfloat16", "", Attention(), Attention.scores, half),
        *(Program(f"audio, {d.name}", "", Attention(), Attention.cross, of_dtype(audio, d)) for d in AUDIO),
        Program("causal", "", Attention(), Attention.causal, causal),
        Program("cross", "", Attention(), Attention.cross, cross),
        Program("cached", "", Attention(), Attention.cached, cached),
        Program("of other lengths", "", Attention(), Attention.cached, {**cached, "length": lengths}),
        Program("of other rows", "", Attention(), Attention.cached, scattered),
        Program("written out", "", Attention(), Attention.written_out, written_out),
        Program("in place", "", Attention(), Attention.in_place, in_place),
        Program("device scores", "", Attention(), Attention.device_scores, many),
        *(Program(f"split, {d.name}", "", Attention(), Attention.split, of_dtype(cross, d)) for d in DTYPES),
    ]


def expected(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> list[Tensor]:
    """Computes attention, and its scores; k and v are repeated for the texts that share them."""
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
    comparison, terms = Comparison("a kernel", q.dtype, name, 0, "random", "cpu"), max(k.shape[2], N_CHANNEL)

    def made(given: dict[str, Tensor]) -> list[Tensor]:
        return [expected(**given, causal=causal)[output]]

    given = {"q": q, "k": k, "v": v}
    exactly = in_float64(given)
    three, sizes = (made(exactly), made(given), [ours[output]]), {"longest_reduction": terms, "roundings": ROUNDINGS}
    judged = partial(judge, comparison, *three, n_vocab=0, **sizes)
    if not (found := judged()).passed:  # as of a block of the network
        found = judged(condition=condition(made, exactly, UNIT_ROUNDOFF[q.dtype]))
    assert found.passed, f"\n{found}"


SIZES = {"rows": st.integers(1, 3), "n_head": st.integers(1, 3), "seed": st.integers(0, 2**32 - 1)}


@settings(max_examples=60)
@given(shared=st.integers(1, 9), n_key=st.integers(1, 300), **SIZES)
def test_attention_of_texts_that_share_keys(rows: int, shared: int, n_head: int, n_key: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows * shared, 1, n_head * N_CHANNEL, generator=generator)
    k, v = torch.randn(2, rows, n_head, n_key, N_CHANNEL, generator=generator)
    check("cross", small_graphs()["cross"](q=q, k=k, v=v), q, k, v)


@settings(max_examples=60)
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
    check(name, small_graphs()[name](q=q, k=k, v=v), q, k, v, output=ATTENTION)
    q, k = q.abs(), k.abs()  # a score may be near 0 by chance else, and its relative error anything
    check(name, small_graphs()[name](q=q, k=k, v=v), q, k, v, output=SCORES)


@settings(max_examples=60)
@given(dtype=st.sampled_from(AUDIO), shared=st.integers(1, 2), n_key=st.integers(1, 600), **SIZES)
def test_attention_of_audio(dtype: DType, rows: int, shared: int, n_head: int, n_key: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows * shared, N_FRAME, n_head * N_CHANNEL, generator=generator).to(TORCH_DTYPE[dtype])
    k, v = torch.randn(2, rows, n_head, n_key, N_CHANNEL, generator=generator).to(TORCH_DTYPE[dtype])
    name = f"audio, {dtype.name}"
    check(name, small_graphs()[name](q=q, k=k, v=v), q, k, v)


@settings(max_examples=60)
@given(n_token=st.integers(2, 300), **SIZES)
def test_causal_attention(rows: int, n_head: int, n_token: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, n_token, n_head * N_CHANNEL, generator=generator)
    k, v = torch.randn(2, rows, n_head, n_token, N_CHANNEL, generator=generator)
    check("causal", small_graphs()["causal"](q=q, k=k, v=v), q, k, v, causal=True)


@settings(max_examples=60)
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


@settings(max_examples=60)
@given(n_position=st.integers(1, 300), rows=st.integers(1, 4), data=st.data())
def test_attention_behind_a_cache_in_place(n_position: int, rows: int, data: st.DataObject) -> None:
    """Each key and value is in any row, but the new ones in the text's own."""
    n_past = torch.tensor([data.draw(st.integers(0, n_position - 1)) for _ in range(rows)])
    q, k_new, v_new = torch.randn(rows, 1, 2 * N_CHANNEL), *torch.randn(2, rows, 2, 1, N_CHANNEL)
    caches = torch.randn(2, rows, n_position, 2, N_CHANNEL)
    caches[:, :, torch.arange(n_position) > n_past.max()] = float("nan")  # which nobody may read
    there, own = torch.randint(0, rows, (rows, n_position)), torch.arange(rows)
    there[own, n_past] = own
    there[torch.arange(n_position) > n_past[:, None]] = 1 << 40  # nor this
    before = caches.clone()
    given = {"q": q, "length": n_past, "k_new": k_new, "v_new": v_new, "rows": there}
    given |= {name + written: kv for name, kv in zip("kv", caches, strict=True) for written in ("", "_written")}
    (ours,) = small_graphs()["in place"](**given)
    before[:, own, n_past] = torch.stack([k_new, v_new])[:, :, :, 0]
    for row, place in enumerate(n_past.tolist()):
        k, v = before[:, there[row, : place + 1], torch.arange(place + 1)].unsqueeze(1).transpose(2, 3)
        check("in place", [ours[row : row + 1]], q[row : row + 1], k, v)
    assert torch.equal(caches.nan_to_num(), before.nan_to_num())


def check_cached(
    graph: str, rows: int, n_head: int, n_past: int, n_free: int, seed: int, output: int = ATTENTION
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, 1, n_head * N_CHANNEL, generator=generator)
    k, v = torch.randn(2, rows, n_head, n_past + 1, N_CHANNEL, generator=generator)
    if output == SCORES:
        q, k = q.abs(), k.abs()
    nothing = torch.full((rows, n_head, n_free, N_CHANNEL), float("nan"))
    given = {"q": q, "length": torch.tensor(n_past)}
    for name, kv in {"k": k, "v": v}.items():
        given |= {name: torch.cat([kv[:, :, :n_past], nothing], 2), f"{name}_new": kv[:, :, n_past:]}
    ours = small_graphs()[graph](**given)
    check(graph, ours, q, k, v, output=output)


@settings(max_examples=60)
@given(dtype=st.sampled_from(DTYPES), shared=st.integers(1, 3), n_key=st.integers(1, 300), **SIZES)
def test_attention_over_parts_of_the_keys(
    dtype: DType, rows: int, shared: int, n_head: int, n_key: int, seed: int
) -> None:
    """Takes the parts one after the other, where a GPU takes them at once."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows * shared, 1, n_head * N_CHANNEL, generator=generator).to(TORCH_DTYPE[dtype])
    k, v = torch.randn(2, rows, n_head, n_key, N_CHANNEL, generator=generator).to(TORCH_DTYPE[dtype])
    name = f"split, {dtype.name}"
    check(name, small_graphs()[name](q=q, k=k, v=v), q, k, v)


def test_parts_that_differ_by_more_than_float32_holds() -> None:
    """A part whose weights vanish beside another's leaves nothing, and no NaN; nor does one without any."""
    q, v = torch.ones(1, 1, N_CHANNEL), torch.randn(1, 1, 150, N_CHANNEL)
    k = torch.zeros(1, 1, 150, N_CHANNEL)
    k[:, :, 70] = 1000
    k[:, :, :PART] = k[:, :, 140:] = -float("inf")
    assert small_graphs()["split, float32"](q=q, k=k, v=v)[0].equal(v[:, :, 70])


@settings(max_examples=20)
@given(shared=st.integers(1, 3), n_token=st.integers(1, 20), n_key=st.integers(1, 90), **SIZES)
def test_scores_as_a_gpu_computes_them(
    rows: int, shared: int, n_head: int, n_token: int, n_key: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(rows * shared, n_token, n_head * N_CHANNEL, generator=generator)
    k, v = torch.rand(2, rows, n_head, n_key, N_CHANNEL, generator=generator)
    ours = small_graphs()["device scores"](q=q, k=k, v=v)
    check("device scores", [ours[0], *ours], q, k, v, output=SCORES)


def test_attention_of_a_text_is_bitwise_the_same_among_any_others() -> None:
    q, (k, v) = torch.randn(11, 1, 6 * N_CHANNEL), torch.randn(2, 1, 6, 1500, N_CHANNEL)
    (together,) = small_graphs()["cross"](q=q, k=k, v=v)
    assert together.equal(torch.cat([small_graphs()["cross"](q=each[None], k=k, v=v)[0] for each in q]))


def test_a_query_is_bitwise_the_same_among_any_others() -> None:
    q, (k, v) = torch.randn(3, 400, 2 * N_CHANNEL), torch.randn(2, 3, 2, 131, N_CHANNEL)
    together, _ = small_graphs()["many"](q=q, k=k, v=v)
    for text, n_token in ((0, 400), (1, 399), (2, 5)):
        row = slice(text, text + 1)
        alone, _ = small_graphs()["many"](q=q[row, -n_token:], k=k[row], v=v[row])
        assert together[text : text + 1, -n_token:].equal(alone)


def test_audio_is_bitwise_the_same_among_any_others() -> None:
    q, (k, v) = torch.randn(3, N_FRAME, 2 * N_CHANNEL), torch.randn(2, 3, 2, 301, N_CHANNEL)
    (together,) = small_graphs()["audio, float32"](q=q, k=k, v=v)
    rows = [slice(row, row + 1) for row in range(3)]
    alone = [small_graphs()["audio, float32"](q=q[row], k=k[row], v=v[row])[0] for row in rows]
    assert together.equal(torch.cat(alone))


def test_keys_that_nobody_can_attend_to_leave_the_others() -> None:
    """So many that no other is among those that are computed at a time."""
    q, v = torch.ones(1, N_FRAME, N_CHANNEL), torch.randn(1, 1, 301, N_CHANNEL)
    k = torch.zeros(1, 1, 301, N_CHANNEL)
    k[:, :, :300] = -float("inf")
    assert small_graphs()["audio, float32"](q=q, k=k, v=v)[0].equal(v[:, 0, 300].expand(q.shape))


WAYS = {
    "cross": 1,
    "split, float32": 1,
    "many": 7,
    "many, bfloat16": 7,
    "audio, float32": N_FRAME,
    "audio, bfloat16": N_FRAME,
}
"""How many queries a graph is given, by name."""


@pytest.mark.parametrize("n_key", [5, 100, 131, 300])
@pytest.mark.parametrize("name", WAYS)
def test_a_key_that_outweighs_all_others_is_found(name: str, n_key: int) -> None:
    """Wherever it stands: by less than its score float32's exponentials overflow."""
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    q = torch.ones(1, WAYS[name], N_CHANNEL, dtype=dtype)
    v = torch.randn(1, 1, n_key, N_CHANNEL).to(dtype)
    for place in (0, n_key // 2, n_key - 1):
        k = torch.zeros_like(v)
        k[:, :, place] = 1000
        assert small_graphs()[name](q=q, k=k, v=v)[0].equal(v[:, 0, place].expand(q.shape))


@pytest.mark.parametrize("n_key", [5, 100, 131, 300])
@pytest.mark.parametrize("name", WAYS)
def test_a_key_that_is_no_number_is_seen(name: str, n_key: int) -> None:
    """Wherever it stands among those that are compared with each other for the greatest score."""
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    q, (k, v) = torch.ones(1, WAYS[name], N_CHANNEL, dtype=dtype), torch.ones(2, 1, 1, n_key, N_CHANNEL)
    for place in (0, n_key // 2, n_key - 1):
        broken = k.to(dtype)
        broken[:, :, place] = float("nan")
        assert small_graphs()[name](q=q, k=broken, v=v.to(dtype))[0].isnan().all()


def test_texts_of_other_lengths_attend_as_they_do_alone() -> None:
    lengths, given = [5, 0, 17, 1], {"q": torch.randn(4, 1, 3 * N_CHANNEL)}
    given |= {name: torch.randn(4, 3, n, N_CHANNEL) for name, n in {"k": 20, "v": 20, "k_new": 1, "v_new": 1}.items()}
    (together,) = small_graphs()["of other lengths"](length=torch.tensor(lengths), **given)
    rows = [{name: x[i : i + 1] for name, x in given.items()} for i in range(4)]
    alone = [small_graphs()["cached"](length=torch.tensor(n), **row)[0] for row, n in zip(rows, lengths, strict=True)]
    assert together.equal(torch.cat(alone))


@settings(max_examples=60)
@given(n_past=st.integers(0, 300), **SIZES)
def test_places_may_be_read_from_any_row(rows: int, n_head: int, n_past: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k_new, v_new = (torch.randn(rows, *shape, generator=generator) for shape in (
        (1, n_head * N_CHANNEL), (n_head, 1, N_CHANNEL), (n_head, 1, N_CHANNEL)
    ))  # fmt: skip
    k, v = torch.randn(2, rows, n_head, n_past + 2, N_CHANNEL, generator=generator)
    rows = torch.randint(0, rows, (rows, n_past + 2), generator=generator)
    gathered = {name: x[rows, :, torch.arange(n_past + 2)].transpose(1, 2) for name, x in {"k": k, "v": v}.items()}
    given = {"q": q, "length": torch.tensor(n_past), "k_new": k_new, "v_new": v_new}
    (ours,) = small_graphs()["of other rows"](k=k, v=v, rows=rows, **given)
    assert ours.equal(small_graphs()["cached"](**gathered, **given)[0])
