"""What a GPU selects tokens and chooses beams by, on a CPU, thread after thread: as openai-whisper does."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue
from torch.nn.functional import pad

from maxwhisper.checkpoint import load_checkpoint
from maxwhisper.decoding.cache import KeyValueCache, rows_of
from maxwhisper.decoding.gpu import MAX_CANDIDATES, MAX_ENDED, choose_beams, ended_of, inputs, select
from maxwhisper.decoding.openai_loop import BeamSearchDecoder
from maxwhisper.decoding.rules import NoWeights, Rules, TokenRules
from maxwhisper.decoding.stepper import Candidates, Texts
from maxwhisper.engine.program import Program
from maxwhisper.engine.session import Policy
from reference.fixtures import NANO

from .small_graphs import small_graphs
from .test_decoding import (
    BEGIN,
    EOT,
    N_VOCAB,
    OPTIONS,
    PROMPT,
    SAMPLE_BEGIN,
    check,
    filtered,
    filters,
    histories,
    random_logits,
)


def rules_and_beams() -> list[Program]:
    """Returns the graphs of what selects tokens, and what chooses among beams, alone."""
    cpu = DeviceRef.CPU()
    dims = load_checkpoint(NANO).dims
    types = inputs(dims, Policy(cpu, DType.float32, DType.float32), MAX_CANDIDATES)
    types = {name: kind for name, kind in types.items() if not name.startswith(("k_", "v_"))}
    logits = TensorType(DType.float32, ["batch", N_VOCAB], cpu)

    def selecting(_: NoWeights, logits: TensorValue, **given: Any) -> list[TensorValue]:
        select(logits, given, MAX_CANDIDATES, appends=False)
        return []

    def choosing(_: NoWeights, **given: Any) -> list[TensorValue]:
        choose_beams(given, cpu)
        return []

    return [
        Program("select", "", NoWeights(), selecting, {"logits": logits, **types}),
        Program("beams", "", NoWeights(), choosing, types),
    ]


def given_to(texts: Texts, rules: Rules, n_window: int = 1) -> dict[str, torch.Tensor]:
    """Returns what the graphs take, to be changed in place, with room for a token more."""
    tokens = pad(texts.tokens, (0, 1), value=N_VOCAB - 1)
    n_text, n_position = tokens.shape
    read = {"texts": tokens, "lengths": texts.lengths, "rows": rows_of(n_text, n_position)}
    changed = {**read, "totals": texts.totals, "latest": torch.zeros(n_text)}
    return {
        **read,
        **{f"{name} written": each for name, each in changed.items()},
        "ends": texts.lengths + 1,
        "begins": rules.begins,
        "suppressed": rules.suppressed,
        "limits": rules.limits,
        "candidates": torch.zeros((n_text, MAX_CANDIDATES), dtype=torch.int64),
        "logprobs": torch.zeros(n_text, MAX_CANDIDATES),
        "wanted": torch.zeros(n_window, dtype=torch.int64),
        "n_ended": torch.zeros(n_window, dtype=torch.int64),
        "ended": torch.zeros((n_window, MAX_ENDED, n_position), dtype=torch.int64),
        "ended_lengths": torch.zeros((n_window, MAX_ENDED), dtype=torch.int64),
        "ended_totals": torch.zeros(n_window, MAX_ENDED),
    }


def candidates(logits: torch.Tensor, tokens: torch.Tensor, chosen: list) -> Candidates:
    """Returns the likeliest tokens; behind the texts stands what no rule may look at."""
    known = TokenRules.of(chosen, N_VOCAB, SAMPLE_BEGIN, EOT)
    assert known is not None
    given = given_to(Texts.of(tokens, torch.zeros(len(tokens))), known.inputs(tokens, MAX_CANDIDATES))
    small_graphs()["select"](**given, logits=logits)
    return Candidates(given["candidates"], given["logprobs"])


def check_candidates(logits: torch.Tensor, tokens: torch.Tensor, chosen: list) -> None:
    left = filtered(logits, tokens, chosen)
    ours, theirs = candidates(logits, tokens, chosen), left.log_softmax(1).topk(MAX_CANDIDATES).values
    assert left.gather(1, ours.tokens).equal(left.topk(MAX_CANDIDATES).values)
    possible = theirs.isfinite()
    assert ours.logprobs.isfinite().equal(possible)

    def formula(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [given["logits"].log_softmax(1).topk(MAX_CANDIDATES).values[possible]]

    check(formula, left, ours.logprobs[possible], theirs[possible])


@settings(max_examples=30)
@given(sampled=histories(n_text=3), **OPTIONS)
def test_candidates_are_openais(sampled, seed, lean, **options) -> None:  # noqa: ANN001, ANN003
    tokens = torch.tensor([PROMPT + each for each in sampled])
    check_candidates(random_logits(3, seed, lean), tokens, filters(**options))


@pytest.mark.parametrize("length", [255, 256, 257, 258, 400])
@pytest.mark.parametrize("latest", [[40, BEGIN + 9], [BEGIN + 9, 40], [BEGIN + 9, BEGIN + 9]])
def test_candidates_of_long_texts_are_openais(length: int, latest: list[int]) -> None:
    """A block of threads looks for the latest timestamp, each at every so many tokens."""
    tokens = torch.tensor([[*PROMPT, BEGIN + 2, *[40] * (length - 3), *latest]])
    check_candidates(random_logits(1, length, 2.0), tokens, filters(True, True, [], None))


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
def test_candidates_tell_that_nothing_can_be_selected(value: float) -> None:
    found = candidates(torch.full((1, N_VOCAB), value), torch.tensor([PROMPT]), [])
    assert not found.logprobs[:, 0].isfinite().any() and found.tokens.lt(N_VOCAB).all()


@pytest.mark.parametrize("place", [70, BEGIN + 3, N_VOCAB - 1])
def test_a_single_logit_that_is_nan_tells_so_too(place: int) -> None:
    logits = torch.zeros(1, N_VOCAB)
    logits[0, BEGIN:] = 9
    logits[0, place] = float("nan")
    found = candidates(logits, torch.tensor([[*PROMPT, 40]]), filters(True, True, [], None))
    assert not found.logprobs.isfinite().any()


def test_equal_logits_go_to_the_lower_token() -> None:
    logits = torch.zeros(1, N_VOCAB)
    best = [70, 71, 300, 900, 40000]
    logits[0, best] = 1
    assert candidates(logits, torch.tensor([PROMPT]), []).tokens.tolist() == [[*best, 0, 1, 2]]


def test_candidates_of_a_text_are_bitwise_the_same_among_any_others() -> None:
    chosen = filters(True, True, [5], 50)
    logits, tokens = random_logits(7, 0, 0.0), torch.tensor([[*PROMPT, BEGIN + i, 40 + i] for i in range(7)])
    together = candidates(logits, tokens, chosen)
    for i in range(7):
        alone = candidates(logits[i : i + 1], tokens[i : i + 1], chosen)
        assert alone.tokens[0].equal(together.tokens[i]) and alone.logprobs[0].equal(together.logprobs[i])


@pytest.mark.parametrize("text", range(3))
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_beams_stay_where_a_text_has_no_next_token(text: int, value: float) -> None:
    texts = Texts.of(torch.tensor([[1, 40], [1, 41], [1, 42]]), torch.zeros(3))
    made = given_to(
        texts, Rules(torch.zeros(N_VOCAB, dtype=torch.bool), torch.ones(3).long(), torch.tensor([99, 9]), 3)
    )
    made["wanted"] += 3
    made["candidates"][:] = torch.arange(20, 20 + MAX_CANDIDATES)
    made["logprobs"][:] = -torch.arange(1.0, 1 + MAX_CANDIDATES)
    made["logprobs"][text, 0] = value
    small_graphs()["beams"](**made)
    assert made["lengths written"].tolist() == [2, 2, 2] and not made["totals written"].any()
    assert made["latest written"].isfinite().tolist() == [i != text for i in range(3)]


class Rows:
    """What openai-whisper's beam search rearranges caches by."""

    def __init__(self, n_text: int, n_position: int):
        self.cache = KeyValueCache(n_token=0, rows=rows_of(n_text, n_position))

    def rearrange_kv_cache(self, texts: list[int]) -> None:
        self.cache.rearrange(texts)


@settings(max_examples=100)
@given(
    n_beam=st.integers(1, MAX_CANDIDATES - 1),
    n_window=st.integers(1, 3),
    wanted=st.integers(1, 12),
    coarse=st.sampled_from([1, 4, 1000]),
    n_step=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_beams_are_chosen_as_openai_chooses_them(
    n_beam: int, n_window: int, wanted: int, coarse: int, n_step: int, seed: int
) -> None:
    """Step by step, of candidates many of which are equally likely: the texts, their sums, what has ended and in which
    order, and from which row keys and values are taken. A window that is done stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    eot, n_text, n_start = 9, n_beam * n_window, 3
    start = torch.randint(20, 99, (n_text, n_start), generator=generator)
    start[:, 0] = torch.arange(n_text)
    rules = Rules(torch.zeros(N_VOCAB, dtype=torch.bool), torch.ones(n_text).long(), torch.tensor([99, eot]), n_beam)
    made = given_to(Texts.of(start, torch.zeros(n_text))._replace(tokens=pad(start, (0, n_step))), rules, n_window)
    made["ends"] = torch.full((n_text,), n_start + max(1, n_step - 1))
    made["wanted"] += wanted
    theirs = [BeamSearchDecoder(n_beam, eot, Rows(n_beam, n_start + n_step + 1)) for _ in range(n_window)]
    tokens, sums = [[*x.split(n_beam)] for x in (start, torch.zeros(n_text))]
    done, ended = [False] * n_window, [{} for _ in range(n_window)]
    for decoder in theirs:
        decoder.max_candidates = wanted
    for _ in range(n_step):
        logprobs = -torch.rand(n_text, MAX_CANDIDATES, generator=generator).mul(coarse).round().div(coarse)
        made["logprobs"].copy_(logprobs.sort(1, descending=True).values)
        made["candidates"].copy_(torch.rand(n_text, 20, generator=generator).argsort(1)[:, :MAX_CANDIDATES])
        small_graphs()["beams"](**made)
        for window, decoder in enumerate(theirs):
            texts = slice(window * n_beam, (window + 1) * n_beam)
            if not done[window]:
                decoder.inference.cache.n_token = tokens[window].shape[1]
                found = Candidates(*(made[name][texts, : n_beam + 1] for name in ("candidates", "logprobs")))
                tokens[window], done[window] = decoder.update(tokens[window], found, sums[window])
            length = tokens[window].shape[1]
            done[window] |= length == made["ends"][0]
            assert made["lengths"][texts].eq(length).all() and made["texts"][texts, :length].equal(tokens[window])
            assert made["totals written"][texts].equal(sums[window])
            assert made["rows"][texts].equal(decoder.inference.cache.rows + window * n_beam)
            assert [*(ended[window] | ended_of(made)[window]).items()] == [*decoder.finished_sequences[0].items()]
            if made["n_ended"][window] + n_beam > MAX_ENDED or torch.rand((), generator=generator) < 0.3:
                ended[window] |= ended_of(made)[window]
                made["wanted"][window] -= made["n_ended"][window]
                made["n_ended"][window] = 0
