"""What Python does between the graphs of decoding: texts, caches and rules, without any graph."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whisper import decoding
from whisper.tokenizer import get_tokenizer

from maxwhisper.decoding import cpu, openai_loop
from maxwhisper.decoding.cache import CacheSlots, KeyValueCache, rows_of
from maxwhisper.decoding.cpu import SELECT_TOKENS, CPUStepper, begun, finished
from maxwhisper.decoding.module_cache import ModuleCache
from maxwhisper.decoding.openai_loop import MAX_STEPS, DecodingTask, MaxInference
from maxwhisper.decoding.rules import TOKEN_RULES, Rules, TokenRules
from maxwhisper.decoding.speculative import N_PROPOSED, QUANTIZE_KEYS, SPECULATE, WORTH_PROPOSING, SpeculativeStepper
from maxwhisper.decoding.stepper import Advanced, Candidates, Texts, checked
from maxwhisper.errors import DecodingError, OptionError

EOT, CONTEXT = 9, 20
TWO = Texts(torch.tensor([[1, 2, 3, EOT, EOT], [4, 5, 6, 7, 8]]), torch.tensor([3, 5]), torch.tensor([-1.0, -2.0]))
RULES = Rules(torch.zeros(10, dtype=torch.bool), torch.tensor([1, 1]), torch.tensor([10, EOT]), 1)


def cached(n_text: int = 2, n_token: int = 4, n_audio: int | None = None) -> KeyValueCache:
    """Returns a cache of two layers of which every key and value is another number."""
    made = KeyValueCache(cross=[torch.zeros(n_text if n_audio is None else n_audio, 1, 3, 2)] * 4)
    made.append([torch.randn(n_text, 1, n_token, 2) for _ in range(4)], CONTEXT)
    return made


# ---- texts ---------------------------------------------------------------------------------------------------------


def test_a_text_that_gets_no_token_takes_part_as_the_end_of_text() -> None:
    now = begun(TWO, torch.tensor([2, 0]), 1, EOT)
    assert now.tokens.tolist() == [[1, 2, 3, EOT, EOT, EOT, EOT, EOT], [EOT] * 8]
    assert now.lengths.tolist() == [3, 1] and now.last().tolist() == [[3], [EOT]]


def test_an_idle_text_is_as_it_was_and_others_without_proposals() -> None:
    n_token, cache = torch.tensor([2, 0]), cached()
    now = begun(TWO, n_token, 1, EOT)
    now.tokens[0, 3:6] = torch.tensor([7, 7, 6])  # the last of these is a proposal
    given = {"candidates": torch.ones(2, 1), "logprobs": torch.zeros(2, 1)}
    found = finished(TWO, now._replace(lengths=torch.tensor([4, 1])), given, cache, n_token, EOT).texts
    assert found.tokens.tolist() == [[1, 2, 3, 7, EOT], [4, 5, 6, 7, 8]] and found.lengths.tolist() == [4, 5]
    assert cache.n_token == 4, "all but the last token of the longest"


class Graph:
    """Stands for a graph that puts sevens behind texts, as many as they may have or `n_more`, and notes its inputs."""

    def __init__(self, n_more: int = 99):
        self.n_more, self.given, self.draft = n_more, list[dict[str, Any]](), SimpleNamespace(_asdict=dict)

    def __getitem__(self, name: str) -> Any:
        def run(**given: Any) -> list[Tensor]:
            self.given.append({"name": name, **given})
            if name == QUANTIZE_KEYS:
                return []
            lengths = given["lengths"].clone()
            for text, length in enumerate(lengths.tolist()):
                end = min(int(given["ends"][text]), length + self.n_more)
                if given["texts"][text, length - 1] != EOT:
                    given["texts"][text, length:end] = 7
                    lengths[text] = end
            return [given["totals"] - 1, lengths]

        return run


def test_steps_end_where_they_may() -> None:
    graphs, cache = Graph(), cached()
    found = CPUStepper(graphs, CONTEXT).advance(TWO, cache, RULES, torch.tensor([3, 1])).texts
    assert found.tokens.tolist() == [[1, 2, 3, 7, 7, 7], [4, 5, 6, 7, 8, 7]] and cache.n_token == 5
    [given] = graphs.given
    assert given["name"] == SELECT_TOKENS and given["tokens"].tolist() == [[3], [8]]
    assert given["ends"].tolist() == [6, 6] and found.totals.tolist() == [-2.0, -3.0]


@pytest.mark.parametrize("stepper", [CPUStepper, SpeculativeStepper])
def test_the_last_token_needs_no_place(stepper: Any) -> None:
    """A text is full with as many tokens as there are positions and one that is not heard any more."""
    most = torch.tensor([0, CONTEXT + 1 - 5])
    assert stepper(Graph(), CONTEXT).advance(TWO, cached(), RULES, most).texts.lengths.tolist()[0] == 3
    with pytest.raises(OptionError, match=f"has {CONTEXT + 1} tokens, the model has positions for {CONTEXT}"):
        stepper(Graph(), CONTEXT).advance(TWO, cached(), RULES, most + 1)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_what_cannot_be_decoded_is_an_error(value: float) -> None:
    found = Advanced(TWO, Candidates(torch.ones(2, 1), torch.tensor([[-1.0], [value]])))
    with pytest.raises(DecodingError):
        checked(found)


# ---- speculation ---------------------------------------------------------------------------------------------------


class Speculating(SpeculativeStepper):
    """Proposes as many tokens as it is told."""

    def __init__(self, gained: int = 0, token: int = 7, total: float = 0.0):
        super().__init__(Graph(), CONTEXT)
        self.gained, self.token, self.total = gained, token, total
        self.proposed: list[list[int]] = []

    def _propose(self, texts: Texts, cache: Any, rules: Any, n_token: Tensor, n_proposed: Tensor) -> Advanced:
        self.proposed.append(n_proposed.tolist())
        more = torch.full((len(texts.tokens), self.gained), self.token)
        totals = texts.totals + self.total
        return Advanced(Texts(torch.cat([texts.tokens, more], 1), texts.lengths + self.gained, totals), None)  # type: ignore[arg-type]


ONE = Texts(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([-1.0]))


@pytest.mark.parametrize(
    ("n_token", "n_best", "n_audio", "proposed"),
    [
        (WORTH_PROPOSING, 1, 1, [[WORTH_PROPOSING]]),
        (WORTH_PROPOSING - 1, 1, 1, []),
        (10, 2, 1, []),
        (10, 1, 2, []),  # as of beams, which share their audio
        (CONTEXT - 3, 1, 1, [[CONTEXT + 1 - N_PROPOSED - 3]]),  # proposals need places of their own
    ],
)
def test_tokens_are_proposed_where_that_pays(n_token: int, n_best: int, n_audio: int, proposed: list[Any]) -> None:
    stepper = Speculating()
    rules = RULES._replace(n_best=n_best, begins=torch.tensor([1]))
    stepper.advance(ONE, cached(1, 2, n_audio), rules, torch.tensor([n_token]))
    assert stepper.proposed == proposed


@pytest.mark.parametrize(
    ("gained", "token", "total", "rest"),
    [
        (2, 7, -1.0, [[6]]),  # eight were wanted
        (5, 7, -1.0, []),  # too few are left for a round, and others' steps take less time
        (2, EOT, -1.0, []),
        (2, 7, float("nan"), []),
    ],
)
def test_steps_go_on_where_proposals_were_given_up(
    gained: int, token: int, total: float, rest: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(cpu.CPUStepper, "advance", lambda _, texts, cache, rules, n: asked.append(n.tolist()) or texts)
    stepper = Speculating(gained, token, total)
    stepper.advance(ONE, cached(1, 2), RULES, torch.tensor([8]))
    assert asked == rest


def test_an_idle_text_that_has_ended_ends_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(torch.tensor([[1, 2, 3], [1, 2, EOT]]), torch.tensor([3, 3]), torch.zeros(2))
    asked = []
    monkeypatch.setattr(cpu.CPUStepper, "advance", lambda *given: asked.append(given[-1].tolist()) or texts)
    stepper = Speculating()
    stepper.advance(texts, cached(2, 2), RULES, torch.tensor([8, 0]))
    assert asked == stepper.proposed == [[8, 0]], "nor does it keep others from proposals"


def test_a_round_is_given_its_ends_and_room_for_proposals() -> None:
    graphs = Graph(n_more=4)
    stepper = SpeculativeStepper(graphs, CONTEXT)
    cache = cached()
    cache.quantized_cross = torch.zeros(1)
    found = stepper._propose(TWO, cache, RULES, torch.tensor([8, 0]), torch.tensor([6, 0]))
    [given] = graphs.given
    assert given["name"] == SPECULATE and given["ends"].tolist() == [9, 1 + WORTH_PROPOSING]
    assert given["texts"].shape[1] == 5 + 8 + N_PROPOSED and given["cache"] is cache.memory
    assert found.texts.lengths.tolist() == [7, 5] and found.texts.tokens.tolist()[0] == [1, 2, 3, 7, 7, 7, 7]


# ---- caches --------------------------------------------------------------------------------------------------------


def held(cache: KeyValueCache) -> list[Tensor]:
    """Returns what the texts of a cache have, read through its rows."""
    rows = cache.rows[:, : cache.n_token] - cache.first_row
    return [kv[rows, :, torch.arange(cache.n_token)].transpose(1, 2) for kv in cache.own]


@pytest.mark.parametrize("slot", [0, 1])
def test_texts_that_take_each_others_places_keep_what_they_had(slot: int) -> None:
    cache = cached(3)
    if slot:  # behind another one, in the memory of both
        for _ in range(2):  # from one memory into the next
            CacheSlots(2).place([cache, cached(3)])
    before = held(cache)
    assert cache.first_row == 3 * slot
    cache.rearrange([2, 0, 0])
    wanted = [kv[[2, 0, 0]] for kv in before]
    assert all(map(torch.equal, held(cache), wanted))
    copied = cache.copy()
    assert copied.first_row == 0 and all(map(torch.equal, held(copied), wanted))
    cache.settle()
    assert all(map(torch.equal, held(cache), wanted))
    assert (cache.rows - cache.first_row).equal(rows_of(3, CONTEXT))
    copied.own[0].zero_()
    assert all(map(torch.equal, held(cache), wanted))


def test_copies_of_texts_stand_side_by_side() -> None:
    cache = cached(2)
    before = held(cache)
    cache.repeat(2)
    assert all(map(torch.equal, held(cache), [kv[[0, 0, 1, 1]] for kv in before])) and cache.n_token == 4


def test_graphs_are_given_the_memory_that_a_cache_is_in_now() -> None:
    """Whatever has been given to them before."""
    cache = cached(2)

    def put_three_texts() -> None:
        own, cache.own, cache.n_token = cache.own, [], 0
        cache.append([kv[[0, 1, 1]] for kv in own], CONTEXT)

    def move() -> None:
        CacheSlots(2).place([cached(3, n_audio=2), cache])

    for change in (lambda: None, lambda: cache.repeat(2), put_three_texts, move, move):
        change()
        pairs = zip(cache.inputs().values(), [*cache.own, *cache.cross], strict=True)
        assert all(torch.from_dlpack(given).data_ptr() == kv.data_ptr() for given, kv in pairs)
        written = [torch.from_dlpack(given).data_ptr() for given in cache.written().values()]
        assert written == [kv.data_ptr() for kv in cache.own]


def test_other_audio_is_quantized_anew() -> None:
    slots, first, second = CacheSlots(1), cached(), cached()
    quantized: list[float] = []
    for cache in (first, second, first):
        cache.cross = [torch.full_like(kv, float(cache is second)) for kv in cache.cross]
        slots.place([cache])
        slots.joined(1).quantized(lambda cross, into, row: quantized.append(float(cross[0].max())))
    assert quantized == [0.0, 1.0, 0.0]


def test_what_is_put_into_a_cache_by_module_is_of_as_many_texts_and_tokens() -> None:
    attention = [SimpleNamespace(key=nn.Identity(), value=nn.Identity()) for _ in range(4)]
    blocks = [
        SimpleNamespace(attn=attn, cross_attn=cross)
        for attn, cross in zip(attention[::2], attention[1::2], strict=True)
    ]
    dims = SimpleNamespace(n_text_ctx=CONTEXT, n_text_state=2, n_text_head=1)
    cache = ModuleCache(SimpleNamespace(dims=dims, blocks=blocks), cached(2, 4))
    assert len(cache) == 8 and cache[attention[0].key].shape == (2, 4, 2)
    before = dict(cache)
    for module, kv in before.items():
        cache[module] = kv[[1, 0, 1]]
    cache.settle()
    assert all(cache[module].equal(kv[[1, 0, 1]]) for module, kv in before.items()) and cache.n_token == 4
    for own in (attention[0], attention[2]):
        for module in (own.key, own.value):
            cache[module] = before[module][[1, 0, 1], :2]
    cache.settle()
    assert cache.n_token == 2 and cache[attention[2].value].equal(before[attention[2].value][[1, 0, 1], :2])
    assert cache[attention[1].key].equal(before[attention[1].key][[1, 0, 1]])
    cache[attention[0].key] = before[attention[0].key]
    with pytest.raises(OptionError, match="differ in shape"):
        cache.settle()


# ---- rules ---------------------------------------------------------------------------------------------------------

TOKENIZER = get_tokenizer(True, num_languages=99, language="en", task="transcribe")
N_VOCAB, BEGIN = 51865, 4


@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize("timestamps", [None, 0, 50, "any"])
def test_what_is_excluded_is_what_openais_filters_exclude(blank: bool, timestamps: Any) -> None:
    filters: list[Any] = [decoding.SuppressTokens([5, TOKENIZER.sot])]
    if blank:
        filters.append(decoding.SuppressBlank(TOKENIZER, BEGIN))
    if timestamps is not None:
        most = None if timestamps == "any" else timestamps
        filters.append(decoding.ApplyTimestampRules(TOKENIZER, BEGIN, most))
    rules = TokenRules.of(filters, N_VOCAB, BEGIN, TOKENIZER.eot)
    assert rules is not None
    for n_token in (BEGIN, BEGIN + 1):
        tokens, logits = torch.full((1, n_token), 300), torch.zeros(1, N_VOCAB)
        logits[:, 1000] = 100  # the likeliest text, lest the sum of all timestamps exclude it
        for each in filters:
            each.apply(logits, tokens)
        given = rules.inputs(tokens, 3)
        assert given.suppressed.equal(logits[0].isneginf()) and given.n_best == 3
        assert given.begins.tolist() == [BEGIN] and given.eot == TOKENIZER.eot
        assert given.limits[0] == (N_VOCAB if timestamps is None else TOKENIZER.timestamp_begin)


def test_an_unknown_filter_leaves_no_rules() -> None:
    assert TokenRules.of([decoding.LogitFilter()], N_VOCAB, BEGIN, TOKENIZER.eot) is None


# ---- the loop ------------------------------------------------------------------------------------------------------


def test_texts_that_are_the_same_are_computed_once() -> None:
    asked = []

    def decoder(tokens: Tensor, features: Tensor, kv_cache: Any, positions: Tensor) -> Tensor:
        asked.append((tokens.tolist(), positions.tolist()))
        kv_cache.append([torch.zeros(2, 1, 3, 2)] * 2, CONTEXT)
        return torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])

    inference = MaxInference(SimpleNamespace(decoder=decoder), 3)
    tokens = torch.tensor([[1, 2, 3]] * 2 + [[4, 5, 6]] * 2)
    at_sot, at_end = inference.start(tokens, torch.zeros(2, 3, 2), 1)
    assert asked == [([[1, 2, 3], [4, 5, 6]], [1, 2])]
    assert at_sot[:, 0].tolist() == [1, 1, 3, 3] and at_end[:, 0].tolist() == [2, 2, 4, 4]
    assert len(inference.cache.own[0]) == 4


class Task(DecodingTask):
    """A task of which only the loop is there, over steps that put sevens behind texts."""

    def __init__(self, stepper: Any = None, update: Any = None):
        self.asked: list[list[int]] = []
        self.tokenizer = SimpleNamespace(eot=EOT)
        self.inference = SimpleNamespace(advance=self.advance)
        self.model = SimpleNamespace(stepper=stepper or SimpleNamespace(searches=False))
        self.decoder = SimpleNamespace(update=update)

    def advance(self, texts: Texts, rules: Any, n_token: Tensor) -> Advanced:
        self.asked.append(n_token.tolist())
        assert len(self.asked) < 9, "it does not end"
        found = CPUStepper(Graph(), 999).advance(texts, cached(len(texts.tokens)), RULES, n_token)
        return found._replace(candidates=Candidates(torch.full((len(texts.tokens), 3), 7), torch.zeros(1)))


ANY: Any = SimpleNamespace(inputs=lambda tokens, n_best: RULES)


def test_greedy_decoding_asks_until_each_has_ended_or_is_full() -> None:
    task, ended = Task(), Texts(torch.tensor([[1, 2, 3], [1, 2, EOT]]), torch.tensor([3, 3]), torch.zeros(2))
    found = task._greedy(ended, ANY, 3 + MAX_STEPS + 2)
    assert task.asked == [[MAX_STEPS, 0], [2, 0]] and found.lengths.tolist() == [3 + MAX_STEPS + 2, 3]


def test_beams_have_no_more_tokens_than_they_may() -> None:
    def update(tokens: Tensor, candidates: Any, totals: Tensor) -> tuple[Tensor, bool]:
        return torch.cat([tokens, torch.full((2, 1), 7)], 1), False

    task, first = Task(update=update), Candidates(torch.full((2, 3), 7), torch.zeros(2, 3))
    tokens, _ = task._beams(torch.ones(2, 3, dtype=torch.int64), torch.zeros(2), first, ANY, 6)
    assert tokens.shape == (2, 6) and task.asked == [[1, 1], [1, 1]]


@pytest.mark.parametrize(("n_end", "n_asked"), [(99, 2), (3 + MAX_STEPS, 1)])
def test_a_steppers_own_search_goes_on_until_enough_have_ended_or_beams_are_full(n_end: int, n_asked: int) -> None:
    """Of three that are wanted one has ended before, and each go ends one."""
    wanted: list[int] = []

    class Search(Task):
        def advance(self, texts: Texts, rules: Any, n_token: Tensor) -> Advanced:
            wanted.extend(rules.wanted.tolist())
            found = super().advance(texts, rules, n_token)
            return found._replace(ended=[{(len(self.asked),): -1.0 * len(self.asked)}])

    task = Search()
    task.decoder = SimpleNamespace(finished_sequences=[{(0,): -0.5}], max_candidates=3, beam_size=2)
    given: list[int] = []
    rules: Any = SimpleNamespace(inputs=lambda tokens, n_best: given.append(n_best) or RULES)
    tokens, _ = task._search(Texts.of(torch.ones(2, 3, dtype=torch.int64), torch.zeros(2)), rules, n_end)
    assert task.decoder.finished_sequences == [{(0,): -0.5} | {(n,): -1.0 * n for n in range(1, n_asked + 1)}]
    assert task.asked == [[MAX_STEPS] * 2] * n_asked and tokens.shape[1] == 3 + n_asked * MAX_STEPS
    assert wanted == [2, 1][:n_asked] and set(given) == {3}


@pytest.mark.parametrize(("beams", "n_best"), [(None, 1), (5, 6)])
@pytest.mark.parametrize(("sample_len", "n_end"), [(4, 6), (99, CONTEXT + 1)])
def test_a_window_is_decoded_to_its_end(
    beams: int | None, n_best: int, sample_len: int, n_end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end is the last position and a token that is not heard; speech is judged where the transcript starts."""
    tokens, at_sot = torch.tensor([[1, 2]]), torch.tensor([[0.0, 1.0, 3.0]])
    asked: list[Any] = []

    def first(graph: Any, rules: Any, logits: Tensor, tokens: Tensor, totals: Tensor, n_best: int) -> Advanced:
        asked.append((graph, logits.tolist(), totals.tolist(), n_best))
        return Advanced(Texts.of(tokens, totals), Candidates(tokens, totals))

    monkeypatch.setattr(openai_loop, "first_tokens", first)
    task: Any = Task()
    task.options, task.sample_len, task.n_ctx, task.sot_index = SimpleNamespace(beam_size=beams), sample_len, CONTEXT, 1
    task.tokenizer = SimpleNamespace(eot=EOT, no_speech=2)
    task.model.network = {TOKEN_RULES: "the rules"}
    task.inference.start = lambda *given: asked.append(given[2]) or [at_sot, at_sot + 1]
    task.inference.cleanup_caching = lambda: asked.append("clean")
    task._rules = lambda: ANY
    task._greedy = lambda texts, rules, end: asked.append(end) or texts
    task._beams = lambda tokens, totals, candidates, rules, end: asked.append(end) or (tokens, totals)
    found, totals, no_speech = task._main_loop(torch.zeros(1, 3, 2), tokens)
    assert asked == [1, ("the rules", [[1.0, 2.0, 4.0]], [0.0], n_best), n_end, "clean"]
    assert no_speech == at_sot.softmax(1)[:, 2].tolist() and found.equal(tokens) and totals.tolist() == [0.0]


@pytest.mark.parametrize(("n_token", "fits"), [(CONTEXT, True), (CONTEXT + 1, False)])
def test_a_text_may_begin_with_as_many_tokens_as_there_are_places(
    n_token: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding.DecodingTask, "_get_initial_tokens", lambda _: tuple(range(n_token)))
    task = Task()
    task.n_ctx = CONTEXT
    if fits:
        assert len(task._get_initial_tokens()) == n_token
        return
    with pytest.raises(OptionError, match="prefix is too long"):
        task._get_initial_tokens()
