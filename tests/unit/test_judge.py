"""The verdict on anything that may be handed to it: right passes, wrong fails by any yardstick, and nothing raises."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maxwhisper.network.blocks import BLOCKS
from reference.activations import RANDOM
from reference.blocks import TWINS
from reference.judge import SMALLEST, UNIT_ROUNDOFF, Comparison, Condition, Judgement, condition, judge
from reference.measures import VALUES
from reference.models import trained
from reference.suite import Suite

DTYPES = list(UNIT_ROUNDOFF)
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "sign flipped": torch.neg,
    "doubled": lambda x: 2 * x,
    "zeroed": torch.zeros_like,
    "shuffled": lambda x: x.roll(1, -1),
    "another position's": lambda x: x.roll(1, 0),
}
OFF = WRONG | {"30 percent off": lambda x: 1.3 * x, "a tenth off": lambda x: 0.9 * x}

examples = settings(max_examples=60)
seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([2.0**-20, 2.0**-6, 1.0, 2.0**6])


def verdict(oracle: Tensor, peer: Tensor, subject: Tensor, dtype: torch.dtype = torch.float32) -> Judgement:
    of = Comparison("s", dtype, "b", 0, "i")
    n_vocab = oracle.shape[-1] if oracle.ndim else None
    return judge(of, [oracle], [peer], [subject], longest_reduction=64, roundings=3, n_vocab=n_vocab)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the yardstick -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peer", OFF)
def test_a_peer_that_is_wrong_is_no_yardstick(peer: str, dtype: torch.dtype) -> None:
    """Whatever the subject, a right one included."""
    oracle = normal(0, 30, 64)
    for subject in (oracle, *(change(oracle) for change in OFF.values())):
        found = verdict(oracle, OFF[peer](oracle).to(dtype), subject.to(dtype), dtype)
        assert not found.passed
        assert "the yardstick is bad: PyTorch is " in str(found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peer_that_is_wrong_in_one_position_or_channel_is_no_yardstick(dtype: torch.dtype) -> None:
    oracle = normal(0, 1500, 64)
    for place in ((700,), (slice(None), 3)):
        peer = oracle.clone()
        peer[place] *= -1
        found = verdict(oracle, peer.to(dtype), peer.to(dtype), dtype)
        assert not found.passed and found.bad_yardstick


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_position_whose_values_cancel_out_is_honestly_far_off(dtype: torch.dtype) -> None:
    """Relative to itself, after sums of values that are not small."""
    x, bias = normal(0, 30, 64), normal(1, 30, 64)
    bias[7] = -x[7] * (1 + 10 * UNIT_ROUNDOFF[dtype])
    peer = (x.to(dtype).float() + bias.float()).to(dtype)
    found = verdict(x + bias, peer, peer, dtype)
    assert found.passed and found.outputs[0]["worst position"].peer > UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_channel_is_not_lost_beside_a_large_one(dtype: torch.dtype) -> None:
    """As OpenAI's models have them: a hundred times as large as others, of which one is a tenth of the rest."""
    oracle = normal(0, 1500, 64)
    oracle[:, 3] *= 100
    oracle[:, 5] /= 10
    lost = oracle.clone()
    lost[:, 5] = 0
    right, wrong = (verdict(oracle, oracle.to(dtype), x.to(dtype), dtype) for x in (oracle, lost))
    assert right.passed and not wrong.outputs[0]["worst small channel"].passed


def test_what_the_condition_explains_is_rounding() -> None:
    oracle, noise = normal(0, 30, 64), normal(1, 30, 64)
    of = Comparison("s", torch.float32, "b", 0, "i")
    peer = (oracle + 100 * UNIT_ROUNDOFF[torch.float32] * noise).float()
    plain, explained = (
        judge(of, [oracle], [peer], [peer], longest_reduction=1, condition=Condition(times)) for times in (1.0, 128.0)
    )
    assert plain.bad_yardstick and not plain.passed and not plain.defects
    assert explained.passed
    for (_, before), (_, after) in zip(plain.measures, explained.measures, strict=True):
        assert after.ceiling == 128 * before.ceiling, "it counts once, and a power of two is exact"


@pytest.mark.parametrize("seed", [4, 18])
def test_one_value_that_is_badly_conditioned_is_no_bad_yardstick(seed: int) -> None:
    """Noise of which a band has nearly nothing: PyTorch's logarithm is a hundred roundings off there."""
    suite = Suite(trained(), torch.float32)
    [comparison] = suite.comparisons(BLOCKS["log_mel"], [RANDOM], seed)
    trial = suite.trial(comparison, torch.no_grad()(lambda **given: TWINS["log_mel"](suite.peer, 0, **given)))
    assert trial.judged().bad_yardstick and trial.judge().passed


def of_amplified(place: tuple[int, int], times: float, oracle: Tensor) -> Condition:
    """Returns the condition of a block that hands its inputs on, the value at one place amplified."""

    def amplify(given: dict[str, Tensor]) -> list[Tensor]:
        y = given["x"].clone()
        y[place] += (times - 1) * (y[place] - oracle[place])
        return [y]

    return condition(amplify, {"x": oracle}, UNIT_ROUNDOFF[torch.float32])


def test_a_single_value_of_the_peer_is_rounding_where_its_condition_says_so() -> None:
    oracle = normal(0, 30, 64)
    oracle[3, 5] = 2.0
    peer = oracle.float()
    peer[3, 5] += 1e-3
    of = Comparison("s", torch.float32, "b", 0, "i")
    for times, explained in ((1.0, False), (1e4, True)):
        amplified = of_amplified((3, 5), times, oracle)._replace(whole=1.0)
        found = judge(of, [oracle], [peer], [peer], longest_reduction=1, condition=amplified)
        for measure in ("largest error / RMS", "worst channel"):
            assert found.outputs[0][measure].sound == explained
        assert not found.outputs[0]["relative L2"].sound


@pytest.mark.parametrize(("error", "explained"), [(5e-4, True), (5e-2, False)])
def test_a_single_value_of_the_subject_may_be_as_far_off_as_its_condition_says(error: float, explained: bool) -> None:
    """Where the peer was lucky there, and one value is amplified ten thousand times: its channel is off with it."""
    oracle = normal(0, 300, 640)
    place = (int(oracle[:, 7].abs().argmax()), 7)
    oracle[:, 7] /= 4  # a small channel
    subject = oracle.float()
    subject[place] += error
    of = Comparison("s", torch.float32, "b", 0, "i")
    for times, passed in ((1.0, False), (1e4, explained)):
        amplified = of_amplified(place, times, oracle)
        found = judge(of, [oracle], [oracle.float()], [subject], longest_reduction=1, condition=amplified)
        for measure in set(VALUES) - {"worst position"}:  # of which there are enough to hold many such values
            assert (found.outputs[0][measure].used <= 1) == passed, measure


def test_a_chain_has_no_ceiling_but_the_subject_must_beat_zeros() -> None:
    """The errors of all blocks before are in it."""
    oracle = normal(0, 30, 64)
    of = Comparison("s", torch.float32, "b", 0, "i")
    peer, right, zeros = (oracle * 1.3).float(), oracle.float(), torch.zeros(30, 64)
    verdicts = [judge(of, [oracle], [peer], [x], longest_reduction=64, chained=True) for x in (right, zeros)]
    assert [verdict.passed for verdict in verdicts] == [True, False]


# ---- nothing to be relative to -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [(), (3,), (slice(None), 5)], ids=["all", "a position", "a channel"])
def test_where_the_oracle_is_zero_an_error_of_rounding_passes(zero: tuple) -> None:
    oracle = normal(0, 30, 64)
    oracle[zero] = 0
    subject = oracle.float()
    subject[zero] = 1e-8
    assert verdict(oracle, oracle.float(), subject).passed
    assert verdict(oracle, subject, oracle.float()).passed
    subject[zero] = 1e-3
    assert not verdict(oracle, oracle.float(), subject).passed


def test_budgets_are_never_zero() -> None:
    found = verdict(torch.zeros(30, 64).double(), torch.zeros(30, 64), torch.zeros(30, 64))
    assert all(measure.budget > 0 for _, measure in found.measures)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_too_small_for_the_dtype_may_be_flushed_to_zero(dtype: torch.dtype) -> None:
    oracle = normal(0, 30, 64) * torch.finfo(dtype).smallest_normal * UNIT_ROUNDOFF[dtype]
    assert verdict(oracle, oracle.to(dtype), torch.zeros(30, 64, dtype=dtype), dtype).passed
    assert verdict(oracle, torch.zeros(30, 64, dtype=dtype), oracle.to(dtype), dtype).passed
    large = oracle * SMALLEST[dtype] / oracle.abs().max()
    assert not verdict(large, large.to(dtype), torch.zeros(30, 64, dtype=dtype), dtype).passed


# ---- anything ------------------------------------------------------------------------------------------------------


values = st.sampled_from(
    [0.0, -0.0, 1.0, -2.5, 1e-45, 1e-40, 1e-8, 6e-5, 7e4, 3e38, 1e300, math.nan, math.inf, -math.inf]
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.mT if x.ndim > 1 else x,
    "every other": lambda x: x[..., ::2] if x.ndim else x,
    "expanded": lambda x: x.unsqueeze(0).expand(2, *x.shape),
    "with a gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
}


@st.composite
def tensors(draw: st.DrawFn, shape: list[int]) -> Tensor:
    if draw(st.integers(0, 9)) == 0:
        shape = draw(shapes)
    n = math.prod(shape)
    given = torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64).reshape(shape)
    dtype = draw(st.sampled_from([torch.float64, *DTYPES, torch.int64, torch.complex64]))
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](
        given.nan_to_num().to(dtype) if dtype == torch.int64 else given.to(dtype)
    )


shapes = st.lists(st.integers(0, 4), max_size=3)


@examples
@given(data=st.data(), shape=shapes, dtype=st.sampled_from(DTYPES))
def test_a_verdict_is_given_whatever_is_compared(data: st.DataObject, shape: list[int], dtype: torch.dtype) -> None:
    oracle, peer, subject = (data.draw(tensors(shape)) for _ in range(3))
    if data.draw(st.booleans()):
        oracle, peer, subject = (x.detach().real for x in (oracle, peer, subject))
        oracle, peer, subject = oracle.double(), peer.to(dtype), subject.to(dtype)
    found = verdict(oracle, peer, subject, dtype)
    assert found.passed in (True, False)
    assert found.passed or found.defects or any(not measure.passed for _, measure in found.measures)
    assert str(found)
    if not all(x.isfinite().all() for x in (oracle, peer, subject)):
        assert not found.passed and found.defects


COMPUTED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "values": (lambda x: x, lambda x: x.mT.contiguous().mT),
    "sums": (lambda x: x.cumsum(-1)[..., -1:] + x, lambda x: x.flip(-1).sum(-1, keepdim=True) + x),
    "softmax": (lambda x: x.softmax(-1), lambda x: x.exp() / x.exp().sum(-1, keepdim=True)),
    "layer norm": (
        lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
        lambda x: torch.nn.functional.layer_norm(x.flip(-1), x.shape[-1:]).flip(-1),
    ),
    "GELU": (torch.nn.functional.gelu, lambda x: x * (1 + torch.erf(x * 0.5**0.5)) / 2),
}
"""What PyTorch computes, and computes in another way."""


@examples
@given(seed=seeds, size=sizes, dtype=st.sampled_from(DTYPES), what=st.sampled_from(list(COMPUTED)), zeros=st.booleans())
def test_what_pytorch_computes_passes(seed: int, size: float, dtype: torch.dtype, what: str, zeros: bool) -> None:
    """In float32, as Whisper's own sums, norms and softmax are, and rounded to the dtype."""
    one, other = COMPUTED[what]
    x = (normal(seed, 2, 20, 64) * (min(size, 1.0) if what != "values" else size)).to(dtype)
    if zeros:
        x[:, 3] = 0
    peer, subject = one(x.float()).to(dtype), other(x.float()).to(dtype)
    found = verdict(one(x.double()), peer, subject, dtype)
    assert found.passed, f"\n{found}"


@examples
@given(
    seed=seeds,
    size=sizes,
    dtype=st.sampled_from(DTYPES),
    peer=st.sampled_from(["right", *OFF]),
    subject=st.sampled_from(list(WRONG)),
    condition=st.builds(Condition, *2 * [st.sampled_from([1.0, 1e3, 1e9])]),
)
def test_what_is_wrong_by_construction_never_passes(
    seed: int, size: float, dtype: torch.dtype, peer: str, subject: str, condition: Condition
) -> None:
    """By any yardstick, and under any condition."""
    oracle = normal(seed, 20, 64) * size
    theirs, ours = (change(oracle).to(dtype) for change in (OFF.get(peer, lambda x: x), WRONG[subject]))
    of = Comparison("s", dtype, "b", 0, "i")
    found = judge(of, [oracle], [theirs], [ours], longest_reduction=64, roundings=3, condition=condition)
    assert not found.passed
