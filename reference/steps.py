"""Steps of decoding as `transcribe` takes them, judged: what a stepper selects, sums up and keeps, beside PyTorch.

A stepper is given texts in the middle of decoding, with what the oracle has of them in its cache. What it makes of them
is given to oracle and peer, token by token, with openai-whisper's own filters. So a token is right where none is
likelier by more than rounding explains, and everything else is compared as a block's outputs are.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from whisper import decoding
from whisper.model import ModelDimensions, Whisper

from maxwhisper.compare.tokens import tokenizer_of
from maxwhisper.decoding.cache import KeyValueCache, rows_of
from maxwhisper.decoding.rules import Rules, TokenRules
from maxwhisper.decoding.stepper import Advanced, Stepper, Texts

from .activations import WINDOWS, speech
from .blocks import TWINS
from .chain import layers
from .judge import Comparison, Judgement, judge
from .suite import Suite


@dataclass(frozen=True)
class Scene:
    """Texts in the middle of decoding, by the window that they belong to.

    name: says what is special. lengths: of the texts of each window, in tokens. n_token: how many more they may have.
    n_text: texts of a window, as of beams, whose keys and values lie in one another's rows. n_best: candidates to find.
    n_sampled: how many of the tokens have been decoded; before them stand a prompt and the start of a transcript.
    timestamps: whether they are decoded with timestamps. latest: that which ends the texts, in steps of 20 ms, if any.
    endless: whether no text may end, as most would after so much that nobody has said, before any token is proposed.
    """

    name: str
    lengths: tuple[int, ...]
    n_token: tuple[int, ...]
    n_text: int = 1
    n_best: int = 1
    n_sampled: int = 3
    timestamps: bool = True
    latest: int | None = None
    endless: bool = False

    def __str__(self) -> str:
        return self.name


LAST = 448
"""Tokens in a text that fills the decoder's context."""
SCENES = (
    Scene("one text", (9,), (40,)),
    Scene("one text without timestamps", (9,), (24,), timestamps=False),
    Scene("the first token of a text", (130,), (1,), n_sampled=0, n_best=3),
    # What may follow are the last two timestamps, which the vocabulary ends with, and the end of text.
    Scene("behind the last timestamp but one", (20,), (1,), n_best=3, n_sampled=5, latest=1499),
    Scene("the last positions", (LAST - 7,), (8,)),
    Scene("past position 128", (124,), (24,), timestamps=False, endless=True),
    Scene("2 windows", (25, 257), (12, 12), endless=True),
    Scene("3 windows, one of which waits", (11, 300, 385), (17, 0, 9), endless=True),
    Scene("2 beams", (64,), (1,), n_text=2, n_best=3),
    Scene("5 beams", (131,), (1,), n_text=5, n_best=6),
    Scene("7 beams at the last position", (LAST,), (1,), n_text=7, n_best=8),
    Scene("4 beams of 2 windows", (17, 260), (1, 1), n_text=4, n_best=5, timestamps=False),
    Scene("3 beams of 3 windows", (8, 129, 400), (1, 1, 1), n_text=3, n_best=4),
    Scene("6 samples", (33,), (5,), n_text=6),
)
"""Batches of 1 to 9 texts, of 1 to 3 windows, from the first position to the last."""


@dataclass(frozen=True)
class Window:
    """A window of a scene: its filters, and its texts (text, token), which begin alike."""

    filters: Sequence[decoding.LogitFilter]
    sample_begin: int
    tokens: Tensor


def window(scene: Scene, length: int, dims: ModelDimensions, generator: torch.Generator) -> Window:
    """Makes the texts of a window: a prompt of random words where there is room for it, the start of a transcript, and
    random words, of the first text the right ones."""
    tokenizer = tokenizer_of(dims)
    start = [*(tokenizer.sot_sequence if scene.timestamps else tokenizer.sot_sequence_including_notimestamps)]
    sample_begin = length - scene.n_sampled
    n_prompt = sample_begin - len(start)
    prompt = torch.randint(0, tokenizer.eot, (max(n_prompt, 0),), generator=generator)
    prompt[:1] = tokenizer.sot_prev
    sampled = torch.randint(0, tokenizer.eot, (scene.n_text, scene.n_sampled), generator=generator)
    said = speech(dims)[1][0, len(tokenizer.sot_sequence_including_notimestamps) :]
    sampled[0] = said[: scene.n_sampled]
    if scene.timestamps:
        sampled[:, :1] = tokenizer.timestamp_begin
    if scene.latest is not None:
        sampled[:, -1] = tokenizer.timestamp_begin + scene.latest
    begun = torch.cat([prompt, torch.tensor(start)]).expand(scene.n_text, -1)
    suppressed = [*tokenizer.non_speech_tokens, *range(tokenizer.eot + (not scene.endless), tokenizer.no_speech + 1)]
    filters: list[decoding.LogitFilter] = [
        decoding.SuppressBlank(tokenizer, sample_begin),
        decoding.SuppressTokens(suppressed),
    ]
    if scene.timestamps:
        filters.append(decoding.ApplyTimestampRules(tokenizer, sample_begin, 50))
    return Window(filters, sample_begin, torch.cat([begun, sampled], 1))


@dataclass(frozen=True)
class Given:
    """What a scene gives a stepper, and what oracle and peer need to follow it.

    cross: keys and values of the windows' audio, by name, in the dtype under test. cache: what the stepper is given.
    """

    scene: Scene
    windows: Sequence[Window]
    cross: dict[str, Tensor]
    texts: Texts
    rules: Rules
    cache: KeyValueCache

    @property
    def n_token(self) -> Tensor:
        return torch.tensor(self.scene.n_token).repeat_interleave(self.scene.n_text)

    def window(self, text: int) -> Window:
        return self.windows[text // self.scene.n_text]

    def cross_of(self, text: int) -> dict[str, Tensor]:
        audio = text // self.scene.n_text
        return {name: kv[audio : audio + 1] for name, kv in self.cross.items()}


def given(suite: Suite, scene: Scene, unwritten: float) -> Given:
    """Returns what a scene gives a stepper, with a cache of its own.

    unwritten: what stands in the cache's positions that hold nothing yet.
    """
    made = suite.scenes.get((scene, unwritten)) or begun(suite, scene, unwritten)
    suite.scenes[scene, unwritten] = made
    return replace(made, cache=made.cache.copy())


@torch.no_grad()
def begun(suite: Suite, scene: Scene, unwritten: float) -> Given:
    """Makes what `given` returns."""
    dims, generator = suite.dims, torch.Generator().manual_seed(len(scene.name))
    eot = tokenizer_of(dims).eot
    windows = [window(scene, length, dims, generator) for length in scene.lengths]
    features = torch.cat([suite.model.activations(kind).audio_features for kind in WINDOWS[: len(windows)]])
    cross = layers("cross", TWINS["decoder.keys_values"](suite.model.oracle, 0, audio_features=features))
    cross = {name: kv.to(suite.dtype) for name, kv in cross.items()}
    n = len(windows) * scene.n_text
    totals = -torch.rand(n, generator=generator)
    texts = Texts.joined(
        [Texts.of(each.tokens, total) for each, total in zip(windows, totals.split(scene.n_text), strict=True)], eot
    )
    rules = [
        TokenRules.of(each.filters, dims.n_vocab, each.sample_begin, eot).inputs(each.tokens, scene.n_best)  # type: ignore[union-attr]
        for each in windows
    ]
    own = [torch.full((n, dims.n_text_head, dims.n_text_ctx, dims.n_text_state // dims.n_text_head), unwritten)]
    memory = torch.stack(own * 2 * dims.n_text_layer).to(suite.torch_device, suite.dtype)
    audio = [kv.to(suite.torch_device, copy=True) for kv in cross.values()]
    held = KeyValueCache(list(memory), audio, max(scene.lengths) - 1, rows_of(n, dims.n_text_ctx), memory=memory)
    made = Given(scene, windows, cross, texts, Rules.joined(rules), held)
    for text in range(n):
        fill(made, suite, text)
    if len(windows) > 1:
        return made
    # As beams go on: the first of the texts twice, the last not at all.
    parents = [max(text - 1, 0) for text in range(n)]
    held.rearrange(parents)
    return replace(made, texts=Texts(*(each[parents] for each in texts)))


def fill(made: Given, suite: Suite, text: int) -> None:
    """Puts the oracle's keys and values of a text into the rows of its window's texts, another one's at every position,
    as beams leave them."""
    scene, cache, length = made.scene, made.cache, int(made.texts.lengths[text])
    first, past = text - text % scene.n_text, length - 1
    if past:
        own = forward(suite.model.oracle, made, made.texts.tokens[text, :past], text, [past - 1])[1:]
        turn = torch.arange(past) % scene.n_text
        cache.rows[text, :past] = first + (text - first + turn) % scene.n_text
        for kv, cached in zip(own, cache.own, strict=True):
            cached[cache.rows[text, :past], :, torch.arange(past)] = kv[0].transpose(0, 1).to(cached)


def kept(cache: KeyValueCache, text: int, n_token: int) -> list[Tensor]:
    """Returns every layer's keys and values of a text's first tokens, (token, head, channel)."""
    rows = cache.rows[text, :n_token] - cache.first_row
    return [kv[rows, :, torch.arange(n_token)].cpu() for kv in cache.own]


def forward(model: Whisper, made: Given, tokens: Tensor, text: int, positions: Iterable[int]) -> list[Tensor]:
    """Returns PyTorch's logits (1, position, vocab) at some positions of a text, and every layer's keys and values."""
    cross = {name: kv.to(model.device, model.compute) for name, kv in made.cross_of(text).items()}
    tokens, at = tokens[None].to(model.device), torch.tensor([*positions])
    return [x.cpu() for x in TWINS["decoder.start"](model, 0, tokens=tokens, positions=at, **cross)]


def filtered(logits: Tensor, made: Given, text: int, tokens: Tensor, first: int) -> Tensor:
    """Returns logits (step, vocab) behind `first` tokens and more of a text, as openai-whisper's filters leave them."""
    logits = logits.clone()
    for step, row in enumerate(logits.split(1)):
        for each in made.window(text).filters:
            each.apply(row, tokens[None, : first + step])
    return logits


@dataclass(frozen=True)
class Found:
    """What oracle, peer or subject find of one text: each a tensor over the steps that the subject took.

    selected: the logit of the token that each step selects, by the oracle. total: the sum of the logits that belong to
    the selected tokens' log-probabilities. candidates, of_candidates: of the last step, the candidates' logits by its
    own reckoning and by the oracle's. kv: new keys and values, (token, channel) of every layer in turn.
    """

    selected: Tensor
    total: Tensor
    candidates: Tensor
    of_candidates: Tensor
    kv: list[Tensor]


def three(suite: Suite, made: Given, advanced: Advanced, text: int) -> tuple[Found, Found, Found]:
    """Returns what oracle, peer and subject find of a text that has been given tokens."""
    n_best, n_before = made.scene.n_best, int(made.texts.lengths[text])
    tokens = advanced.texts.tokens[text, : advanced.texts.lengths[text]]
    chosen, positions = tokens[n_before:, None], range(n_before - 1, len(tokens) - 1)

    def run(model: Whisper) -> tuple[Tensor, Tensor, list[Tensor]]:
        logits, *kv = forward(model, made, tokens[:-1], text, positions)
        left = filtered(logits[0], made, text, tokens, n_before)
        return left, left.logsumexp(1), [x[0, :, n_before - 1 :].transpose(0, 1).flatten(1) for x in kv]

    (right, scale, right_kv), (theirs, their_scale, their_kv) = run(suite.model.oracle), run(suite.peer)
    start = made.texts.totals[text]

    def reckoned(logits: Tensor, own_scale: Tensor, kv: list[Tensor], best: Tensor) -> Found:
        """Returns what PyTorch finds, its log-probabilities made logits again on the oracle's scale."""
        shift = scale - own_scale
        total = start + (logits.gather(1, chosen)[:, 0] + shift).sum()
        top = logits[-1].topk(n_best)
        return Found(right.gather(1, best)[:, 0], total, top.values + shift[-1], right[-1, top.indices], kv)

    candidates = advanced.candidates
    found, of_total = candidates.tokens[text, :n_best], advanced.texts.totals[text] + scale.sum()
    written = [kv[n_before - 1 :].flatten(1) for kv in kept(made.cache, text, len(tokens) - 1)]
    selected, of_candidates = right.gather(1, chosen)[:, 0], right[-1, found]
    ours = Found(selected, of_total, candidates.logprobs[text] + scale[-1], of_candidates, written)
    oracle = reckoned(right, scale, right_kv, right.argmax(1, keepdim=True))
    return oracle, reckoned(theirs.double(), their_scale.double(), their_kv, theirs.argmax(1, keepdim=True)), ours


def judge_steps(suite: Suite, stepper: Stepper, scene: Scene, way: str = "") -> Judgement:
    """Judges what a stepper makes of a scene: the tokens it selects, their sums, candidates and log-probabilities, and
    the keys and values that it leaves in the cache. Where the cache holds nothing yet stands NaN, on a GPU, whose
    attention multiplies that with 0, a large number. way: as of `Suite.recalled`."""
    made = given(suite, scene, unwritten=1e4 if stepper.tokens_first else torch.nan)
    before = [kept(made.cache, text, n - 1) for text, n in enumerate(made.texts.lengths.tolist())]
    advanced = advanced_twice(stepper, made)
    comparison = Comparison(suite.model.size, suite.dtype, "decoding", 0, scene.name, suite.device)
    if defects := tuple(broken_promises(made, advanced, before)):
        return Judgement(comparison, (), defects)
    after = [kept(made.cache, text, n - 1) for text, n in enumerate(advanced.texts.lengths.tolist())]
    given_and_found = [*made.cross.values(), *made.texts, *itertools.chain(*before), *itertools.chain(*after)]
    given_and_found += [*advanced.texts, advanced.candidates.tokens, advanced.candidates.logprobs]
    tensors = {str(index): x for index, x in enumerate(given_and_found)}
    (judgement,) = suite.recalled(comparison, tensors, lambda: [judged_steps(suite, made, advanced, comparison)], way)
    return judgement


FIRST_GO = 3
"""Tokens that a stepper is asked for at first; the rest it is asked for on what it has left."""


@torch.no_grad()
def advanced_twice(stepper: Stepper, made: Given) -> Advanced:
    """Returns what a stepper makes of a scene in two goes, as a transcript is made in many; in one where a text is done
    after that."""
    advanced = stepper.advance(made.texts, made.cache, made.rules, made.n_token.clamp(max=FIRST_GO))
    texts = advanced.texts
    left = made.n_token - (texts.lengths - made.texts.lengths)
    ended = texts.tokens.gather(1, texts.lengths[:, None] - 1)[:, 0] == made.rules.eot
    if (made.n_token.bool() & (ended | (left == 0))).any():
        return advanced
    return stepper.advance(texts, made.cache, made.rules, left)


def judged_steps(suite: Suite, made: Given, advanced: Advanced, comparison: Comparison) -> Judgement:
    """Returns the verdict on what was made of a scene."""
    moved = [text for text, n in enumerate(made.n_token.tolist()) if n]
    by_text = [three(suite, made, advanced, text) for text in moved]
    oracle, peer, subject = (joined(each, made.scene.n_best) for each in zip(*by_text, strict=True))
    twin = TWINS["decoder.step"]
    return judge(
        comparison,
        [x.double() for x in oracle],
        peer,
        subject,
        longest_reduction=twin.longest_reduction(suite.dims),
        roundings=twin.roundings(suite.dims),
        chained=True,
    )


def joined(found: Sequence[Found], n_best: int) -> list[Tensor]:
    """Returns what was found of all texts, in the order of `Found`, without candidates where they are the selected
    tokens."""
    logits = [torch.cat([each.selected for each in found]), torch.stack([each.total for each in found])]
    if n_best > 1:
        logits += [torch.cat([each.candidates for each in found]), torch.cat([each.of_candidates for each in found])]
    kv = [torch.cat(layer) for layer in zip(*(each.kv for each in found), strict=True)]
    return [*(x.double() for x in logits), *kv]


def broken_promises(made: Given, advanced: Advanced, before: Sequence[list[Tensor]]) -> Iterable[str]:
    """Finds what `Stepper.advance` promises and did not keep, each text's tokens and cache apart.

    before: of each text, what `kept` gave for its cache.
    """
    texts, n_token, eot = advanced.texts, made.n_token, made.rules.eot
    gained = texts.lengths - made.texts.lengths
    if made.cache.n_token != texts.lengths.max() - 1:
        yield f"the cache says that it holds {made.cache.n_token} tokens, expected all but the last"
    for text, length in enumerate(made.texts.lengths.tolist()):
        now, most = texts.tokens[text], int(n_token[text])
        if not now[:length].equal(made.texts.tokens[text, :length]):
            yield f"text {text}: its tokens have changed"
        if not min(most, 1) <= gained[text] <= most:
            yield f"text {text}: {int(gained[text])} tokens more, expected 1 to {most}"
        if (now[texts.lengths[text] :] != eot).any() or (now[length : texts.lengths[text] - 1] == eot).any():
            yield f"text {text}: tokens behind its end"
        now_kept = kept(made.cache, text, length - 1)
        if most and not all(was.equal(kv.to(was.dtype)) for was, kv in zip(before[text], now_kept, strict=True)):
            yield f"text {text}: keys and values of its earlier tokens have changed"
