"""The drop-in object's decoder: openai-whisper's shapes and errors, its cache, hooks, and tokens selected in graphs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import whisper
from whisper import decoding
from whisper.model import disable_sdpa

from maxwhisper.decoding.cache import KeyValueCache
from maxwhisper.decoding.openai_loop import DecodingTask, MaxInference, first_tokens
from maxwhisper.decoding.rules import TOKEN_RULES, TokenRules
from maxwhisper.decoding.stepper import Advanced, Texts
from maxwhisper.errors import OptionError
from maxwhisper.whisper import TextDecoder, Whisper
from reference.formulas import judge_formula


def test_logits(model: Whisper, mels: torch.Tensor, features: torch.Tensor, tokens: torch.Tensor) -> None:
    logits = model.logits(tokens, features[:1])
    assert logits.shape == (*tokens.shape, model.dims.n_vocab) and logits.dtype == torch.float32
    assert torch.equal(model(mels[:1], tokens), model.logits(tokens, model.encoder(mels[:1])))


@pytest.mark.parametrize("n_prompt", [1, 4])
def test_cache_gives_what_the_whole_text_gives(
    model: Whisper, features: torch.Tensor, tokens: torch.Tensor, n_prompt: int
) -> None:
    expected = model.decoder(tokens, features[:1]).argmax(-1)
    cache, hooks = model.install_kv_cache_hooks()
    assert hooks == [] and not cache
    steps = [model.decoder(tokens[:, :n_prompt], features[:1], kv_cache=cache)]
    for i in range(n_prompt, tokens.shape[1]):
        assert cache.n_token == i
        steps.append(model.decoder(tokens[:, i : i + 1], features[:1], kv_cache=cache))
    assert torch.equal(torch.cat(steps, dim=1).argmax(-1), expected)


def test_texts_share_a_row_of_audio(model: Whisper, features: torch.Tensor, tokens: torch.Tensor) -> None:
    texts = tokens.repeat(4, 1)
    shared = model.decoder(texts, features).argmax(-1)
    assert torch.equal(shared, model.decoder(texts, features.repeat_interleave(2, 0)).argmax(-1))
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[1], shared[2])


def test_positions_choose_among_the_logits(model: Whisper, features: torch.Tensor, tokens: torch.Tensor) -> None:
    every = model.decoder(tokens, features[:1])
    chosen = model.decoder(tokens, features[:1], positions=torch.tensor([4, 1]))
    assert chosen.equal(every[:, [4, 1]])


def test_positions_that_are_not_there_are_refused(model: Whisper, features: torch.Tensor, tokens: torch.Tensor) -> None:
    cache = KeyValueCache()
    with pytest.raises(OptionError, match="positions"):
        model.decoder(tokens, features[:1], positions=torch.tensor([tokens.shape[1]]))
    model.decoder(tokens[:, :-1], features[:1], kv_cache=cache)
    with pytest.raises(OptionError, match="positions"):
        model.decoder(tokens[:, -1:], features[:1], kv_cache=cache, positions=torch.tensor([0]))


EOT = 50257


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"beam_size": 5},
        *({"sample_len": n} for n in (1, 2, 7)),
        {"prompt": [440] * 223, "prefix": [440] * 160, "suppress_tokens": [EOT]},
    ],
    ids=["greedy", "beams", "one token", "two tokens", "seven tokens", "to the end of the context"],
)
def test_tokens_selected_in_the_graph_are_those_of_openais_loop(
    model: Whisper, mels: torch.Tensor, given: dict[str, Any]
) -> None:
    options = whisper.DecodingOptions(fp16=False, language="en", **given)
    ours = model.decode(mels[0], options)
    task, seen = DecodingTask(model, options), Seen()
    task.logit_filters.append(seen)
    assert task._rules() is None
    (theirs,) = task.run(mels[:1])
    assert ours.tokens == theirs.tokens
    assert ours.no_speech_prob == theirs.no_speech_prob
    logits, tokens = seen.along([*task.initial_tokens, *theirs.tokens, EOT])

    def average(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [given["logits"].log_softmax(1).gather(1, tokens[:, None]).sum(0) / (len(ours.tokens) + 1)]

    found, peer = ([torch.tensor([each.avg_logprob])] for each in (ours, theirs))
    inputs, n_term = {"logits": logits}, model.dims.n_vocab
    judged = judge_formula("avg_logprob", average, inputs, found, peer=peer, longest_reduction=n_term)
    assert judged.passed, f"\n{judged}"


class Seen(decoding.LogitFilter):
    """What the filters before it have left of the logits, at every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def apply(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        self.steps.append((tokens, logits.clone()))

    def along(self, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the logits (step, vocabulary) behind the first tokens of a text, and the tokens (step,) that
        follow."""
        rows = [
            logits[(tokens == torch.tensor(text[: tokens.shape[1]])).all(1)][0]
            for tokens, logits in self.steps
            if tokens.shape[1] < len(text)
        ]
        start = self.steps[0][0].shape[1]
        return torch.stack(rows), torch.tensor(text[start : start + len(rows)])


def test_an_unknown_decoder_is_left_to_openais_loop(model: Whisper, mels: torch.Tensor) -> None:
    class Another(decoding.GreedyDecoder):
        pass

    options = whisper.DecodingOptions(fp16=False, language="en")
    task = DecodingTask(model, options)
    task.decoder = Another(0.0, EOT)
    assert task._rules() is None
    assert task.run(mels[:1])[0].tokens == model.decode(mels[0], options).tokens


def token_rules(model: Whisper) -> TokenRules:
    rules = DecodingTask(model, whisper.DecodingOptions(fp16=False, language="en"))._rules()
    assert rules is not None
    return rules


@pytest.mark.parametrize("n_best", [1, 6])
def test_a_step_that_selects_gives_what_the_rules_make_of_its_logits(
    model: Whisper, features: torch.Tensor, tokens: torch.Tensor, n_best: int
) -> None:
    rules = token_rules(model)
    texts = torch.cat([tokens, tokens.roll(1, dims=1)])
    totals = torch.tensor([-1.0, -2.0])
    inference = MaxInference(model, texts.shape[1] - 1)
    inference.logits(texts[:, :-1], features[:1])
    other = model.install_kv_cache_hooks(inference.cache)[0]
    logits = inference.logits(texts, features[:1])[:, -1]
    expected = first_tokens(model.network[TOKEN_RULES], rules, logits, texts, totals, n_best)
    inference.cache = other
    found = advanced(inference, texts, totals, rules, n_best)
    assert equal(found, expected)
    assert other.n_token == texts.shape[1]


def advanced(
    inference: MaxInference,
    texts: torch.Tensor,
    totals: torch.Tensor,
    rules: TokenRules,
    n_best: int = 1,
    n_token: int = 1,
) -> Advanced:
    wanted = torch.full((len(texts),), n_token)
    return inference.advance(Texts.of(texts, totals), rules.inputs(texts, n_best), wanted)


def equal(ours: Advanced, theirs: Advanced) -> bool:
    """Compares bitwise."""
    pairs = zip(
        (*ours.texts, *vars(ours.candidates).values()), (*theirs.texts, *vars(theirs.candidates).values()), strict=True
    )
    return all(one.equal(other) for one, other in pairs)


def started(model: Whisper, texts: torch.Tensor, features: torch.Tensor) -> MaxInference:
    """Returns the cache of texts without their last token."""
    inference = MaxInference(model, texts.shape[1] - 1)
    inference.logits(texts[:, :-1], features[:1])
    return inference


def test_many_steps_at_once_are_as_many_single_ones(
    model: Whisper, features: torch.Tensor, tokens: torch.Tensor
) -> None:
    rules, totals = token_rules(model), torch.tensor([-1.0, -2.0])
    texts = torch.stack([tokens[0, :6], tokens[0, :6].flip(0)])
    at_once, one_by_one = started(model, texts, features), started(model, texts, features)
    found = advanced(at_once, texts, totals, rules, n_token=20)
    n_step = found.texts.tokens.shape[1] - texts.shape[1]
    assert n_step > 1
    for _ in range(n_step):
        expected = advanced(one_by_one, texts, totals, rules)
        texts, _, totals = expected.texts
    assert equal(found, expected)
    assert at_once.cache.n_token == one_by_one.cache.n_token
    for ours, theirs in zip(filled(at_once.cache), filled(one_by_one.cache), strict=True):
        assert ours.equal(theirs)


def test_steps_end_where_a_text_ends(model: Whisper, features: torch.Tensor, tokens: torch.Tensor) -> None:
    rules, tokens = token_rules(model), tokens[:, :-4]
    ended = tokens.roll(1, dims=1)
    ended[:, -1] = rules.eot
    texts, totals = torch.cat([tokens, ended]), torch.zeros(2)
    alone = started(model, tokens, features)
    found = advanced(alone, tokens, totals[:1], rules, n_token=200).texts
    while found.tokens[0, -1] != rules.eot:
        found = advanced(alone, found.tokens, found.totals, rules, n_token=200).texts
    assert rules.eot not in found.tokens[0, :-1]
    assert found.tokens.shape[1] > tokens.shape[1] + 1
    together = advanced(started(model, texts, features), texts, totals, rules, n_token=200).texts
    assert together.tokens[:1].equal(found.tokens) and together.totals[:1].equal(found.totals)
    assert (together.tokens[1, texts.shape[1] :] == rules.eot).all() and together.totals[1] == 0
    assert together.lengths.tolist() == [found.tokens.shape[1], texts.shape[1]]


def test_rearranged_cache_continues_the_chosen_texts(
    model: Whisper, features: torch.Tensor, tokens: torch.Tensor
) -> None:
    other = tokens.roll(1, dims=1)
    texts, chosen = torch.cat([tokens, other, other]), [2, 0, 0]
    inference = started(model, texts, features)
    inference.rearrange_kv_cache(chosen)
    continued = inference.logits(texts[chosen], features[:1])
    assert continued.equal(started(model, texts[chosen], features).logits(texts[chosen], features[:1]))
    assert not continued[0].equal(continued[1])
    inference.cleanup_caching()
    assert not inference.cache


def test_texts_that_advance_may_be_read_from_each_others_rows(
    model: Whisper, features: torch.Tensor, tokens: torch.Tensor
) -> None:
    rules, totals = token_rules(model), torch.zeros(3)
    texts = torch.cat([tokens, tokens.roll(1, dims=1), tokens.roll(2, dims=1)])
    n_start = texts.shape[1] - 3
    moved = MaxInference(model, n_start)
    moved.logits(texts[:, :n_start], features[:1])
    for n, chosen in enumerate([[2, 0, 0], [1, 2, 0], [0, 0, 1]], n_start + 1):
        moved.rearrange_kv_cache(chosen)
        texts = texts[chosen].clone()
        texts[:, n - 1] = torch.arange(3) + 100 * n  # what follows differs, where the texts before are the same
        found = advanced(moved, texts[:, :n], totals, rules, n_best=3)
    still = MaxInference(model, n_start)
    still.logits(texts[:, :n_start], features[:1])
    for n in range(n_start + 1, texts.shape[1] + 1):
        expected = advanced(still, texts[:, :n], totals, rules, n_best=3)
    assert equal(found, expected)
    assert not moved.cache.rows.equal(still.cache.rows)
    moved.cache.settle()
    assert moved.cache.rows.equal(still.cache.rows)
    for ours, theirs in zip(filled(moved.cache), filled(still.cache), strict=True):
        assert ours[:, :, n_start:].equal(theirs[:, :, n_start:])


def test_more_tokens_than_fit_are_refused_before_one_is_decoded(model: Whisper, features: torch.Tensor) -> None:
    """Though the text would end before that."""
    texts, n_position = torch.tensor([[50258, 50259, 50359, 50364]]), model.dims.n_text_ctx
    inference = MaxInference(model, 3)
    inference.logits(texts[:, :3], features[:1])
    n_token = n_position + 1 - texts.shape[1]
    with pytest.raises(OptionError, match=f"{n_position + 1} tokens, the model has positions for {n_position}"):
        advanced(inference, texts, torch.zeros(1), token_rules(model), n_token=n_token + 1)
    assert advanced(inference, texts, torch.zeros(1), token_rules(model), n_token=n_token).texts.last() == EOT


def test_nothing_is_selected_for_a_full_cache(model: Whisper, features: torch.Tensor, tokens: torch.Tensor) -> None:
    n_position = model.dims.n_text_ctx
    inference = MaxInference(model, n_position)
    inference.logits(torch.zeros(1, n_position - 1, dtype=torch.int64), features[:1])
    texts, rules = torch.zeros(1, n_position, dtype=torch.int64), token_rules(model)
    with pytest.raises(OptionError, match=f"{n_position + 1} tokens, the model has positions for {n_position}"):
        advanced(inference, texts, torch.zeros(1), rules, n_token=2)
    assert advanced(inference, texts, torch.zeros(1), rules).texts.tokens.shape == (1, n_position + 1)


@pytest.mark.parametrize("token", [-1, "n_vocab"])
def test_a_token_that_is_not_in_the_vocabulary_is_an_error(
    model: Whisper, features: torch.Tensor, token: int | str
) -> None:
    """Or what lies beside the embedding would be read."""
    inference = MaxInference(model, 3)
    inference.logits(torch.zeros(1, 2, dtype=torch.int64), features[:1])
    texts = torch.tensor([[0, 0, getattr(model.dims, token) if isinstance(token, str) else token]])
    with pytest.raises(Exception, match="no such token"):
        advanced(inference, texts, torch.zeros(1), token_rules(model))


def filled(cache: KeyValueCache) -> list[torch.Tensor]:
    return [kv[:, :, : cache.n_token] for kv in cache.own]


def test_a_copied_cache_is_independent(model: Whisper, features: torch.Tensor, tokens: torch.Tensor) -> None:
    cache, _ = model.install_kv_cache_hooks()
    model.decoder(tokens[:, :4], features[:1], kv_cache=cache)
    copy, _ = model.install_kv_cache_hooks(cache)
    step = model.decoder(tokens[:, 4:5], features[:1], kv_cache=cache)
    model.decoder(tokens[:, 5:6], features[:1], kv_cache=copy)
    assert (cache.n_token, copy.n_token) == (5, 5)
    same, _ = model.install_kv_cache_hooks()
    model.decoder(tokens[:, :4], features[:1], kv_cache=same)
    assert step.equal(model.decoder(tokens[:, 4:5], features[:1], kv_cache=same))
    assert all(own.equal(other) for own, other in zip(filled(cache), filled(same), strict=True))
    assert not all(own.equal(other) for own, other in zip(filled(cache), filled(copy), strict=True))


def test_what_is_put_into_a_cache_is_read(model: Whisper, features: torch.Tensor, tokens: torch.Tensor) -> None:
    """Keys and values of other audio too, once those before have been read."""

    def step(cache: Any) -> torch.Tensor:
        return model.decoder(tokens[:, -1:], features[:1], kv_cache=cache)

    caches = [model.install_kv_cache_hooks()[0] for _ in features]
    for cache, audio in zip(caches, features, strict=True):
        model.decoder(tokens[:, :-1], audio[None], kv_cache=cache)
    step(caches[0])
    for module, kv in list(caches[1].items()):
        caches[0][module] = kv
    as_dict, _ = model.install_kv_cache_hooks(dict(caches[1]))
    found = [step(cache) for cache in (*caches, as_dict)]
    assert found[0].equal(found[1]) and found[2].equal(found[1])


def test_decoder_refuses_what_it_has_no_place_for(model: Whisper, features: torch.Tensor, tokens: torch.Tensor) -> None:
    dims = model.dims
    with pytest.raises(
        OptionError, match=f"{dims.n_text_ctx + 1} tokens, the model has positions for {dims.n_text_ctx}"
    ):
        model.logits(torch.zeros(1, dims.n_text_ctx + 1, dtype=torch.int64), features[:1])
    with pytest.raises(OptionError, match=f"to {dims.n_vocab}, the vocabulary from 0 to {dims.n_vocab - 1}"):
        model.logits(torch.tensor([[0, dims.n_vocab]]), features[:1])
    with pytest.raises(OptionError, match="from -1"):
        model.logits(torch.tensor([[-1]]), features[:1])
    with pytest.raises(OptionError, match=r"expected \(batch, token\)"):
        model.logits(tokens[0], features[:1])
    with pytest.raises(OptionError, match="3 texts cannot share 2 rows"):
        model.logits(tokens.repeat(3, 1), features)
    with pytest.raises(OptionError, match="audio features are"):
        model.logits(tokens, features[:1, 1:])
    cache, _ = model.install_kv_cache_hooks()
    model.decoder(tokens[:, :4], features[:1], kv_cache=cache)
    with pytest.raises(OptionError, match=r"expected \(1, 1\) behind this cache"):
        model.decoder(tokens[:, 4:6], features[:1], kv_cache=cache)


class Scores:
    """A network whose scores are all different: (batch, head, token, frame)."""

    dtype = torch.float32
    scores = torch.arange(4 * 3 * 4 * 5.0).reshape(4, 3, 4, 5)

    def __init__(self, decoder: dict[str, torch.Tensor]):
        self.decoder = decoder

    def __getitem__(self, name: str) -> Callable[..., list[torch.Tensor]]:
        aligned = [torch.zeros(1), self.scores]
        return {"decoder.keys_values": lambda **_: [], "decoder.alignment": lambda **_: aligned}[name]

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.decoder.items() if not name.startswith(("blocks.1", "blocks.2"))}


def test_hooks_receive_the_scores_of_each_text(model: Whisper) -> None:
    dims = replace(model.dims, n_text_layer=1)
    decoder = TextDecoder(dims, Scores(model.decoder.state_dict()), torch.device("cpu"))  # type: ignore[arg-type]
    received: list[torch.Tensor] = []
    block: Any = decoder.blocks[0]
    hook = block.cross_attn.register_forward_hook(lambda _, __, out: received.append(out[-1]))
    with disable_sdpa():
        decoder(torch.zeros(4, 4, dtype=torch.int64), torch.zeros(2, dims.n_audio_ctx, dims.n_audio_state))
    hook.remove()
    assert len(received) == 1
    assert torch.equal(received[0], Scores.scores)
