"""Wrong models of wrong graphs: what a port of the network gets wrong that no weight shows."""

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

from max.dtype import DType
from max.graph import ops

from maxwhisper.network import model
from maxwhisper.network.blocks import BLOCKS

from . import mistakes
from .faults import LAYER, Fault


def graph_faults() -> Iterator[Fault]:
    """Every one is a way in which a port of the network is wrong that no weight shows."""

    def fault(name: str, block: str, patched: mistakes.Patch, published: bool = False) -> Fault:
        path = BLOCKS[block].path.format(audio_layer=LAYER, text_layer=LAYER)
        return Fault(name, block, path, patched=patched, published=published)

    gelu = partial(mistakes.method, model.GELU, "__call__")
    yield fault("tanh GELU", "encoder.mlp", gelu(lambda self, x: ops.gelu(x, "tanh")))
    yield fault("quick GELU", "encoder.mlp", gelu(lambda self, x: ops.gelu(x, "quick")))
    yield fault("GELU left out", "decoder.mlp.step", gelu(lambda self, x: x))
    yield fault("epsilon 1e-6", "encoder.layer_norm", mistakes.method(model.LayerNorm, "epsilon", 1e-6))  # type: ignore[arg-type]
    for form in ("epsilon outside the root", "divided by n - 1", "mean not subtracted"):
        yield fault(f"norm: {form}", "encoder.layer_norm", mistakes.norm(form))

    for block in ("encoder.attention", "decoder.cross_attention.step"):
        where = "encoder" if block.startswith("encoder") else "cross-attention"
        yield fault(f"no scale, {where}", block, mistakes.attention(lambda attn: 1.0))
        yield fault(f"scale applied twice, {where}", block, mistakes.attention(lambda attn: 1 / attn.n_channel))
        wide = mistakes.attention(lambda attn: (attn.n_channel * attn.n_head) ** -0.5)
        yield fault(f"scale of the whole width, {where}", block, wide)
    yield fault(
        "scores scaled by 1.56",
        "decoder.cross_attention.prefill",
        mistakes.attention(lambda a: 1.56 * a.n_channel**-0.5),
        True,
    )
    yield fault(
        "softmax in half precision",
        "encoder.attention",
        mistakes.attention(softmax=mistakes.half_softmax),
    )
    qkv = partial(mistakes.method, model.MultiHeadAttention, "qkv_attention")
    low, single = (mistakes.written_out(qkv(f)) for f in (mistakes.summed_in_compute_dtype, mistakes.single_head))
    yield fault("attention summed in half precision", "encoder.attention", low)
    yield fault("one head of the whole width", "encoder.attention", single, True)
    yield fault(
        "heads interleaved",
        "encoder.attention",
        mistakes.method(model.MultiHeadAttention, "keys_values", mistakes.interleaved_heads),
    )
    yield fault(
        "another row's audio", "decoder.cross_attention.prefill", mistakes.attention(kv_of=mistakes.of_next_row)
    )

    causal = "decoder.attention.causal"
    minus_infinity = float("-inf")
    yield fault("no mask at prefill", causal, mistakes.mask(partial(mistakes.band, 0.0, 0)))
    yield fault("mask one token late", causal, mistakes.mask(partial(mistakes.band, minus_infinity, 1)))
    yield fault("mask of -1", causal, mistakes.mask(partial(mistakes.band, -1.0, 0)))
    yield fault("mask over earlier tokens", causal, mistakes.mask(mistakes.earlier_hidden))
    yield fault(
        "mask by comparison, which MAX drops", causal, mistakes.written_out(mistakes.mask(mistakes.by_comparison))
    )

    cached = "decoder.attention.cached"
    yield fault("padded rows not masked", cached, mistakes.attention(kv_of=mistakes.with_padding), True)
    yield fault(
        "place behind the cached ones heard", cached, mistakes.cached(lambda c: c._replace(length=c.length + 1))
    )
    yield fault("oldest key only", cached, mistakes.cached(lambda c: c._replace(length=mistakes.cpu_int(1))))
    yield fault("newest key left out", cached, mistakes.attention(kv_of=mistakes.without_newest), True)
    yield fault(
        "cached keys and values exchanged",
        cached,
        mistakes.cached(lambda c: c._replace(k=c.v, v=c.k)),
    )
    yield fault(
        "cache read K, V where it is K, K, V, V",
        "decoder.step",
        lambda: patch.object(model, "grouped", mistakes.keys_then_values),
        True,
    )
    embed, layers = model.TextDecoder.embed, model.TextDecoder._layers
    yield fault(
        "position one too far",
        "decoder.step",
        mistakes.method(model.TextDecoder, "embed", lambda self, tokens, offset: embed(self, tokens, offset + 1)),
    )
    yield fault(
        "position stays at the prompt's end",
        "decoder.step",
        mistakes.method(
            model.TextDecoder,
            "embed",
            lambda self, tokens, offset: embed(self, tokens, ops.min(offset, mistakes.cpu_int(4))),
        ),
    )
    yield fault(
        "audio of the layer before",
        "decoder.prefill",
        mistakes.method(
            model.TextDecoder,
            "_layers",
            lambda self, method, x, inputs: layers(self, method, x, [*inputs[-1:], *inputs[:-1]]),
        ),
    )
    yield fault(
        "offset ignored",
        "decoder.embedding",
        mistakes.method(model.TextDecoder, "embed", lambda self, tokens, offset: embed(self, tokens, 0)),
    )

    yield fault("conv one frame early", "encoder.stem", mistakes.conv(padding=(2, 0)))
    yield fault("conv one frame late", "encoder.stem", mistakes.conv(padding=(0, 2)))
    yield fault("conv taps reversed in the graph", "encoder.stem", mistakes.conv(reverse=True), True)
    for form in ("positions before GELU", "no positions", "second GELU left out"):
        yield fault(f"stem: {form}", "encoder.stem", mistakes.stem(form))

    yield fault("residual from the norm", "encoder.block", mistakes.residual("residual from the norm"))
    yield fault("mlp without residual", "encoder.block", mistakes.residual("mlp without residual"))
    yield fault(
        "cross-attention without residual",
        "decoder.block.prefill",
        mistakes.residual("cross-attention without residual"),
    )
    yield fault(
        "cross-attention's norm left out", "decoder.block.step", mistakes.residual("cross-attention's norm left out")
    )
    late = mistakes.cached(lambda c: c._replace(length=c.length + 1))
    yield fault("place behind the cached ones heard, in the block's kernel", "decoder.block.step", late)
    yield fault("another text's cache", "decoder.block.step", mistakes.cached(mistakes.of_next_text))
    no_ln = lambda self, x: model.linear(x, self.token_embedding.weight).cast(DType.float32)  # noqa: E731
    yield fault(
        "last norm left out, decoder",
        "decoder.logits.prefill",
        mistakes.method(model.TextDecoder, "logits", no_ln),
        True,
    )
    yield fault(
        "last norm left out, encoder",
        "encoder",
        mistakes.method(model.AudioEncoder, "__call__", mistakes.encoder_without_norm),
        True,
    )
    for form in ("bias left out at a step", "summed in half precision"):
        yield fault(f"product: {form}", "decoder.mlp.step", mistakes.product(form))

    for form in ("magnitude for power", "clamp left out", "ln for log10", "dynamic range not limited", "not scaled"):
        yield fault(f"mel: {form}", "log_mel", mistakes.log_mel(form))
    yield fault(
        "mel: decibels below the peak, as librosa",
        "log_mel",
        mistakes.log_mel("decibels below the peak, as librosa"),
        True,
    )
