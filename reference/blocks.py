"""The PyTorch twin of every block: openai-whisper's own modules, called on a block's inputs.

Each twin takes the PyTorch model, the layer's number and the block's named inputs, and returns what the MAX block
returns. The modules and their forward methods are openai-whisper's; what stands here hands them the inputs that they
would otherwise compute, such as a cache, and takes up the values that they keep to themselves, such as keys.

Heads: MAX keeps keys and values as (batch, head, token, channel), OpenAI as (batch, token, state).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from whisper.audio import HOP_LENGTH, N_FFT, log_mel_spectrogram, mel_filters
from whisper.model import LayerNorm, ModelDimensions, MultiHeadAttention, ResidualAttentionBlock, Whisper

# In float32 the peer computes in float32. On a GPU PyTorch would convolve in TF32, whose mantissa has 10 bits.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytorch_whisper(dims: ModelDimensions, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Whisper:
    """Returns openai-whisper's model with the given weights.

    In float64 it is the oracle. OpenAI's LayerNorm casts to float32 whatever it is given, so there it is replaced by
    the PyTorch class it derives from. In every other dtype it is the peer: weights stay float32, as OpenAI's
    `load_model` keeps them, and its modules cast them to the dtype of what they are given.
    """
    model = Whisper(dims)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    if dtype == torch.float64:
        model = model.double()
        for module in model.modules():
            if isinstance(module, LayerNorm):
                module.__class__ = nn.LayerNorm
    model.compute = dtype  # of activations; a model of float32 weights does not know it
    return model.eval().requires_grad_(False)


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """Splits (batch, token, state) into (batch, head, token, channel)."""
    return x.unflatten(2, (n_head, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Joins (batch, head, token, channel) into (batch, token, state)."""
    return x.transpose(1, 2).flatten(2)


@contextmanager
def self_attention_cache(attn: MultiHeadAttention, cache: tuple[Tensor, Tensor] | None) -> Iterator[list[Tensor]]:
    """Puts a cache before what `attn` computes as keys and values; yields a list that receives what it computes."""
    results: list[Tensor] = []

    def prepend(past: Tensor | None) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            results.append(split_heads(output, attn.n_head))
            return output if past is None else torch.cat([past, output], dim=1)

        return hook

    past = (None, None) if cache is None else tuple(join_heads(x) for x in cache)
    with ExitStack() as stack:
        for module, x in zip((attn.key, attn.value), past, strict=True):
            stack.callback(module.register_forward_hook(prepend(x)).remove)
        yield results


def cross_attention_cache(attn: MultiHeadAttention, k: Tensor, v: Tensor, batch: int) -> dict[nn.Module, Tensor]:
    """Returns the dictionary of keys and values of OpenAI's cross-attention, a row for each of `batch` texts."""
    return {m: join_heads(x).repeat_interleave(batch // x.shape[0], 0) for m, x in ((attn.key, k), (attn.value, v))}


def log_mel(model: Whisper, layer: int, audio: Tensor) -> list[Tensor]:
    """Computes OpenAI's function, which is float32; in float64 its formula, with window and transform of that dtype."""
    n_mels = model.dims.n_mels
    if audio.dtype != torch.float64:
        return [log_mel_spectrogram(audio, n_mels)]
    window = torch.hann_window(N_FFT, dtype=torch.float64)
    power = torch.stft(audio, N_FFT, HOP_LENGTH, window=window, return_complex=True)[:, :-1].abs() ** 2
    log_mel = (mel_filters("cpu", n_mels).double() @ power).clamp(min=1e-10).log10()
    return [(log_mel.maximum(log_mel.max() - 8) + 4) / 4]


def encoder_stem(model: Whisper, layer: int, mel: Tensor) -> list[Tensor]:
    encoder = model.encoder
    x = nn.functional.gelu(encoder.conv1(mel))
    x = nn.functional.gelu(encoder.conv2(x)).permute(0, 2, 1)
    return [(x + encoder.positional_embedding).to(x.dtype)]


def submodule(path: str) -> Callable[..., list[Tensor]]:
    """Returns what calls a submodule of this name with its one input; "{layer}" stands for the layer's number."""

    def forward(model: Whisper, layer: int, **x: Tensor) -> list[Tensor]:
        y = model.get_submodule(path.format(layer=layer))(*x.values())
        return [y[0] if isinstance(y, tuple) else y]

    return forward


def decoder_embedding(model: Whisper, layer: int, tokens: Tensor, offset: Tensor) -> list[Tensor]:
    positions = model.decoder.positional_embedding[int(offset) : int(offset) + tokens.shape[1]]
    return [(model.decoder.token_embedding(tokens) + positions).to(model.compute)]


def causal_attention(model: Whisper, layer: int, x: Tensor) -> list[Tensor]:
    attn = model.decoder.blocks[layer].attn
    with self_attention_cache(attn, None) as kv:
        return [attn(x, mask=model.decoder.mask)[0], *kv]


def filled(cache: Tensor, offset: Tensor) -> Tensor:
    """Returns the positions of a cache (batch, head, position, channel) that hold keys or values."""
    return cache[:, :, : int(offset)]


def cached_attention(
    model: Whisper, layer: int, x: Tensor, offset: Tensor, k_cache: Tensor, v_cache: Tensor
) -> list[Tensor]:
    attn = model.decoder.blocks[layer].attn
    with self_attention_cache(attn, (filled(k_cache, offset), filled(v_cache, offset))) as kv:
        return [attn(x, mask=model.decoder.mask)[0], *kv]


def cross_keys_values(model: Whisper, layer: int, audio_features: Tensor) -> list[Tensor]:
    attn = model.decoder.blocks[layer].cross_attn
    return [split_heads(project(audio_features), attn.n_head) for project in (attn.key, attn.value)]


def cross_attention(model: Whisper, layer: int, x: Tensor, k_cross: Tensor, v_cross: Tensor) -> list[Tensor]:
    attn = model.decoder.blocks[layer].cross_attn
    return [attn(x, x, kv_cache=cross_attention_cache(attn, k_cross, v_cross, x.shape[0]))[0]]


def decoder_block(model: Whisper, layer: int, x: Tensor, **kv: Tensor) -> list[Tensor]:
    """Computes a layer at prefill, or at a step when there are an offset, a k_cache and a v_cache."""
    block: ResidualAttentionBlock = model.decoder.blocks[layer]
    cache = (filled(kv["k_cache"], kv["offset"]), filled(kv["v_cache"], kv["offset"])) if "k_cache" in kv else None
    cross = cross_attention_cache(block.cross_attn, kv["k_cross"], kv["v_cross"], x.shape[0])
    with self_attention_cache(block.attn, cache) as new:
        return [block(x, x, mask=model.decoder.mask, kv_cache=cross), *new]


def decoder_logits(model: Whisper, layer: int, x: Tensor) -> list[Tensor]:
    """Computes OpenAI's last two lines, but float64 stays float64."""
    decoder = model.decoder
    logits = decoder.ln(x) @ decoder.token_embedding.weight.to(x.dtype).T
    return [logits if x.dtype == torch.float64 else logits.float()]


def decoder_keys_values(model: Whisper, layer: int, audio_features: Tensor) -> list[Tensor]:
    return [t for i in range(model.dims.n_text_layer) for t in cross_keys_values(model, i, audio_features)]


def decoder(
    model: Whisper, layer: int, tokens: Tensor, positions: Tensor | slice = slice(None), **kv: Tensor
) -> list[Tensor]:
    """Computes the decoder at prefill, or at a step where there are an offset and caches; logits at some positions."""
    offset = kv.get("offset", torch.tensor(0))
    (x,) = decoder_embedding(model, 0, tokens, offset)
    others: list[Tensor] = []
    for i in range(model.dims.n_text_layer):
        own = {name.removesuffix(f".{i}"): t for name, t in kv.items() if name.endswith(f".{i}")}
        x, *new = decoder_block(model, i, x, offset=offset, **own)
        others += new
    return [*decoder_logits(model, 0, x[:, positions]), *others]


def cross_scores(attn: MultiHeadAttention, x: Tensor, k_cross: Tensor) -> Tensor:
    """Returns scores before softmax (batch, head, token, n_audio_ctx), scaled as OpenAI scales them.

    OpenAI's own method rounds them to float32, which would not do for the oracle.
    """
    q = split_heads(attn.query(x), attn.n_head)
    k = k_cross.repeat_interleave(len(q) // len(k_cross), 0)
    scale = q.shape[-1] ** -0.25
    scores = (q * scale) @ (k * scale).transpose(-1, -2)
    return scores if scores.dtype == torch.float64 else scores.float()


def decoder_alignment(model: Whisper, layer: int, tokens: Tensor, **kv: Tensor) -> list[Tensor]:
    """Computes the decoder at prefill, and every layer's cross-attention scores."""
    scores: list[Tensor] = []

    def hook(k_cross: Tensor) -> Callable[..., None]:
        return lambda attn, inputs, outputs: scores.append(cross_scores(attn, inputs[0], k_cross))

    with ExitStack() as stack:
        for i, block in enumerate(model.decoder.blocks):
            stack.callback(block.cross_attn.register_forward_hook(hook(kv[f"k_cross.{i}"])).remove)
        logits = decoder(model, 0, tokens, **kv)[0]
    return [logits, *scores]


# ---- the table -----------------------------------------------------------------------------------------------------

Count = Callable[[ModelDimensions], int]


@dataclass(frozen=True)
class Twin:
    """A block on PyTorch, and what decides how large its rounding errors may become.

    forward: the function above. longest_reduction: the most terms, of either sign, that any one value inside the block
    is summed from. roundings: how many values in a row it rounds to the dtype, each made from the one before. step:
    whether it takes one token behind a cache. long_text: whether it is another thing for it that a text is long.
    """

    forward: Callable[..., list[Tensor]]
    longest_reduction: Count
    roundings: Count
    step: bool = False
    long_text: bool = False

    def __call__(self, model: Whisper, layer: int, **inputs: Tensor) -> list[Tensor]:
        """Computes the block's outputs with the weights of a layer of the model."""
        return self.forward(model, layer, **inputs)


def always(number: int) -> Count:
    return lambda dims: number


def audio_state(dims: ModelDimensions) -> int:
    return dims.n_audio_state


def text_state(dims: ModelDimensions) -> int:
    return dims.n_text_state


def times(factor: int, size: Count) -> Count:
    return lambda dims: factor * size(dims)


def attending(size: Count) -> Count:
    """Returns the count of the longer sum: that of a projection, over `size`, or attention's, over the audio."""
    return lambda dims: max(size(dims), dims.n_audio_ctx)


SQUARES = 2
"""The terms that a norm's sum counts for. Squares have one sign: added in pairs, a pair's error counts by its share of
the whole, so all levels of additions together err like the last two."""
NORM, PROJECTIONS, MLP, SUM = 1, 3, 3, 1
"""Values in a row that are rounded: a norm; query, weighted values and out; hidden, GELU and out; a sum."""
STEM, EMBEDDING, LOGITS = 5, 1, NORM + 1
AUDIO_BLOCK = NORM + PROJECTIONS + SUM + NORM + MLP + SUM
TEXT_BLOCK = AUDIO_BLOCK + NORM + PROJECTIONS + SUM
AUDIO_HIDDEN, TEXT_HIDDEN = times(4, audio_state), times(4, text_state)


def whole_encoder(dims: ModelDimensions) -> int:
    return STEM + dims.n_audio_layer * AUDIO_BLOCK + NORM


def whole_decoder(dims: ModelDimensions) -> int:
    return EMBEDDING + dims.n_text_layer * TEXT_BLOCK + LOGITS


text_twin = partial(Twin, long_text=True)

TWINS: dict[str, Twin] = {
    "log_mel": Twin(log_mel, always(N_FFT), always(1)),
    "encoder.stem": Twin(encoder_stem, times(3, audio_state), always(STEM)),
    "encoder.layer_norm": Twin(submodule("encoder.blocks.{layer}.attn_ln"), always(SQUARES), always(NORM)),
    "encoder.attention": Twin(submodule("encoder.blocks.{layer}.attn"), attending(audio_state), always(PROJECTIONS)),
    "encoder.mlp": Twin(submodule("encoder.blocks.{layer}.mlp"), AUDIO_HIDDEN, always(MLP)),
    "encoder.block": Twin(submodule("encoder.blocks.{layer}"), attending(AUDIO_HIDDEN), always(AUDIO_BLOCK)),
    "encoder": Twin(submodule("encoder"), attending(AUDIO_HIDDEN), whole_encoder),
    "decoder.embedding": text_twin(decoder_embedding, always(1), always(EMBEDDING)),
    "decoder.attention.causal": text_twin(causal_attention, attending(text_state), always(PROJECTIONS)),
    "decoder.attention.cached": text_twin(cached_attention, attending(text_state), always(PROJECTIONS), step=True),
    "decoder.cross_attention.keys_values": Twin(cross_keys_values, text_state, always(1)),
    "decoder.cross_attention.prefill": text_twin(cross_attention, attending(text_state), always(PROJECTIONS)),
    "decoder.cross_attention.step": text_twin(cross_attention, attending(text_state), always(PROJECTIONS), step=True),
    "decoder.mlp.prefill": text_twin(submodule("decoder.blocks.{layer}.mlp"), TEXT_HIDDEN, always(MLP)),
    "decoder.mlp.step": text_twin(submodule("decoder.blocks.{layer}.mlp"), TEXT_HIDDEN, always(MLP), step=True),
    "decoder.block.prefill": text_twin(decoder_block, attending(TEXT_HIDDEN), always(TEXT_BLOCK)),
    "decoder.block.step": text_twin(decoder_block, attending(TEXT_HIDDEN), always(TEXT_BLOCK), step=True),
    "decoder.logits.prefill": Twin(decoder_logits, text_state, always(LOGITS)),
    "decoder.logits.step": Twin(decoder_logits, text_state, always(LOGITS), step=True),
    "decoder.keys_values": Twin(decoder_keys_values, text_state, always(1)),
    "decoder.prefill": text_twin(decoder, attending(TEXT_HIDDEN), whole_decoder),
    "decoder.start": text_twin(decoder, attending(TEXT_HIDDEN), whole_decoder),
    "decoder.step": text_twin(decoder, attending(TEXT_HIDDEN), whole_decoder, step=True),
    "decoder.alignment": text_twin(decoder_alignment, attending(TEXT_HIDDEN), whole_decoder),
}
"""By name of the block in `maxwhisper.network.blocks.BLOCKS`."""
