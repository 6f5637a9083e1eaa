"""By which words pytest's -k finds a block.

`-k` looks for a word inside the names of tests, which hold the names of their blocks. Who knows openai-whisper, PyTorch
or transformers has other words for the same things: those of WORDS. They count where they are typed whole, so that
`mlp` finds no whole block because a part of it is called `mlp_ln`, nor `attention` one for a ResidualAttentionBlock.
"""

from fnmatch import fnmatchcase
from functools import cache

from maxwhisper.network.blocks import BLOCKS

WORDS: tuple[tuple[str, str], ...] = (
    ("log_mel", "spectrogram mel_spectrogram log_mel_spectrogram mel_filters filterbank stft"),
    ("encoder.stem", "conv conv1 conv2 conv1d convolution convolutions"),
    ("encoder.stem decoder.embedding", "positional positional_embedding embed_positions"),
    ("encoder.stem *.mlp *.mlp.*", "gelu"),
    ("encoder.layer_norm", "layernorm"),
    ("encoder.layer_norm *.logits.*", "ln"),
    ("encoder.layer_norm decoder.block.*", "attn_ln self_attn_layer_norm"),
    ("decoder.block.*", "cross_attn_ln encoder_attn_layer_norm"),
    ("encoder.block decoder.block.*", "mlp_ln final_layer_norm residual residualattentionblock blocks"),
    ("encoder", "ln_post audioencoder audio_encoder"),
    ("decoder.keys_values decoder.prefill decoder.start decoder.step decoder.alignment", "textdecoder text_decoder"),
    ("*attention *attention.*", "attn multiheadattention multihead_attention k_proj v_proj"),
    ("encoder.attention decoder.attention.*", "self self_attn self_attention"),
    ("decoder.cross_attention.*", "cross_attn encoder_attn"),
    (
        "encoder.attention decoder.attention.* *.cross_attention.prefill *.cross_attention.step",
        "softmax qkv_attention scaled_dot_product_attention sdpa query q_proj out out_proj",
    ),
    ("decoder.attention.causal", "mask causal_mask"),
    ("decoder.attention.cached decoder.block.step decoder.step", "cache kv_cache k_cache v_cache"),
    ("*keys_values decoder.attention.cached decoder.block.step decoder.step", "kv"),
    ("*.mlp *.mlp.*", "sequential ffn feed_forward feedforward fc1 fc2"),
    ("*.mlp *.mlp.* *attention *attention.* decoder.keys_values", "linear"),
    ("decoder.embedding *.logits.*", "token_embedding embed_tokens"),
    ("*.logits.*", "proj_out lm_head unembedding"),
    ("decoder.alignment", "timestamps word_timestamps timing find_alignment alignment_heads dtw"),
)
"""Names of blocks, with * for any part of one, and the words that find them beside their own. The name of a module
inside the network finds the innermost blocks that compute it; the name of a class those that are one."""


@cache
def words_of(block: str) -> frozenset[str]:
    """Returns the words that find a block beside those in its name."""
    found = (words.split() for names, words in WORDS if any(fnmatchcase(block, name) for name in names.split()))
    return frozenset(word for words in found for word in words)


def finds(typed: str, block: str) -> bool:
    """Tells whether a word of a -k expression means the block: part of its name, or all of another word for it.

    Case does not matter, nor whether - or _ stands between two words; of a path, as `encoder.ln_post`, every part must.
    """
    word = typed.lower().replace("-", "_")
    return word in block or all(part in words_of(block) or part in block.split(".") for part in word.split("."))


def all_words() -> list[str]:
    """Returns every word that finds a block: the parts of the blocks' names, then the others."""
    own = sorted({part for block in BLOCKS for part in block.split(".")})
    return [*own, *sorted({word for _, words in WORDS for word in words.split()} - set(own))]
