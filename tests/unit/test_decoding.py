"""Tokens selected in the graph: what openai-whisper's own filters and decoders select from the same logits."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper import decoding
from whisper.tokenizer import get_tokenizer

from maxwhisper import load_model
from maxwhisper.decoding.openai_loop import BeamSearchDecoder, first_tokens
from maxwhisper.decoding.rules import TOKEN_RULES, Rules, TokenRules
from maxwhisper.decoding.stepper import Advanced
from maxwhisper.engine.program import Executable
from maxwhisper.errors import DecodingError
from reference.fixtures import NANO
from reference.formulas import Formula, judge_formula

TOKENIZER = get_tokenizer(True, num_languages=99, language="en", task="transcribe")
N_VOCAB, BEGIN, EOT = 51865, TOKENIZER.timestamp_begin, TOKENIZER.eot
PROMPT = list(TOKENIZER.sot_sequence)
SAMPLE_BEGIN = len(PROMPT)


@cache
def graph() -> Executable:
    """Returns the one that selects a text's first token."""
    return load_model(NANO).network[TOKEN_RULES]


class NoCache:
    """An Inference without a cache to rearrange."""

    def rearrange_kv_cache(self, source_indices: list[int]) -> None:
        pass


def filters(timestamps: bool, blank: bool, suppressed: list[int], initial: int | None) -> list[decoding.LogitFilter]:
    chosen: list[decoding.LogitFilter] = [decoding.SuppressBlank(TOKENIZER, SAMPLE_BEGIN)] if blank else []
    if suppressed:
        chosen.append(decoding.SuppressTokens(suppressed))
    if timestamps:
        chosen.append(decoding.ApplyTimestampRules(TOKENIZER, SAMPLE_BEGIN, initial))
    return chosen


@st.composite
def histories(draw: st.DrawFn, n_text: int) -> list[list[int]]:
    """Returns what several texts, of the same length, have sampled so far: text and timestamps in any order."""
    token = st.one_of(st.integers(0, EOT), st.integers(BEGIN, N_VOCAB - 1))
    length = draw(st.integers(0, 5))
    return [draw(st.lists(token, min_size=length, max_size=length)) for _ in range(n_text)]


SPECIAL = [*TOKENIZER.encode(" "), EOT, TOKENIZER.sot, TOKENIZER.no_speech, TOKENIZER.no_timestamps]
MARKED = [*SPECIAL, BEGIN, BEGIN + 1, BEGIN + 50, BEGIN + 51, N_VOCAB - 1]
"""Tokens that rules are about."""


def random_logits(n_text: int, seed: int, lean: float) -> torch.Tensor:
    """Logits of which those of timestamps are greater by `lean`, and those of up to two marked tokens the greatest, at
    times by far."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(scale=4, size=(n_text, N_VOCAB))).float()
    logits[:, BEGIN:] += lean
    marked = random.choice(MARKED, random.integers(3), replace=False)
    for token, above in zip(marked, (random.choice([1, 40]), 1), strict=False):
        logits[:, token] = logits.amax(1) + above
    return logits


OPTIONS = {
    "timestamps": st.booleans(),
    "blank": st.booleans(),
    "suppressed": st.lists(st.sampled_from(SPECIAL) | st.integers(0, BEGIN - 1), max_size=9, unique=True),
    "initial": st.sampled_from([None, 0, 50]),
    "seed": st.integers(0, 2**32 - 1),
    "lean": st.sampled_from([-30.0, -2.0, 0.0, 2.0, 30.0]),
}


def selected(logits: torch.Tensor, tokens: torch.Tensor, chosen: list, n_best: int) -> Advanced:
    rules = TokenRules.of(chosen, N_VOCAB, SAMPLE_BEGIN, EOT)
    assert rules is not None
    return first_tokens(graph(), rules, logits, tokens, totals(tokens), n_best)


def totals(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(tokens)).float().neg()


def filtered(logits: torch.Tensor, tokens: torch.Tensor, chosen: list) -> torch.Tensor:
    """Returns the logits that openai-whisper's filters leave."""
    logits = logits.clone()
    for each in chosen:
        each.apply(logits, tokens)
    return logits


@settings(max_examples=60)
@given(sampled=histories(n_text=3), **OPTIONS)
def test_greedy_selects_what_openai_selects(sampled, seed, lean, **options) -> None:  # noqa: ANN001, ANN003
    logits, chosen = random_logits(3, seed, lean), filters(**options)
    tokens = torch.tensor([PROMPT + each for each in sampled])
    ours = selected(logits, tokens, chosen, 1)
    sums = totals(tokens)
    theirs, _ = decoding.GreedyDecoder(0.0, EOT).update(tokens, filtered(logits, tokens, chosen), sums)
    assert ours.texts.tokens.equal(theirs)
    goes_on = (tokens[:, -1] != EOT)[:, None]

    def formula(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        gained = given["logits"].log_softmax(1).gather(1, theirs[:, -1:])
        return [given["totals"] + torch.where(goes_on, gained, 0)[:, 0]]

    check(formula, filtered(logits, tokens, chosen), ours.texts.totals, sums, totals=totals(tokens))


@settings(max_examples=60)
@given(sampled=histories(n_text=3), **OPTIONS)
def test_beam_search_selects_what_openai_selects(sampled, seed, lean, **options) -> None:  # noqa: ANN001, ANN003
    logits, chosen = random_logits(3, seed, lean), filters(**options)
    tokens = torch.tensor([PROMPT + each for each in sampled])
    ours, theirs = (each(3, EOT, NoCache()) for each in (BeamSearchDecoder, decoding.BeamSearchDecoder))
    our_sums, their_sums = totals(tokens), totals(tokens)
    candidates = selected(logits, tokens, chosen, 4).candidates
    our_tokens, our_completed = ours.update(tokens, candidates, our_sums)
    their_tokens, their_completed = theirs.update(tokens, filtered(logits, tokens, chosen), their_sums)
    possible = their_sums.isfinite()  # where the rules leave fewer than the beams, the rest may be anything
    assert possible.equal(our_sums.isfinite())
    assert our_tokens[: possible.sum()].equal(their_tokens[: possible.sum()])
    assert our_completed == their_completed
    found, left = their_tokens[possible], filtered(logits, tokens, chosen)
    likely = left.topk(4).indices  # of each text; of texts that are the same openai-whisper goes on with the last
    before = [
        max(i for i, text in enumerate(tokens) if text.equal(each[:-1]) and each[-1] in likely[i]) for each in found
    ]

    def formula(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [given["totals"][before] + given["logits"].log_softmax(1)[before, found[:, -1]]]

    if possible.any():
        check(formula, left, our_sums[possible], their_sums[possible], totals=totals(tokens))
    assert finished(ours) == finished(theirs)


def finished(decoder: decoding.BeamSearchDecoder) -> list[list[tuple[int, ...]]]:
    """Returns the texts that have ended with a probability above 0, in order."""
    return [[text for text, sum_ in each.items() if math.isfinite(sum_)] for each in decoder.finished_sequences]


def check(formula: Formula, logits: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, **others: Any) -> None:
    """Judges log-probabilities that were found from logits (text, vocabulary)."""
    inputs = {"logits": logits, **others}
    found = judge_formula(
        "log-probabilities", formula, inputs, [ours], peer=[theirs], longest_reduction=logits.shape[-1]
    )
    assert found.passed, f"\n{found}"


def test_equal_logits_go_to_the_lower_token() -> None:
    logits = torch.zeros(1, N_VOCAB)
    logits[0, [70, 900, 40000]] = 1
    assert selected(logits, torch.tensor([PROMPT]), [], 5).candidates.tokens.tolist() == [[70, 900, 40000, 0, 1]]


def test_where_the_rules_leave_too_few_excluded_tokens_follow_with_no_probability() -> None:
    suppressed = decoding.SuppressTokens(list(range(2, N_VOCAB)))
    found = selected(torch.zeros(1, N_VOCAB), torch.tensor([PROMPT]), [suppressed], 4).candidates
    assert found.tokens.tolist() == [[0, 1, 2, 3]]
    assert found.logprobs[0, 2:].tolist() == [-float("inf")] * 2


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")])
def test_logits_that_nothing_can_be_selected_from_are_an_error(value: float) -> None:
    with pytest.raises(DecodingError, match="not finite"):
        selected(torch.full((1, N_VOCAB), value), torch.tensor([PROMPT]), [], 1)


ENDED, SPEAKING = [*PROMPT, 40, EOT], [*PROMPT, 40, 50]


@pytest.mark.parametrize(
    ("texts", "top_tokens", "expected"),
    [
        ([SPEAKING, SPEAKING], [60, 60], False),
        ([SPEAKING, SPEAKING], [60, EOT], True),
        ([ENDED, SPEAKING], [EOT, 60], False),  # over already
        ([ENDED, SPEAKING], [60, EOT], True),
    ],
)
def test_steps_stop_where_a_text_ends_for_the_first_time(
    texts: list[list[int]], top_tokens: list[int], expected: bool
) -> None:
    logits, tokens = torch.zeros(2, N_VOCAB), torch.tensor(texts)
    logits[[0, 1], top_tokens] = 9
    assert selected_by_graph(logits, tokens, [9, 8])[-1].tolist() == [0 if expected else 2]


def selected_by_graph(logits: torch.Tensor, tokens: torch.Tensor, ends: list[int]) -> list[torch.Tensor]:
    """Returns the texts, all of the same length, with room for a token more, and what the graph gives for them."""
    rules = TokenRules(N_VOCAB, SAMPLE_BEGIN, EOT).inputs(tokens, 1).inputs()
    texts = torch.nn.functional.pad(tokens, (0, 1))
    lengths = torch.full((len(tokens),), tokens.shape[1])
    state = {"texts": texts, "lengths": lengths, "ends": torch.tensor(ends), "totals": totals(tokens)}
    return [texts, *graph()(logits=logits, **state, **rules)]


def test_a_text_that_has_ended_stays_as_it_is() -> None:
    logits, tokens = torch.zeros(2, N_VOCAB), torch.tensor([ENDED, SPEAKING])
    logits[:, 60] = 9
    texts, last, sums, lengths, left = selected_by_graph(logits, tokens, [6, 9])
    assert texts[:, -1].tolist() == [0, 60] and last[:, 0].tolist() == [EOT, 60]
    assert lengths.tolist() == [5, 6] and left.tolist() == [3]
    assert sums[0] == totals(tokens)[0] and sums[1] < totals(tokens)[1]


def test_nothing_is_left_where_all_texts_have_ended() -> None:
    """Or steps would go on for ever."""
    assert selected_by_graph(torch.zeros(1, N_VOCAB), torch.tensor([ENDED]), [9])[-1].tolist() == [0]


def test_rules_of_tasks_decoded_together_must_be_the_same() -> None:
    tokens = torch.tensor([SPEAKING])
    one, same = (TokenRules(N_VOCAB, SAMPLE_BEGIN, EOT).inputs(tokens, 1) for _ in range(2))
    assert Rules.joined([one, same]).begins.tolist() == [SAMPLE_BEGIN] * 2
    for other in (TokenRules(N_VOCAB, SAMPLE_BEGIN, EOT - 1).inputs(tokens, 1), same._replace(n_best=2)):
        with pytest.raises(AssertionError):
            Rules.joined([one, other])


def test_an_unknown_filter_is_left_to_openai() -> None:
    class Another(decoding.LogitFilter):
        pass

    assert TokenRules.of([Another()], N_VOCAB, SAMPLE_BEGIN, EOT) is None


@pytest.mark.parametrize("n_best", [1, 6])
def test_candidates_of_a_text_are_bitwise_the_same_among_any_others(n_best: int) -> None:
    chosen = filters(True, True, [5], 50)
    logits, tokens = random_logits(7, 0, 0.0), torch.tensor([[*PROMPT, BEGIN + i, 40 + i] for i in range(7)])
    together = selected(logits, tokens, chosen, n_best).candidates
    for i in range(7):
        alone = selected(logits[i : i + 1], tokens[i : i + 1], chosen, n_best).candidates
        assert alone.tokens[0].equal(together.tokens[i]) and alone.logprobs[0].equal(together.logprobs[i])
