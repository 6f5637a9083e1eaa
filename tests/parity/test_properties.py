"""What must hold whatever the shapes and values: on graphs compiled once, with symbolic dimensions.

A failing example is printed shrunk, with the line that reproduces it.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maxwhisper.network.blocks import BLOCKS
from maxwhisper.network.log_mel import LOG_MEL
from reference.activations import BATCH
from reference.chain import layers
from reference.inputs import moved
from reference.judge import Comparison, Judgement
from reference.suite import Suite
from reference.trial import Trial
from reference.verdicts import fingerprint

N_CONTEXT = 448

pytestmark = pytest.mark.trained

examples = settings(
    max_examples=8,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
seeds = st.integers(0, 2**32 - 1)


def run(suite: Suite, block: str, **inputs: Tensor) -> list[Tensor]:
    return [x.cpu() for x in suite.executable(BLOCKS[block], 0)(**moved(inputs, suite.torch_device))]


def random(suite: Suite, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(suite.dtype)


def random_tokens(suite: Suite, seed: int, *shape: int) -> Tensor:
    """Returns tokens of a real text: the fixture has one vector for all that it never saw."""
    known = suite.model.activations("speech").tokens.unique()
    return known[torch.randint(0, len(known), shape, generator=torch.Generator().manual_seed(seed))]


def cross_keys_values(suite: Suite, rows: slice) -> dict[str, Tensor]:
    """Returns those of real audio: some rows of several windows, for every layer in turn."""
    real = suite.model.activations(BATCH)
    names = [f"decoder.blocks.{layer}.cross_attn" for layer in range(suite.dims.n_text_layer)]
    return layers("cross", [table[name][rows].to(suite.dtype) for name in names for table in (real.keys, real.values)])


def expected(suite: Suite, block: str, ours: list[Tensor], **inputs: Tensor) -> Judgement:
    """Returns the verdict on `ours` where the right result is the twin's of these inputs, or that of an earlier run."""
    comparison = Comparison(suite.model.size, suite.dtype, block, 0, "property", suite.device)
    trial = Trial(suite, comparison, inputs, suite.executable(BLOCKS[block], 0))
    tensors = inputs | {f"output {index}": x for index, x in enumerate(ours)}
    (found,) = suite.recalled(comparison, tensors, lambda: [trial.judge(ours)], fingerprint(inputs))
    return found


@examples
@given(seed=seeds, batch=st.integers(2, 4), row=st.integers(0, 3))
def test_a_row_of_a_batch_of_audio_is_what_it_is_alone(suite: Suite, seed: int, batch: int, row: int) -> None:
    row %= batch
    mel = random(suite, seed, batch, suite.dims.n_mels, 2 * suite.dims.n_audio_ctx)
    together = run(suite, "encoder", mel=mel)[0][row : row + 1]
    found = expected(suite, "encoder", [together], mel=mel[row : row + 1])
    assert found.passed, f"\n{found}"


@examples
@given(seed=seeds, batch=st.integers(2, 6), length=st.integers(1, 40), row=st.integers(0, 5))
def test_a_row_of_a_batch_of_text_is_what_it_is_alone(
    suite: Suite, seed: int, batch: int, length: int, row: int
) -> None:
    row %= batch
    tokens = random_tokens(suite, seed, batch, length)
    cross = cross_keys_values(suite, slice(0, 1))
    together = [x[row : row + 1] for x in run(suite, "decoder.prefill", tokens=tokens, **cross)]
    found = expected(suite, "decoder.prefill", together, tokens=tokens[row : row + 1], **cross)
    assert found.passed, f"\n{found}"


@examples
@given(seed=seeds, per_window=st.integers(1, 5), length=st.integers(1, 12))
def test_texts_hear_their_own_window(suite: Suite, seed: int, per_window: int, length: int) -> None:
    """Consecutive texts share a window's keys and values, as beams do."""
    tokens = random_tokens(suite, seed, 2 * per_window, length)
    both = run(suite, "decoder.prefill", tokens=tokens, **cross_keys_values(suite, slice(0, 2)))
    for window in range(2):
        rows, cross = slice(window * per_window, (window + 1) * per_window), slice(window, window + 1)
        heard = cross_keys_values(suite, cross)
        found = expected(suite, "decoder.prefill", [x[rows] for x in both], tokens=tokens[rows], **heard)
        assert found.passed, f"\n{found}"


@examples
@given(seed=seeds, length=st.integers(2, 60), data=st.data())
def test_a_later_token_changes_nothing_before_it(suite: Suite, seed: int, length: int, data: Any) -> None:
    """Bitwise: what is masked has weight zero exactly."""
    cut = data.draw(st.integers(1, length - 1), label="first token that differs")
    tokens, cross = random_tokens(suite, seed, 1, length), cross_keys_values(suite, slice(0, 1))
    other = torch.cat([tokens[:, :cut], random_tokens(suite, seed ^ 1, 1, length - cut)], 1)
    one, two = (run(suite, "decoder.prefill", tokens=x, **cross)[0] for x in (tokens, other))
    assert torch.equal(one[:, :cut], two[:, :cut])
    if not torch.equal(tokens, other):
        assert not torch.equal(one[:, cut:], two[:, cut:])


@examples
@given(seed=seeds, length=st.integers(2, 30), data=st.data())
def test_cached_is_uncached(suite: Suite, seed: int, length: int, data: Any) -> None:
    """A prompt at once and the rest token by token, or the whole text at once."""
    n_prompt = data.draw(st.integers(1, length - 1), label="tokens in the prompt")
    check_steps(suite, random_tokens(suite, seed, 2, length), n_prompt)


@pytest.mark.parametrize("n_prompt", [pytest.param(1, marks=pytest.mark.nightly), N_CONTEXT - 48])
def test_cached_is_uncached_up_to_the_last_position(suite: Suite, n_prompt: int) -> None:
    check_steps(suite, random_tokens(suite, 0, 1, N_CONTEXT), n_prompt)


def check_steps(suite: Suite, tokens: Tensor, n_prompt: int) -> None:
    cross = cross_keys_values(suite, slice(0, 1))
    logits, *prompt = run(suite, "decoder.prefill", tokens=tokens[:, :n_prompt], **cross)
    found, cache = [logits], [kv.new_empty(*kv.shape[:2], tokens.shape[1], kv.shape[3]) for kv in prompt]
    put(prompt, cache, 0)
    for position in range(n_prompt, tokens.shape[1]):
        token = {"tokens": tokens[:, position : position + 1], "offset": torch.tensor(position)}
        logits, *new = run(suite, "decoder.step", **token, **layers("cache", cache), **cross)
        put(new, cache, position)
        found.append(logits)
    ours = [torch.cat(found, 1), *cache]
    judgement = expected(suite, "decoder.prefill", ours, tokens=tokens, **cross)
    assert judgement.passed, f"\n{judgement}"


def put(new: list[Tensor], cache: list[Tensor], position: int) -> None:
    for kv, there in zip(new, cache, strict=True):
        there[:, :, position : position + kv.shape[2]] = kv


@examples
@given(seed=seeds, length=st.integers(1, 12))
@pytest.mark.parametrize("block", ["decoder.cross_attention.prefill", "decoder.cross_attention.step"])
def test_the_order_of_keys_does_not_matter(suite: Suite, block: str, seed: int, length: int) -> None:
    cross = cross_keys_values(suite, slice(0, 1))
    k, v = cross["k_cross.0"], cross["v_cross.0"]
    x = random(suite, seed, 1, 1 if block.endswith("step") else length, suite.dims.n_text_state)
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed))
    permuted = run(suite, block, x=x, k_cross=k[:, :, order], v_cross=v[:, :, order])
    found = expected(suite, block, permuted, x=x, k_cross=k, v_cross=v)
    assert found.passed, f"\n{found}"


@examples
@given(seed=seeds, batch=st.integers(1, 3), length=st.integers(1, 30))
def test_a_run_repeats_itself_bitwise(suite: Suite, seed: int, batch: int, length: int) -> None:
    tokens, cross = random_tokens(suite, seed, batch, length), cross_keys_values(suite, slice(0, 1))
    (_, *cache), *_ = repeated(suite, "decoder.prefill", 2, tokens=tokens, **cross)
    token = {"tokens": tokens[:, -1:], "offset": torch.tensor(length)}
    # A step's threads share out its work anew each time.
    repeated(suite, "decoder.step", 10, **token, **layers("cache", cache), **cross)


def repeated(suite: Suite, block: str, times: int, **inputs: Tensor) -> list[list[Tensor]]:
    first, *others = found = [run(suite, block, **inputs) for _ in range(times)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return found


@pytest.mark.parametrize("block", [block for block in BLOCKS if block != "decoder.embedding"])  # which takes integers
def test_what_is_no_number_comes_out_where_pytorchs_does(suite: Suite, block: str) -> None:
    """One NaN or infinity among the inputs, in a row that others stand beside: heard, or where nothing may be heard."""
    kind = "speech" if block == LOG_MEL else BATCH
    comparison = next(suite.comparisons(BLOCKS[block], (kind,)))
    given = suite.inputs(BLOCKS[block], comparison)
    names = [name for name, x in given.items() if x.is_floating_point() and name.partition(".")[2] in ("", "0")]
    assert names
    for name in names:
        for value, at in itertools.product((math.nan, math.inf), (0.5, -1)):
            x = given[name].clone()
            place = [len(x) // 2, *(at if at < 0 else int(size * at) for size in x.shape[1:])]
            x[tuple(place)] = value
            way = f"{value} in {name} at {place}"
            assert suite.finite_as_pytorch(comparison, {**given, name: x}, way), way
