"""The judge's own parts: the oracle computes in float64, the twins are openai-whisper, the verdict can fail."""

import base64
import gzip
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from max.graph import Module as GraphModule
from torch import Tensor
from whisper.model import ModelDimensions

from maxwhisper.compare.material import random_weights
from maxwhisper.engine.program import Program
from maxwhisper.network.blocks import BLOCKS
from reference import mistakes
from reference.blocks import TWINS, decoder, decoder_keys_values, pytorch_whisper
from reference.diagnosis import diagnose
from reference.faults import Fault, faulty
from reference.graph_faults import graph_faults
from reference.judge import UNIT_ROUNDOFF, Comparison, Condition, Judgement, K, Measure, Output, condition, judge
from reference.models import FIXTURE, load
from reference.suite import Suite
from reference.transcripts import Yardstick
from reference.weight_faults import weight_faults

DIMS = ModelDimensions(
    n_mels=4, n_audio_ctx=10, n_audio_state=8, n_audio_head=2, n_audio_layer=1,
    n_vocab=30, n_text_ctx=12, n_text_state=8, n_text_head=2, n_text_layer=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_weights(DIMS)


def test_every_block_has_a_twin() -> None:
    assert TWINS.keys() == BLOCKS.keys()


def test_decoder_twin_is_openais_forward(tensors: dict[str, torch.Tensor]) -> None:
    model = pytorch_whisper(DIMS, tensors, torch.float32)
    tokens, features = torch.randint(0, DIMS.n_vocab, (1, 5)), torch.randn(1, DIMS.n_audio_ctx, DIMS.n_audio_state)
    values = decoder_keys_values(model, 0, features)
    names = [f"{kind}_cross.{layer}" for layer in range(DIMS.n_text_layer) for kind in "kv"]
    logits = decoder(model, 0, tokens, **dict(zip(names, values, strict=True)))[0]
    assert torch.equal(logits, model.decoder(tokens, features))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def attention(x: np.ndarray, weights: dict[str, np.ndarray], n_head: int) -> np.ndarray:
    q, k, v = (x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0) for name in ("query", "key", "value"))
    n_channel = x.shape[-1] // n_head
    out = []
    for head in range(n_head):
        columns = slice(head * n_channel, (head + 1) * n_channel)
        scores = q[:, columns] @ k[:, columns].T / math.sqrt(n_channel)
        exp = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(exp / exp.sum(-1, keepdims=True) @ v[:, columns])
    return np.concatenate(out, -1) @ weights["out.weight"].T + weights["out.bias"]


def test_oracle_computes_in_float64(tensors: dict[str, torch.Tensor]) -> None:
    """Against formulas written down independently in NumPy."""
    oracle, single = (pytorch_whisper(DIMS, tensors, dtype) for dtype in (torch.float64, torch.float32))
    exact = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    x = np.random.default_rng(0).standard_normal((10, DIMS.n_audio_state))
    blocks = oracle.encoder.blocks[0], single.encoder.blocks[0]

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {n.removeprefix(prefix): t for n, t in exact.items() if n.startswith(prefix)}

    ln, mlp, attn = (part(f"encoder.blocks.0.{name}.") for name in ("attn_ln", "mlp", "attn"))
    hidden = gelu(x @ mlp["0.weight"].T + mlp["0.bias"])
    expected = {
        "attn_ln": layer_norm(x, ln["weight"], ln["bias"]),
        "mlp": hidden @ mlp["2.weight"].T + mlp["2.bias"],
        "attn": attention(x, attn, DIMS.n_audio_head),
    }
    for name, wanted in expected.items():
        check_oracle(x, wanted, *(block.get_submodule(name) for block in blocks))


def check_oracle(x: np.ndarray, wanted: np.ndarray, oracle: torch.nn.Module, single: torch.nn.Module) -> None:
    """Holds it as near to NumPy's result as the same module in float32 is, but in roundings of float64."""
    given = torch.from_numpy(x)[None]
    made = (each[0] if isinstance(each, tuple) else each for each in (oracle(given), single(given.float())))
    error, yardstick = (np.abs(each[0].detach().numpy() - wanted).max() / torch.finfo(each.dtype).eps for each in made)
    assert error <= K * yardstick


def test_oracle_convolves_in_float64(tensors: dict[str, torch.Tensor]) -> None:
    oracle, single = (pytorch_whisper(DIMS, tensors, dtype) for dtype in (torch.float64, torch.float32))
    weight, bias = (tensors[f"encoder.conv2.{name}"].double().numpy() for name in ("weight", "bias"))
    x = np.random.default_rng(0).standard_normal((DIMS.n_audio_state, 20))
    padded = np.pad(x, ((0, 0), (1, 1)))
    wanted = np.stack([np.tensordot(weight, padded[:, t : t + 3], 2) + bias for t in range(0, 20, 2)], 1)
    check_oracle(x, wanted, oracle.encoder.conv2, single.encoder.conv2)


COMPARISON = Comparison("s", torch.float32, "b", 0, "i")


def verdict(oracle: torch.Tensor, peer: torch.Tensor, subject: torch.Tensor, n_vocab: int | None = None) -> Judgement:
    return judge(COMPARISON, [oracle], [peer], [subject], longest_reduction=64, n_vocab=n_vocab)


def test_peer_in_the_subjects_place_passes() -> None:
    oracle = torch.randn(3, 50, 16, dtype=torch.float64)
    assert verdict(oracle, oracle.float(), oracle.float(), n_vocab=16).passed


def failed(judgement: Judgement) -> set[str]:
    return {measure.name for _, measure in judgement.measures if not measure.passed}


def test_one_wrong_position_fails() -> None:
    oracle = torch.randn(1, 1500, 16, dtype=torch.float64)
    subject = oracle.float()
    subject[0, 700] = subject[0, 701]
    judgement = verdict(oracle, oracle.float(), subject)
    assert "worst position" in failed(judgement)
    assert "FAILED" in str(judgement)


def test_one_wrong_channel_fails() -> None:
    oracle = torch.randn(1, 1500, 16, dtype=torch.float64)
    subject = oracle.float()
    subject[..., 3] *= 1.001
    assert "worst channel" in failed(verdict(oracle, oracle.float(), subject))


def test_an_error_below_rounding_fails_where_every_position_has_it() -> None:
    oracle = torch.randn(1, 1500, 16, dtype=torch.float64)
    peer, constant = oracle.bfloat16(), torch.zeros(16)
    constant[3] = torch.finfo(torch.bfloat16).eps / 2
    subject = (oracle + constant).bfloat16()
    comparison = replace(COMPARISON, dtype=torch.bfloat16)
    right, wrong = (judge(comparison, [oracle], [peer], [x], longest_reduction=64) for x in (peer, subject))
    assert right.passed and failed(wrong) == {"worst channel's mean"}


def test_measures_are_what_their_names_say() -> None:
    """By hand, of one value that is three too small where one channel is ones and all others are twos."""
    oracle = torch.full((4, 8), 2.0).double()
    oracle[:, 5] = 1
    subject = oracle.float()
    subject[2, 5] -= 3
    rms, rms_of_small = (29 / 8) ** 0.5, (13 / 4) ** 0.5
    assert {measure.name: measure.subject for _, measure in verdict(oracle, oracle.float(), subject).measures} == {
        "relative L2": pytest.approx((9 / 32) ** 0.5 / rms),
        "worst position": pytest.approx((9 / 8) ** 0.5 / rms),
        "worst channel": pytest.approx((9 / 4) ** 0.5 / rms),
        "worst small channel": pytest.approx((9 / 4) ** 0.5 / rms_of_small),
        "worst channel's mean": pytest.approx(3 / 4 / rms),
        "largest error / RMS": pytest.approx(3 / rms),
    }


@pytest.mark.parametrize(("dtype", "u"), [(torch.float32, 2**-24), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_budgets_and_ceilings_are_those_of_the_derivation(dtype: torch.dtype, u: float) -> None:
    """Where PyTorch is exact, of 9 roundings in a row and 16 terms, over ones at 50 positions of 16 channels."""
    ones, u32 = torch.ones(50, 16), 2**-24
    of, three = replace(COMPARISON, dtype=dtype), ([ones.double()], [ones.to(dtype)], [ones.to(dtype)])
    values, logits = (judge(of, *three, longest_reduction=16, roundings=9, n_vocab=n).outputs[0] for n in (None, 16))
    rounding, explained = 1 / math.sqrt(8 * math.log(2)), 3 * u + 4 * u32
    at_50, of_8, of_16, of_800 = (math.sqrt(2 * math.log(n)) for n in (50, 8, 16, 800))
    least, of_mean = 4 * rounding * 3 * u, 4 * rounding * max(3 * u / 50**0.5, 2 * u32)
    assert {measure.name: (measure.budget, measure.ceiling) for measure in values.measures} == {
        "relative L2": pytest.approx((least, 4 * explained)),
        "worst position": pytest.approx((explained * at_50, math.inf)),
        "worst channel": pytest.approx((least * of_16, 4 * explained * of_16)),
        "worst small channel": pytest.approx((least * of_8, math.inf)),
        "worst channel's mean": pytest.approx((of_mean * of_16, math.inf)),
        "largest error / RMS": pytest.approx((explained * of_800, 4 * explained * of_800)),
    }
    of_one = 4 * rounding * max(3 * u, 2 * 3 * u32)
    assert {measure.name: measure.budget for measure in logits.measures[6:]} == {
        "KL mean": pytest.approx(of_one**2 / 2),
        "KL max": pytest.approx(of_one**2 / 2),
        "top-1 margin": pytest.approx(2 * of_one),
        "top-1 disagreement": 1,
    }


def test_another_first_choice_is_let_pass_only_where_two_are_close() -> None:
    oracle = torch.zeros(4, 8).double()
    oracle[:, 0], oracle[:3, 1], oracle[3, 1] = 1, 0.5, 1
    found = verdict(oracle, oracle.float(), oracle.float(), n_vocab=8)
    assert found.outputs[0]["top-1 disagreement"].budget == 1 / 4


@pytest.mark.parametrize("position", [5, 7, 19])
def test_probabilities_that_differ_fail(position: int) -> None:
    """A logit that is raised makes another first choice, and other probabilities."""
    oracle = torch.randn(1, 20, 100, dtype=torch.float64)
    subject = oracle.float()
    subject[0, position, 7] = oracle.max() + 1
    names = {"KL mean", "KL max", "top-1 margin", "top-1 disagreement"}
    assert failed(verdict(oracle, oracle.float(), subject, n_vocab=100)) >= names
    assert not names & {m.name for _, m in verdict(oracle, oracle.float(), subject, n_vocab=99).measures}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_fail(value: float) -> None:
    oracle = torch.randn(1, 5, 4, dtype=torch.float64)
    for place in range(3):
        three = [oracle.clone(), oracle.float(), oracle.float()]
        three[place][0, 0, 0] = value
        judgement = verdict(*three)
        assert not judgement.passed and "not finite" in str(judgement)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_measure_that_is_no_number_is_the_worst(place: int) -> None:
    measures = [Measure(name, error, 1.0, 2.0) for name, error in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    measures[place] = replace(measures[place], name="relative L2", subject=math.nan)
    judgement = Judgement(COMPARISON, (Output(0, (1,), tuple(measures)),), ())
    assert not judgement.passed and judgement.worst is measures[place]


def test_defects_fail() -> None:
    oracle = torch.randn(1, 5, 4, dtype=torch.float64)
    right = oracle.float()
    assert not verdict(oracle, right, right[:, :4]).passed  # shape
    assert not verdict(oracle, right, right.double()).passed  # dtype
    assert not verdict(right, right, right).passed  # an oracle that is not float64
    assert not verdict(oracle[:, :0], right[:, :0], right[:, :0]).passed  # empty
    assert not judge(COMPARISON, [], [], [], longest_reduction=1).passed
    assert not judge(COMPARISON, [oracle, oracle], [right, right], [right], longest_reduction=1).passed


def test_the_error_to_expect_follows_the_dtype() -> None:
    """Where the peer is exact, one rounding to the dtype is allowed, and no rounding to a coarser one."""
    oracle = torch.randn(1, 50, 16, dtype=torch.float64).float().double()
    for dtype, coarser in ((torch.float32, torch.float16), (torch.float16, torch.bfloat16)):
        exact = oracle.to(dtype).double()
        comparison = replace(COMPARISON, dtype=dtype)

        def passes(subject: torch.Tensor, exact=exact, comparison=comparison, dtype=dtype) -> bool:
            return judge(comparison, [exact], [exact.to(dtype)], [subject.to(dtype)], longest_reduction=1).passed

        assert passes(exact)
        assert not passes(exact.to(coarser).double() * (1 + torch.finfo(coarser).eps))


# ---- PyTorch's transcripts, kept from run to run -------------------------------------------------------------------


class Counting:
    """Stands for a model's transcribe, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, audio: np.ndarray, **options: object) -> dict[str, object]:
        self.calls += 1
        return {"language": "en", "segments": [], "call": self.calls}


@pytest.fixture
def yardstick(
    tensors: dict[str, torch.Tensor], tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> Yardstick:
    model = pytorch_whisper(DIMS, tensors, torch.float32)
    monkeypatch.setattr(model, "transcribe", Counting(), raising=False)
    return Yardstick(model, pytest.Cache(tmp_path, pytestconfig, _ispytest=True))


AUDIO = np.arange(5, dtype=np.float32)


def test_a_transcript_is_made_once(yardstick: Yardstick) -> None:
    first = yardstick.transcribe(AUDIO, beam_size=5)
    assert Yardstick(yardstick.model, yardstick.memory).transcribe(AUDIO.copy(), beam_size=5) == first
    assert yardstick.model.transcribe.calls == 1
    assert Yardstick(yardstick.model, None).transcribe(AUDIO, beam_size=5) != first


CHANGES: dict[str, Callable[[Yardstick, pytest.MonkeyPatch], object]] = {
    "audio": lambda y, patch: patch.setattr(f"{__name__}.AUDIO", AUDIO + 1e-7),
    "weight": lambda y, patch: y.model.decoder.ln.bias.data[0].add_(1e-7),
    "alignment heads": lambda y, patch: y.model.set_alignment_heads(heads_dump()),
    "version": lambda y, patch: patch.setattr("reference.verdicts.version", lambda name: f"{name} 0"),
    "threads": lambda y, patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "instructions": lambda y, patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "none"),
    "precision": lambda y, patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
    "oneDNN's arithmetic": lambda y, patch: patch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
}


def heads_dump() -> bytes:
    heads = np.zeros((DIMS.n_text_layer, DIMS.n_text_head), dtype=bool)
    heads[0, 1] = True
    return base64.b85encode(gzip.compress(heads.tobytes()))


@pytest.mark.parametrize("changed", [*CHANGES, "option", "entry"])
def test_a_transcript_is_made_again_when_it_may_have_changed(
    yardstick: Yardstick, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yardstick.transcribe(AUDIO, beam_size=5)
    if changed in CHANGES:
        CHANGES[changed](yardstick, monkeypatch)
    if changed == "entry":
        (entry,) = (path for path in tmp_path.rglob("transcripts/*") if path.is_file())
        entry.write_text(entry.read_text()[:-5])
    again = Yardstick(yardstick.model, yardstick.memory)  # a later run's
    assert again.transcribe(AUDIO, beam_size=1 if changed == "option" else 5)["call"] == 2


# ---- what a failure looks like -------------------------------------------------------------------------------------


MISTAKES = {
    "scaled by 1.5": lambda x: x * 1.5,
    "a constant added": lambda x: x + 3,
    "a constant vector added": lambda x: x + torch.arange(x.shape[-1]),
    "shifted by one, to later": lambda x: x.roll(1, 1),
    "shifted by one, to earlier": lambda x: x.roll(-1, 1),
    "position and channel transposed": lambda x: x.transpose(1, 2).reshape(x.shape),
    "rows of the batch in reverse order": lambda x: x.flip(0),
    "heads permuted: [1, 0]": lambda x: torch.cat([x[..., 64:], x[..., :64]], -1),
    "channels of every head interleaved": lambda x: x.unflatten(-1, (64, 2)).transpose(-1, -2).flatten(-2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_recognised(mistake: str) -> None:
    oracle = torch.randn(2, 128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = diagnose(oracle, MISTAKES[mistake](oracle))
    assert found and mistake in found[0].name


def test_noise_is_not_taken_for_a_mistake() -> None:
    oracle = torch.randn(2, 128, 128, dtype=torch.float64)
    assert not diagnose(oracle, oracle + torch.randn_like(oracle))


# ---- tolerances ----------------------------------------------------------------------------------------------------


def test_no_test_holds_a_tolerance() -> None:
    """Budgets are derived by the judge."""
    words = r"\b[ar]tol\b|allclose|isclose|assert_close|assert_almost|assert_array_almost|pytest\.approx"
    pattern = re.compile(words + r"|finfo\(.*\.eps|np\.spacing|[<>]=? *\d*\.?\d+e-\d|abs\(.* [<>]=? *\d*\.?\d")
    files = [path for path in Path(__file__).parents[1].rglob("*.py") if path != Path(__file__)]
    assert files
    found = [
        f"{path.name}:{n}"
        for path in files
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


# ---- condition -----------------------------------------------------------------------------------------------------


def two_keys(gap: float, size: float) -> tuple[Callable[[dict[str, Tensor]], list[Tensor]], dict[str, Tensor]]:
    """Returns attention over two keys whose scores are `size` and nearly equal, as a function of the scores."""
    scores = torch.tensor([[size, size + gap]], dtype=torch.float64)
    return lambda x: [x["scores"].softmax(-1) @ torch.tensor([[1.0], [-1.0]]).double()], {"scores": scores}


def test_the_condition_of_a_product_is_one_and_that_of_a_close_decision_large() -> None:
    roundoff = UNIT_ROUNDOFF[torch.float32]
    weight, x = torch.randn(64, 64).double(), torch.randn(9, 64).double()
    product = condition(lambda given: [given["x"] @ weight], {"x": x}, roundoff)
    assert product.whole < 2 and product.largest < 8
    assert condition(*two_keys(1.0, 1.0), roundoff).whole < 4
    # One rounding moves each score by size * roundoff, and the softmax by as much as its difference of scores.
    assert condition(*two_keys(1.0, 1e4), roundoff).whole > 1e3


def test_a_condition_widens_what_a_lucky_peer_leaves() -> None:
    right = torch.randn(5, 8, dtype=torch.float64)
    off = right.float() * (1 + 1e-5)
    plain, wide = (
        judge(COMPARISON, [right], [right.float()], [off], longest_reduction=64, condition=Condition(c))
        for c in (1.0, 50.0)
    )
    assert not plain.passed
    assert wide.passed
    assert "50 times" in str(wide)
    for (_, before), (_, after) in zip(plain.measures, wide.measures, strict=True):
        assert after.budget > before.budget
    explained = UNIT_ROUNDOFF[torch.float32] * (1 + 64**0.5)
    assert wide.relative_l2.budget - plain.relative_l2.budget == pytest.approx(49 * explained)


# ---- faults --------------------------------------------------------------------------------------------------------


def test_there_are_at_least_forty_faults_each_in_a_block_of_its_own_name() -> None:
    faults = [*weight_faults(), *graph_faults()]
    assert len({fault.name for fault in faults}) == len(faults) >= 40
    assert {fault.block for fault in faults} <= BLOCKS.keys()


def traced(program: Program) -> str:
    module = GraphModule()
    replace(program, name="graph").trace(module)
    return str(module.mlir_module)


@pytest.mark.nightly
def test_every_graph_fault_changes_its_graph() -> None:
    suite = Suite(load(FIXTURE), torch.float32)

    def right(fault: Fault) -> Program:
        return BLOCKS[fault.block].program(suite.dims, suite.policy)

    no_fault = mistakes.written_out(nullcontext)  # other operations in the place of kernels, but right ones
    faults = list(graph_faults())
    graphs = {fault.block: traced(right(fault)) for fault in faults}
    written_out = {fault.block: traced(faulty(replace(fault, patched=no_fault), right(fault))) for fault in faults}
    for fault in faults:
        assert traced(faulty(fault, right(fault))) not in (graphs[fault.block], written_out[fault.block]), fault.name
    assert graphs == {fault.block: traced(right(fault)) for fault in faults}
