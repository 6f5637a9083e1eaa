"""Encoder and decoder: openai-whisper's modules, whose networks run on MAX.

What is asked of the modules inside, by hooks, for gradients or for a trace, is computed by openai-whisper's own code,
in PyTorch.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from max.driver import CPU, Buffer
from whisper import model as openai
from whisper.model import ModelDimensions

from .decoding.gpu import CANDIDATES, STEPS_AT_ONCE
from .decoding.openai_loop import PICK, Candidates, KeyValueCache, Picked, Rules, Texts
from .decoding.speculative import N_GUESS, ROUGH_KEYS, SPECULATE, WORTH_GUESSING, rough_room
from .engine.program import buffer
from .engine.surroundings import one_torch_thread
from .errors import AudioError, OptionError
from .frozen import HOOKS, Frozen, without_memory
from .scheduling import OfThread, Seats

if TYPE_CHECKING:
    from .whisper import Network


def check_floats(name: str, x: torch.Tensor) -> None:
    """Raises OptionError for what is no tensor of floats, which alone are neither read as something else nor lost."""
    if not isinstance(x, torch.Tensor):
        raise OptionError(f"{name} is a {type(x).__name__}, expected a tensor: torch.as_tensor makes one of an array")
    if not x.is_floating_point():
        raise OptionError(f"{name} is {x.dtype}, expected floats")


class AudioEncoder(Frozen, openai.AudioEncoder):
    """Log-mel to audio features."""

    def __init__(self, dims: ModelDimensions, network: "Network", device: torch.device):
        with without_memory():
            super().__init__(dims.n_mels, dims.n_audio_ctx, dims.n_audio_state, dims.n_audio_head, dims.n_audio_layer)
        self.dims = dims
        self.hold(network, network.tensors("encoder"), device)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """([batch,] n_mels, 2 * n_audio_ctx) to ([batch,] n_audio_ctx, state), in the dtype of mel.

        In PyTorch while modules inside have hooks, or mel requires a gradient that is not switched off.

        Raises AudioError for another shape, or for values that are not finite, and OptionError for what is no tensor of
        floats, or if weights were changed.
        """
        check_floats("mel", mel)
        self.check_unchanged()
        if not torch.jit.is_tracing():
            self._check(mel)
        batch = mel if mel.ndim == 3 else mel[None]
        if reason := self.why_pytorch(mel):
            self.pytorch(reason)
            features = super().forward(batch)
        else:
            features = self._on_max(batch)
        return features if mel.ndim == 3 else features[0]

    def _check(self, mel: torch.Tensor) -> None:
        expected = (self.dims.n_mels, 2 * self.dims.n_audio_ctx)
        if mel.ndim not in (2, 3) or mel.shape[-2:] != expected:
            raise AudioError(f"mel is {tuple(mel.shape)}, expected {expected} or a batch of these")

    @one_torch_thread()
    def _on_max(self, mel: torch.Tensor) -> torch.Tensor:
        if not all(extreme.isfinite() for extreme in mel.aminmax()):
            raise AudioError("mel holds values that are not finite")
        return self.network["encoder"](mel.to(self.device, self.network.dtype))[0].to(mel.dtype)


class TextDecoder(Frozen, openai.TextDecoder):
    """Tokens and audio features to logits."""

    blocks: Any

    def __init__(self, dims: ModelDimensions, network: "Network", device: torch.device):
        with without_memory():
            super().__init__(dims.n_vocab, dims.n_text_ctx, dims.n_text_state, dims.n_text_head, dims.n_text_layer)
        self.register_buffer(
            "mask",
            torch.full((dims.n_text_ctx, dims.n_text_ctx), -torch.inf, dtype=torch.float32).triu_(1),
            persistent=False,
        )
        self.dims = dims
        self.on_device = device.type != "cpu"
        self.of_thread = OfThread(self.on_device)
        self.hold(network, network.tensors("decoder"), device)

    def forward(
        self,
        x: torch.Tensor,
        xa: torch.Tensor,
        kv_cache: Any = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of tokens x (batch, token) given audio features xa (audio, n_audio_ctx, state), as float32
        (batch, token, n_vocab).

        positions: (position,) int64, with an empty cache; the logits are then of the tokens there alone.

        xa may have fewer rows than x: consecutive texts then share one. With a cache of `install_kv_cache_hooks`, the
        first call takes a text from its start and fills the cache; each later one takes one more token and needs xa no
        longer. With a dict that hooks fill, this is openai-whisper's forward, in PyTorch.

        While a block's `cross_attn` has forward hooks, no cache is given and `disable_sdpa` holds, as where
        openai-whisper looks for the times of words, all these hooks receive their layer's scores as outputs[-1], and
        None as the other output. With other hooks inside, or features that require a gradient that is not switched off,
        this is openai-whisper's forward, in PyTorch.

        Raises OptionError for tokens or features that the model has no place for, or if weights were changed.
        """
        cache = kv_cache if isinstance(kv_cache, KeyValueCache) else KeyValueCache()
        if cache:
            cache.settle()
        else:
            self.check_unchanged()
        if not torch.jit.is_tracing():
            self._check(x, xa, cache, positions)
        reason = self.why_pytorch(xa)
        if kv_cache and not cache:
            reason = reason or "the cache is not of install_kv_cache_hooks"
        if reason is None:
            return self._on_max(x, xa, cache, positions)
        if reason == HOOKS and kv_cache is None and self._wants_scores():
            logits, changed = self._aligned(x, xa)
            if not changed:
                return logits
            reason = "hooks have outputs of their own"
        if isinstance(kv_cache, KeyValueCache):
            raise OptionError(f"{reason}, unlike when this cache was made: use torch.no_grad(), or make another")
        self.pytorch(reason)
        logits = super().forward(x, xa, kv_cache)
        return logits if positions is None else logits[:, positions]

    @one_torch_thread()
    def _on_max(
        self, x: torch.Tensor, xa: torch.Tensor, cache: KeyValueCache, positions: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.to(self.device, torch.int64)
        if cache:
            logits, *new = self.network["decoder.step"](x, torch.tensor(cache.n_token, device="cpu"), *cache.inputs())
            cache.append(new, self.dims.n_text_ctx)
            return logits
        cross = self._keys_values(xa)
        if positions is not None:
            logits, *new = self.network["decoder.start"](x, positions.to(self.device), *cross)
        else:
            logits, *new = self.network["decoder.prefill"](x, *cross)
        cache.cross = cross
        cache.append(new, self.dims.n_text_ctx)
        return logits

    def _keys_values(self, xa: torch.Tensor) -> list[torch.Tensor]:
        return self.network["decoder.keys_values"](xa.to(self.device, self.network.dtype))

    def _wants_scores(self) -> bool:
        """Whether all hooks inside are such as openai-whisper looks for the times of words with."""
        attentions = [block.cross_attn for block in self.blocks]
        return not openai.MultiHeadAttention.use_sdpa and all(
            module in attentions and not module._forward_pre_hooks and not module._forward_hooks_with_kwargs
            for module in self.hooked()
        )

    def _aligned(self, x: torch.Tensor, xa: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Logits, and whether a hook that received scores gave something in their place."""
        logits, scores = self.alignment(x, xa)
        given = [
            hook(block.cross_attn, (), (None, qk))
            for block, qk in zip(self.blocks, scores, strict=True)
            for hook in list(block.cross_attn._forward_hooks.values())
        ]
        return logits, any(each is not None for each in given)

    @one_torch_thread()
    def alignment(self, x: torch.Tensor, xa: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits of tokens as `forward` takes them, and of every layer the scores of cross-attention before softmax,
        float32 (batch, head, token, n_audio_ctx)."""
        logits, *scores = self.network["decoder.alignment"](x.to(self.device, torch.int64), *self._keys_values(xa))
        return logits, [qk.float() for qk in scores]

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextDecoder":
        memo[id(self.of_thread)] = OfThread(self.on_device)
        return super().__deepcopy__(memo)

    def pick(self, texts: Texts, cache: KeyValueCache, rules: Rules, n_token: torch.Tensor) -> Picked:
        """What follows texts, all but the last tokens of which are in the cache: of each at most as many tokens as
        `n_token` (batch,) says, until one ends, has as many, or, where others decode together with these, one of theirs
        does; or until so few are left that steps of another kind take less time, or, off the CPU, STEPS_AT_ONCE.

        A text that gets none stays as it is, but its cache is lost. Raises OptionError where the cache has no room.
        """
        self._check_room(int((texts.lengths + n_token).max()) - 1)
        if self.on_device:
            cache.settle()
        if self.of_thread.together is not None:
            return self.of_thread.together.pick(texts, cache, rules, n_token)

        def draft() -> list[Buffer]:
            assert cache.memory is not None
            if cache.rough_cross is None:
                cache.rough_cross = rough_room(cache.cross, len(texts.tokens))
                self.make_rough(cache.cross, cache.rough_cross, 0)
            return [buffer(cache.memory), buffer(cache.rough_cross)]

        sources, kv = self._seated(cache).inputs(1) if self.on_device else (cache.sources, cache.inputs())
        picked = self.steps(texts, rules, n_token, sources, kv, draft)
        cache.n_token = int(picked.texts.lengths.max()) - 1
        return picked

    def steps(
        self,
        texts: Texts,
        rules: Rules,
        n_token: torch.Tensor,
        sources: torch.Tensor,
        kv: Sequence[Buffer],
        draft: Callable[[], Sequence[Buffer]],
    ) -> Picked:
        """As `pick`; sources and kv: as of a `KeyValueCache`. draft: gives what guesses take besides, where tokens are
        guessed first: if only the likeliest are wanted, of texts with room for guesses and audio of their own."""
        if self.on_device:
            return self._steps_on_device(texts, rules, n_token, kv)
        eot, idle = int(rules.limits[1]), n_token == 0
        tokens = torch.nn.functional.pad(texts.tokens, (0, int(n_token.max()) + N_GUESS), value=eot)
        # An idle text takes part as the end of text alone, to which nothing is added.
        now = Texts(tokens.masked_fill(idle[:, None], eot), texts.lengths.masked_fill(idle, 1), texts.totals)
        ends, most = now.lengths + n_token, self.dims.n_text_ctx + 1 - N_GUESS
        ends_of_guesses = torch.where(idle, ends + WORTH_GUESSING, ends.clamp(max=most))
        others = *rules, sources, *kv, *kv[: 2 * self.dims.n_text_layer]

        def worth_guessing() -> bool:
            return int((ends_of_guesses - now.lengths).min()) >= WORTH_GUESSING

        guess = len(rules.places) == 1 and kv[-1].shape[0] == len(tokens) and worth_guessing()
        if guess:
            given = *now[:2], ends_of_guesses, now.totals, *others, *draft(), *self.network.draft
            *found, totals, lengths = self.network[SPECULATE](*given)
            now = Texts(now.tokens, lengths, totals)
        stopped = (now.last()[~idle] == eot).any() or not now.totals.isfinite().all()
        if not guess or worth_guessing() and not stopped:
            *found, totals, lengths = self.network[PICK](now.last(), *now[:2], ends, now.totals, *others)
            now = Texts(now.tokens, lengths, totals)
        lengths = torch.where(idle, texts.lengths, now.lengths)
        tokens = torch.where(idle[:, None], tokens, now.tokens)[:, : int(lengths.max())]
        tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = eot  # where guesses were
        return Picked(Texts(tokens, lengths, now.totals), Candidates(*found))

    def _seated(self, cache: KeyValueCache) -> Seats:
        """Where a cache is in memory as `_steps_on_device` takes it: in that of the thread's one before, if it fits."""
        room, wanted = ([kv.shape for kv in (*each.own, *each.cross)] for each in (self.of_thread.seats, cache))
        if room not in ([], wanted):
            self.of_thread.seats = Seats(1, on_device=True)
        self.of_thread.seats.place([cache])
        return self.of_thread.seats

    def _steps_on_device(self, texts: Texts, rules: Rules, n_token: torch.Tensor, kv: Sequence[Buffer]) -> Picked:
        """As `steps`: at most STEPS_AT_ONCE with the likeliest token alone, or one with several."""
        device, n_best = self.network.policy.device.to_device(), len(rules.places)

        def there(*tensors: torch.Tensor) -> list[Buffer]:
            return [buffer(x).to(device) for x in tensors]

        def back(buffers: Sequence[Buffer]) -> list[torch.Tensor]:
            return [torch.from_dlpack(x.to(CPU())) for x in buffers]

        eot, n_free = int(rules.limits[1]), self.dims.n_text_ctx + 1 - texts.tokens.shape[1]
        tokens = torch.nn.functional.pad(texts.tokens, (0, n_free), value=eot)
        given = [*there(rules.suppressed, rules.begins, rules.limits), *kv, *kv[: len(kv) // 2]]
        if n_best > 1:
            found = back(self.network[CANDIDATES].execute(*there(tokens, texts.lengths), *given))
            best, logprobs = (each[:, :n_best] for each in found)
            tokens = tokens.scatter(1, texts.lengths[:, None], best[:, :1])
            lengths, totals = texts.lengths + 1, texts.totals + logprobs[:, 0]
        else:
            state = there(tokens, texts.lengths, texts.totals, torch.zeros(len(tokens), dtype=torch.float32))
            (ends,) = there(texts.lengths + n_token)
            for _ in range(min(int(n_token.max()), STEPS_AT_ONCE)):
                state = self.network[PICK].execute(*state, ends, *given)
            tokens, lengths, totals, latest = back(state)
            best, logprobs = tokens.gather(1, lengths[:, None] - 1), latest[:, None]
        return Picked(Texts(tokens[:, : int(lengths.max())], lengths, totals), Candidates(best, logprobs))

    def make_rough(self, cross: Sequence[torch.Tensor], into: torch.Tensor, row: int) -> None:
        """Puts keys and values of audio into some of `rough_room`, from a row on."""
        self.network[ROUGH_KEYS](into, torch.tensor([row]), *cross)

    def _check_room(self, n_token: int) -> None:
        if n_token > self.dims.n_text_ctx:
            raise OptionError(f"the text has {n_token} tokens, the model has places for {self.dims.n_text_ctx}")

    def _check(self, x: torch.Tensor, xa: torch.Tensor, cache: KeyValueCache, positions: torch.Tensor | None) -> None:
        dims = self.dims
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int64, torch.int32):
            found = x.dtype if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
            raise OptionError(f"tokens are {found}, expected a tensor of torch.int64 or torch.int32")
        if x.ndim != 2 or 0 in x.shape:
            raise OptionError(f"tokens are {tuple(x.shape)}, expected (batch, token)")
        if not 0 <= x.min() <= x.max() < dims.n_vocab:
            raise OptionError(f"tokens reach from {x.min()} to {x.max()}, the vocabulary from 0 to {dims.n_vocab - 1}")
        if positions is not None and (cache or not 0 <= positions.min() <= positions.max() < x.shape[1]):
            raise OptionError(
                f"positions {positions.tolist()} are not all in the {x.shape[1]} tokens of a text's start"
            )
        self._check_room(cache.n_token + x.shape[1])
        if cache:
            if x.shape != (len(cache.own[0]), 1):
                raise OptionError(f"tokens are {tuple(x.shape)}, expected {(len(cache.own[0]), 1)} behind this cache")
            return
        check_floats("xa", xa)
        if xa.ndim != 3 or xa.shape[1:] != (dims.n_audio_ctx, dims.n_audio_state):
            expected = f"(audio, {dims.n_audio_ctx}, {dims.n_audio_state})"
            raise OptionError(f"audio features are {tuple(xa.shape)}, expected {expected}")
        if not len(xa) or len(x) % len(xa):
            raise OptionError(f"{len(x)} texts cannot share {len(xa)} rows of audio features evenly")
