"""Wrong models of wrong graphs: what a port of the network gets wrong that no weight shows."""

from collections.abc import Iterator
from functools import partial

from max.graph import ops

from maxwhisper.network import model

from . import mistakes
from .faults import Fault, path_of


def graph_faults() -> Iterator[Fault]:
    """Yields faults of which each is a way in which a port of the network is wrong that no weight shows."""

    def fault(name: str, block: str, patched: mistakes.Patch, published: bool = False) -> Fault:
        return Fault(name, block, path_of(block), patched=patched, kind="graph", published=published)

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
    attn, cross, step = "encoder.attention", "decoder.cross_attention.prefill", "decoder.step"
    larger = mistakes.attention(lambda a: 1.56 * a.n_channel**-0.5)
    yield fault("scores scaled by 1.56", cross, larger, True)
    yield fault("softmax in half precision", attn, mistakes.attention(softmax=mistakes.half_softmax))
    low = mistakes.attention(computed_in=lambda policy: mistakes.half(policy.compute))
    yield fault("attention summed in half precision", attn, low)
    single = mistakes.method(model.MultiHeadAttention, "qkv_attention", mistakes.single_head)
    yield fault("one head of the whole width", attn, mistakes.written_out(single), True)
    interleaved = mistakes.method(model.MultiHeadAttention, "keys_values", mistakes.interleaved_heads)
    yield fault("heads interleaved", attn, interleaved)
    yield fault("another row's audio", cross, mistakes.attention(kv_of=mistakes.of_next_row))

    causal = "decoder.attention.causal"
    minus_infinity = float("-inf")
    yield fault("no mask at prefill", causal, mistakes.mask(partial(mistakes.band, 0.0, 0)))
    yield fault("mask one token late", causal, mistakes.mask(partial(mistakes.band, minus_infinity, 1)))
    yield fault("mask of -1", causal, mistakes.mask(partial(mistakes.band, -1.0, 0)))
    yield fault("mask over earlier tokens", causal, mistakes.mask(mistakes.earlier_hidden))
    dropped = mistakes.written_out(mistakes.mask(mistakes.by_comparison))
    yield fault("mask by comparison, which MAX drops", causal, dropped)

    cached = "decoder.attention.cached"
    yield fault("padded rows not masked", cached, mistakes.attention(kv_of=mistakes.with_padding), True)
    late = mistakes.cached(lambda c: c._replace(length=c.length + 1))
    yield fault("place behind the cached ones heard", cached, late)
    yield fault("oldest key only", cached, mistakes.cached(lambda c: c._replace(length=mistakes.cpu_int(1))))
    yield fault("newest key left out", cached, mistakes.attention(kv_of=mistakes.without_newest), True)
    exchanged = mistakes.cached(lambda c: c._replace(k=c.v, v=c.k))
    yield fault("cached keys and values exchanged", cached, exchanged)
    order = mistakes.layers(mistakes.keys_then_values)
    yield fault("cache read K, V where it is K, K, V, V", step, order, True)
    yield fault("position one too far", step, mistakes.embedding(lambda offset: offset + 1))
    at_prompt = mistakes.embedding(lambda offset: ops.min(offset, mistakes.cpu_int(4)))
    yield fault("position stays at the prompt's end", step, at_prompt)
    yield fault("audio of the layer before", "decoder.prefill", mistakes.layers(lambda of: [*of[-1:], *of[:-1]]))
    yield fault("offset ignored", "decoder.embedding", mistakes.embedding(lambda offset: 0))

    yield fault("conv one frame early", "encoder.stem", mistakes.conv(padding=(2, 0)))
    yield fault("conv one frame late", "encoder.stem", mistakes.conv(padding=(0, 2)))
    yield fault("conv taps reversed in the graph", "encoder.stem", mistakes.conv(reverse=True), True)
    for form in ("positions before GELU", "no positions", "second GELU left out"):
        yield fault(f"stem: {form}", "encoder.stem", mistakes.stem(form))

    for form, block in (
        ("residual from the norm", "encoder.block"),
        ("mlp without residual", "encoder.block"),
        ("cross-attention without residual", "decoder.block.prefill"),
        ("cross-attention's norm left out", "decoder.block.step"),
    ):
        yield fault(form, block, mistakes.residual(form))
    yield fault("place behind the cached ones heard, in the block's kernel", "decoder.block.step", late)
    yield fault("another text's cache", "decoder.block.step", mistakes.cached(mistakes.of_next_text))
    logits = mistakes.method(model.TextDecoder, "logits", mistakes.logits_without_norm)
    yield fault("last norm left out, decoder", "decoder.logits.prefill", logits, True)
    encoder = mistakes.method(model.AudioEncoder, "__call__", mistakes.encoder_without_norm)
    yield fault("last norm left out, encoder", "encoder", encoder, True)
    for form in ("bias left out at a step", "summed in half precision"):
        yield fault(f"product: {form}", "decoder.mlp.step", mistakes.product(form))

    for form in ("magnitude for power", "clamp left out", "ln for log10", "dynamic range not limited", "not scaled"):
        yield fault(f"mel: {form}", "log_mel", mistakes.log_mel(form))
    librosa = "decibels below the peak, as librosa"
    yield fault(f"mel: {librosa}", "log_mel", mistakes.log_mel(librosa), True)
