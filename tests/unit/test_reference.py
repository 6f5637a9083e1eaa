"""The judge's own parts: the oracle computes in float64, the twins are openai-whisper, the verdict can fail."""

import math

import numpy as np
import pytest
import torch
from whisper.model import ModelDimensions, Whisper

from maxwhisper.blocks import BLOCKS
from reference.blocks import TWINS, decoder, decoder_keys_values, pytorch_whisper
from reference.judge import Judgement, judge

DIMS = ModelDimensions(
    n_mels=4, n_audio_ctx=10, n_audio_state=8, n_audio_head=2, n_audio_layer=1,
    n_vocab=30, n_text_ctx=12, n_text_state=8, n_text_head=2, n_text_layer=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Whisper(DIMS)
    torch.nn.init.normal_(model.decoder.positional_embedding)
    return model.state_dict()


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
    """Against formulas written down independently in NumPy: anything float32 on the way would show at 1e-8."""
    oracle = pytorch_whisper(DIMS, tensors, torch.float64)
    exact = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    x = np.random.default_rng(0).standard_normal((10, DIMS.n_audio_state))
    block = oracle.encoder.blocks[0]

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {n.removeprefix(prefix): t for n, t in exact.items() if n.startswith(prefix)}

    ln, mlp, attn = (part(f"encoder.blocks.0.{name}.") for name in ("attn_ln", "mlp", "attn"))
    hidden = gelu(x @ mlp["0.weight"].T + mlp["0.bias"])
    expected = {
        "layer norm": (block.attn_ln, layer_norm(x, ln["weight"], ln["bias"])),
        "mlp": (block.mlp, hidden @ mlp["2.weight"].T + mlp["2.bias"]),
        "attention": (lambda y: block.attn(y)[0], attention(x, attn, DIMS.n_audio_head)),
    }
    ulps = 100 * np.finfo(np.float64).eps  # of values near 1, after sums of at most 32 terms
    for name, (module, wanted) in expected.items():
        got = module(torch.from_numpy(x).unsqueeze(0))[0].numpy()
        assert np.abs(got - wanted).max() < ulps * max(1, np.abs(wanted).max()), name


def test_oracle_convolves_in_float64(tensors: dict[str, torch.Tensor]) -> None:
    oracle = pytorch_whisper(DIMS, tensors, torch.float64)
    weight, bias = (tensors[f"encoder.conv2.{name}"].double().numpy() for name in ("weight", "bias"))
    x = np.random.default_rng(0).standard_normal((DIMS.n_audio_state, 20))
    padded = np.pad(x, ((0, 0), (1, 1)))
    wanted = np.stack([np.tensordot(weight, padded[:, t : t + 3], 2) + bias for t in range(0, 20, 2)], 1)
    got = oracle.encoder.conv2(torch.from_numpy(x).unsqueeze(0))[0].numpy()
    assert np.abs(got - wanted).max() < 100 * np.finfo(np.float64).eps * np.abs(wanted).max()


def verdict(oracle: torch.Tensor, peer: torch.Tensor, subject: torch.Tensor) -> Judgement:
    return judge(
        [oracle], [peer], [subject],
        block="b", size="s", layer=0, dtype=torch.float32, inputs="i", longest_reduction=64,
    )  # fmt: skip


def test_peer_in_the_subjects_place_passes() -> None:
    oracle = torch.randn(3, 50, 16, dtype=torch.float64)
    assert verdict(oracle, oracle.float(), oracle.float()).passed


def test_one_wrong_position_fails() -> None:
    oracle = torch.randn(1, 1500, 16, dtype=torch.float64)
    subject = oracle.float()
    subject[0, 700] = subject[0, 701]
    judgement = verdict(oracle, oracle.float(), subject)
    assert not judgement.passed
    assert "FAILED" in str(judgement)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_fail(value: float) -> None:
    oracle = torch.randn(1, 5, 4, dtype=torch.float64)
    subject = oracle.float()
    subject[0, 0, 0] = value
    assert not verdict(oracle, oracle.float(), subject).passed


def test_defects_fail() -> None:
    oracle = torch.randn(1, 5, 4, dtype=torch.float64)
    right = oracle.float()
    assert not verdict(oracle, right, right[:, :4]).passed  # shape
    assert not verdict(oracle, right, right.double()).passed  # dtype
    assert not verdict(right, right, right).passed  # an oracle that is not float64
    assert not verdict(oracle[:, :0], right[:, :0], right[:, :0]).passed  # empty
    nothing = judge([], [], [], block="b", size="s", layer=0, dtype=torch.float32, inputs="i", longest_reduction=1)
    assert not nothing.passed
    missing = judge(
        [oracle, oracle], [right, right], [right],
        block="b", size="s", layer=0, dtype=torch.float32, inputs="i", longest_reduction=1,
    )  # fmt: skip
    assert not missing.passed
