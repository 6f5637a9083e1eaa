"""The judge on trial: wrong models, every one of which it must catch, in the block that is wrong.

A *weight* fault changes the tensors that MAX is given, and needs no compilation. A *graph* fault changes
`maxwhisper.network` while one block's graph is built; all of a run compile into one artifact. The oracle and the peer
stay right in both.

Caught means that a check fails: one of the judge's measures on the block alone (the isolated verdict), or the chain
over the whole network, which must then name a submodule inside the faulty block as the first divergence.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from max.dtype import DType
from max.graph import TensorValue, ops
from max.nn.layer import Module
from torch import Tensor
from whisper.audio import N_FFT, SAMPLE_RATE
from whisper.model import ModelDimensions

from maxwhisper.engine.program import Artifact, Executable, Program
from maxwhisper.network import model
from maxwhisper.network.blocks import BLOCKS, Block

from . import mistakes
from .activations import KINDS
from .judge import Judgement, K
from .suite import Suite

Tensors = dict[str, Tensor]
ENCODER, DECODER = "encoder.blocks.1", "decoder.blocks.1"
LAYER = 1
"""Faults that are in a layer are in this one: neither the first nor, in the decoder, the last."""


@dataclass(frozen=True)
class Fault:
    """A wrong model.

    block: the entry of BLOCKS, the innermost, that is wrong by it. path: its place in the PyTorch model, where the
    first divergence must lie. change: of the tensors. patched: of the code, while the graph is built. published:
    whether an earlier attempt at this port is known to have made it.
    """

    name: str
    block: str
    path: str
    change: Callable[[Tensors, ModelDimensions], Mapping[str, Tensor]] | None = None
    patched: mistakes.Patch | None = None
    published: bool = False


@dataclass(frozen=True)
class FaultVerdict:
    """What the judge made of a fault in one dtype.

    checks: those that failed, "isolated: <measure>" or "chain". divergence: where the chain first left its budget, None
    where it did not or was not run. used: how much of its budget the block took at most, above 1 being caught.
    rounding: by kind of inputs, the relative L2 of PyTorch's own error in the block. effect: the same of the faulty
    block; of one that was not caught, in float32.
    """

    fault: Fault
    dtype: torch.dtype
    checks: tuple[str, ...]
    divergence: str | None
    used: float
    rounding: Mapping[str, float]
    effect: Mapping[str, float]

    @property
    def caught(self) -> bool:
        return bool(self.checks)

    @property
    def right_block(self) -> bool:
        """Whether it was caught, and the chain, if that was run and diverged, did so where the faulty block stands."""
        return self.caught and (self.divergence or self.fault.path).removeprefix("step ").startswith(self.fault.path)

    @property
    def below_rounding(self) -> bool:
        """Whether the fault changes the block less than PyTorch's rounding does, on all inputs; never so in float32."""
        return self.dtype != torch.float32 and all(self.effect[kind] <= self.rounding[kind] for kind in self.rounding)

    @property
    def below_budget(self) -> bool:
        """Whether its effect is less than K times PyTorch's rounding, where the judge is blind by design."""
        return self.dtype != torch.float32 and all(
            self.effect[kind] <= K * self.rounding[kind] for kind in self.rounding
        )

    @property
    def accepted(self) -> bool:
        return self.right_block if self.caught else self.below_budget

    @property
    def only_check(self) -> str | None:
        """The one check that caught it, if it was only one: nobody must delete that."""
        return self.checks[0] if len(self.checks) == 1 else None

    def __str__(self) -> str:
        found = ", ".join(self.checks) or "nothing"
        kind = max(self.rounding, key=lambda kind: self.effect[kind] / (self.rounding[kind] or 1), default="")
        lines = [
            f"fault: {self.fault.name}, in {self.fault.block}, {self.dtype}",
            f"  caught by {found}; the block used {self.used:.3g} of its budget",
            f"  the chain's first divergence: {self.divergence}, expected in {self.fault.path}",
        ]
        if kind:
            figures = f"effect {self.effect[kind]:.1e}, PyTorch's rounding {self.rounding[kind]:.1e}"
            lines.append(f"  relative L2, {kind}: {figures}")
        return "\n".join(lines)


# ---- weight faults -------------------------------------------------------------------------------------------------


def at(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, ModelDimensions], Tensors]:
    """One tensor changed."""
    return lambda tensors, dims: {name: change(tensors[name])}


def swapped(one: str, other: str) -> Callable[[Tensors, ModelDimensions], Tensors]:
    """Two tensors, or all tensors of two modules, in each other's places."""

    def change(tensors: Tensors, dims: ModelDimensions) -> Tensors:
        names = [name for name in tensors if name == one or name.startswith(one + ".")]
        pairs = {name: other + name.removeprefix(one) for name in names}
        return {a: tensors[b] for a, b in pairs.items() if b in tensors} | {
            b: tensors[a] for a, b in pairs.items() if b in tensors
        }

    return change


def copied(source: str, destination: str) -> Callable[[Tensors, ModelDimensions], Tensors]:
    """All tensors of one module in the place of another's: stale weights."""
    return lambda tensors, dims: {
        destination + name.removeprefix(source): tensor
        for name, tensor in tensors.items()
        if name.startswith(source + ".")
    }


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def heads_exchanged(x: Tensor) -> Tensor:
    """(n_state, n_in): the rows of the first head and those of the second exchanged."""
    return torch.cat([x[64:128], x[:64], x[128:]])


def one_element_off(x: Tensor) -> Tensor:
    """One element off by a hundredth of its row's norm."""
    y = x.clone()
    y[7, 11] += x[7].float().norm() / 100
    return y


def rounded_to_8_bits(x: Tensor) -> Tensor:
    step = x.float().abs().max() / 127
    return ((x.float() / step).round() * step).to(x.dtype)


def bits_read_as_bfloat16(x: Tensor) -> Tensor:
    return x.half().view(torch.bfloat16).float().clamp(-65504, 65504).half().to(x.dtype)


def one_row(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def of(x: Tensor) -> Tensor:
        y = x.clone()
        y[5] = change(x[5])
        return y

    return of


def half_window(x: Tensor) -> Tensor:
    """The Fourier basis (row, PIECE, tap) under a symmetric Hann window in the place of the periodic one."""
    windows = (torch.hann_window(N_FFT, periodic=p, dtype=torch.float64) for p in (True, False))
    periodic, symmetric = (window.reshape(-1, x.shape[1]).T for window in windows)
    return torch.where(periodic == 0, 0, x.double() / periodic.clamp(min=1e-300) * symmetric).float()


def weight_faults() -> Iterator[Fault]:
    """Every one is some lines of what a loader or a converter gets wrong."""

    def fault(name: str, block: str, path: str, change: Any, published: bool = False) -> Fault:
        return Fault(name, block, path, change=change, published=published)

    attn, cross = "encoder.attention", "decoder.cross_attention.prefill"
    e, d = f"{ENCODER}.attn", f"{DECODER}.attn"
    yield fault("query bias dropped", attn, e, at(f"{e}.query.bias", zeros))
    yield fault("value bias dropped", attn, e, at(f"{e}.value.bias", zeros))
    yield fault("out bias dropped", attn, e, at(f"{e}.out.bias", zeros))
    yield fault("key and value swapped", attn, e, swapped(f"{e}.key.weight", f"{e}.value.weight"))
    yield fault("query and key swapped", attn, e, swapped(f"{e}.query.weight", f"{e}.key.weight"))
    yield fault("square weight transposed", attn, e, at(f"{e}.out.weight", lambda x: x.T.contiguous()))
    yield fault("heads of the query permuted", attn, e, at(f"{e}.query.weight", heads_exchanged))
    yield fault("heads of out permuted", attn, e, at(f"{e}.out.weight", lambda x: heads_exchanged(x.T).T.contiguous()))
    yield fault("one element off by 1 % of its row", attn, e, at(f"{e}.value.weight", one_element_off))
    yield fault("one row's sign", attn, e, at(f"{e}.value.weight", one_row(torch.neg)))
    yield fault("rounded to bfloat16", attn, e, at(f"{e}.value.weight", lambda x: x.bfloat16().to(x.dtype)))
    yield fault("rounded to 8 bits", attn, e, at(f"{e}.value.weight", rounded_to_8_bits))
    yield fault(
        "float16 read as bfloat16",
        "encoder.mlp",
        f"{ENCODER}.mlp",
        at(f"{ENCODER}.mlp.2.weight", bits_read_as_bfloat16),
    )
    yield fault("mlp bias dropped", "encoder.mlp", f"{ENCODER}.mlp", at(f"{ENCODER}.mlp.0.bias", zeros))
    yield fault(
        "stale mlp of another layer",
        "decoder.mlp.prefill",
        f"{DECODER}.mlp",
        copied("decoder.blocks.0.mlp", f"{DECODER}.mlp"),
    )
    yield fault("encoder layers swapped", "encoder.block", "encoder.blocks.0", swapped("encoder.blocks.0", ENCODER))
    yield fault("decoder layers swapped", "decoder.block.prefill", DECODER, swapped(DECODER, "decoder.blocks.2"))
    yield fault(
        "another norm's weights",
        "encoder.layer_norm",
        f"{ENCODER}.attn_ln",
        copied(f"{ENCODER}.mlp_ln", f"{ENCODER}.attn_ln"),
    )
    yield fault("norm's bias dropped", "encoder.layer_norm", f"{ENCODER}.attn_ln", at(f"{ENCODER}.attn_ln.bias", zeros))
    yield fault("causal attention's value bias dropped", "decoder.attention.causal", d, at(f"{d}.value.bias", zeros))
    yield fault(
        "cross-attention's weights from self-attention",
        cross,
        f"{DECODER}.cross_attn",
        copied(d, f"{DECODER}.cross_attn"),
    )
    yield fault("cross-attention silent", cross, f"{DECODER}.cross_attn", at(f"{DECODER}.cross_attn.out.weight", zeros))
    yield fault(
        "cross-attention's value bias dropped",
        "decoder.cross_attention.keys_values",
        f"{DECODER}.cross_attn",
        at(f"{DECODER}.cross_attn.value.bias", zeros),
    )
    yield fault(
        "audio positions shifted by one",
        "encoder.stem",
        "encoder.stem",
        at("encoder.positional_embedding", lambda x: x.roll(1, 0)),
    )
    yield fault("conv taps reversed", "encoder.stem", "encoder.conv1", at("encoder.conv1.weight", lambda x: x.flip(2)))
    yield fault(
        "conv channels transposed",
        "encoder.stem",
        "encoder.conv2",
        at("encoder.conv2.weight", lambda x: x.transpose(0, 1).contiguous()),
        True,
    )
    yield fault("conv bias dropped", "encoder.stem", "encoder.conv2", at("encoder.conv2.bias", zeros))
    yield fault(
        "text positions shifted by one",
        "decoder.embedding",
        "decoder.embedding",
        at("decoder.positional_embedding", lambda x: x.roll(-1, 0)),
    )
    yield fault(
        "vocabulary shifted by one",
        "decoder.embedding",
        "decoder.token_embedding",
        at("decoder.token_embedding.weight", lambda x: x.roll(1, 0)),
    )
    yield fault(
        "one word's vector lost",
        "decoder.logits.prefill",
        "decoder",
        at("decoder.token_embedding.weight", one_row(zeros)),
    )
    yield fault(
        "last norm of the decoder skipped",
        "decoder.logits.prefill",
        "decoder.ln",
        lambda t, dims: {
            "decoder.ln.weight": torch.ones_like(t["decoder.ln.weight"]),
            "decoder.ln.bias": zeros(t["decoder.ln.bias"]),
        },
    )
    yield fault(
        "last norm of the encoder without weights",
        "encoder",
        "encoder.ln_post",
        lambda t, dims: {
            "encoder.ln_post.weight": torch.ones_like(t["encoder.ln_post.weight"]),
            "encoder.ln_post.bias": zeros(t["encoder.ln_post.bias"]),
        },
    )
    yield fault(
        "mel filters not normalised", "log_mel", "log_mel", at("log_mel.filters", lambda x: x / x.amax(1, keepdim=True))
    )
    yield fault(
        "mel filters of another scale",
        "log_mel",
        "log_mel",
        lambda t, dims: {"log_mel.filters": htk_filters(*t["log_mel.filters"].shape)},
    )
    yield fault("symmetric window", "log_mel", "log_mel", at("log_mel.fourier", half_window))


def htk_filters(n_mels: int, n_rows: int) -> Tensor:
    """Triangles of equal width on HTK's mel scale, area one, (n_mels, n_rows); Whisper's are on Slaney's."""
    mel = torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), n_mels + 2, dtype=torch.float64)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    bins = torch.arange(n_rows, dtype=torch.float64) * SAMPLE_RATE / N_FFT
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


# ---- graph faults --------------------------------------------------------------------------------------------------


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


# ---- the trial -----------------------------------------------------------------------------------------------------


def with_weight_fault(suite: Suite, fault: Fault) -> dict[str, Executable]:
    """Every graph of the suite, with the fault in its weights."""
    assert fault.change is not None
    return suite.graphs({**suite.tensors, **fault.change(suite.tensors, suite.dims)}, LAYER)


def faulty(fault: Fault, right: Program) -> Program:
    """The program of the fault's block with the fault in it, which is there only while the program is traced."""

    def function(module: Module, *inputs: TensorValue) -> Sequence[TensorValue]:
        assert fault.patched is not None
        with fault.patched():
            return right.function(module, *inputs)

    return replace(right, name=fault.name, function=function)


def compile_graph_faults(suite: Suite, faults: Sequence[Fault]) -> dict[str, Executable]:
    """The faulty blocks of graph faults, by the fault's name, compiled together."""
    programs = [faulty(fault, BLOCKS[fault.block].program(suite.dims, suite.policy)) for fault in faults]
    artifact = Artifact(f"{suite.model.size}, graph faults", programs, suite.device)
    return artifact.init(suite.tensors, audio_layer=LAYER, text_layer=LAYER)


def isolated(suite: Suite, fault: Fault, executable: Executable) -> Iterator[Judgement]:
    """The faulty block alone, on one kind of inputs after the other."""
    block: Block = BLOCKS[fault.block]
    layer = min(LAYER, block.n_layer(suite.dims) - 1)
    for comparison in suite.comparisons(block, KINDS):
        if comparison.layer == layer:
            yield suite.judge(comparison, executable)


def until_caught(judgements: Iterable[Judgement]) -> list[Judgement]:
    """Those up to the first that shows the fault."""
    seen = []
    for judgement in judgements:
        seen.append(judgement)
        if not judgement.passed:
            break
    return seen


def verdict(
    fault: Fault,
    dtype: torch.dtype,
    judgements: Sequence[Judgement],
    in_float32: Sequence[Judgement],
    divergence: str | None,
) -> FaultVerdict:
    """in_float32: for a fault that was not caught the same judgements in float32, where the error is the fault's effect
    and hardly any rounding."""
    failed = {f"isolated: {measure.name}" for j in judgements for _, measure in j.measures if not measure.within}
    failed |= {"isolated: not comparable" for judgement in judgements if judgement.defects}
    checks = sorted(failed) + (["chain"] if divergence else [])
    used = max((j.worst.used if j.pairs and not j.defects else math.inf for j in judgements), default=0.0)
    rounding = {j.comparison.inputs: j.relative_l2.peer for j in judgements if j.pairs}
    effect = {j.comparison.inputs: j.relative_l2.subject if j.pairs else math.inf for j in in_float32}
    return FaultVerdict(fault, dtype, tuple(checks), divergence, used, rounding, effect)
