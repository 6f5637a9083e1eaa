"""BLOCKS: the one table of what is compiled on its own.

The network that transcribes is made of the entries of units "network" and "decoding"; the others take that network
apart. On a CPU one kernel computes the whole of `decoder.block.step`; what it consists of has kernels of its own here,
made of the same functions.

From its entry a block gets its isolated parity test in every size and precision, its benchmark and its row in every
report. Adding a block is adding an entry, as long as `reference/blocks.py` knows its PyTorch class.

Names of inputs mean the same everywhere:

    audio               (samples,) float32, at 16 kHz
    mel                 (batch, n_mels, 2 * n_audio_ctx)
    x                   (batch, token or n_audio_ctx, state), the submodule's own input
    tokens, offset      (batch, token) int64; position of the first one, int64 scalar on the CPU
    positions           (position,) int64, those of the tokens whose logits are wanted
    audio_features      (audio, n_audio_ctx, state)
    k_cache, v_cache    (batch, head, position, channel): of the text so far, in the first `offset` positions
    k_cross, v_cross    (audio, head, n_audio_ctx, channel): cross-attention over a window of audio

In a whole decoder the last four carry a layer number: k_cross.0, v_cross.0, k_cross.1, ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue
from max.nn.layer import Module
from whisper.model import ModelDimensions

from ..engine.program import Program
from ..engine.session import Policy
from . import model
from .keys_values import Cache, KeyValue
from .log_mel import LogMelSpectrogram
from .model import ResidualAttentionBlock, TextDecoder

Inputs = dict[str, TensorType]
InputsOf = Callable[[ModelDimensions, Policy], Inputs]


@dataclass(frozen=True)
class Block:
    """A part of the network that compiles on its own.

    name: dotted, as the tests select it.
    path: its place in the PyTorch model, "{audio_layer}" or "{text_layer}" standing for the layer's number.
    module: builds the MAX module that holds its weights.
    function: from that module, and one value per input by its name, to the outputs.
    inputs: the graph's inputs, in order.
    unit: what compiles into one artifact: "network", what audio and the start of a text go through (for a GPU without
        the spectrogram, which runs on the CPU); "decoding", what decodes the rest of it, with the graphs that
        select tokens; "alignment", for word timestamps; "parts", the rest.
    """

    name: str
    path: str
    module: Callable[[ModelDimensions, Policy], Module]
    function: Callable[..., Sequence[TensorValue]]
    inputs: Callable[[ModelDimensions, Policy], Inputs]
    unit: str = "parts"

    def program(self, dims: ModelDimensions, policy: Policy) -> Program:
        """Returns this block as a graph to compile, for a model of `dims` under `policy`."""
        module, inputs = self.module(dims, policy), self.inputs(dims, policy)
        return Program(self.name, self.path, module, self.function, inputs)

    def n_layer(self, dims: ModelDimensions) -> int:
        """Returns how many layers of the model this block stands for."""
        layers = {"{audio_layer}": dims.n_audio_layer, "{text_layer}": dims.n_text_layer}
        return next((number for placeholder, number in layers.items() if placeholder in self.path), 1)


# ---- inputs --------------------------------------------------------------------------------------------------------


def audio(dims: ModelDimensions, policy: Policy) -> Inputs:
    return {"audio": TensorType(DType.float32, ["samples"], policy.device)}


def mel(dims: ModelDimensions, policy: Policy) -> Inputs:
    return {"mel": TensorType(policy.compute, ["batch", dims.n_mels, 2 * dims.n_audio_ctx], policy.device)}


def audio_x(dims: ModelDimensions, policy: Policy) -> Inputs:
    return {"x": TensorType(policy.compute, ["batch", dims.n_audio_ctx, dims.n_audio_state], policy.device)}


def audio_features(dims: ModelDimensions, policy: Policy) -> Inputs:
    shape = ["audio", dims.n_audio_ctx, dims.n_audio_state]
    return {"audio_features": TensorType(policy.compute, shape, policy.device)}


def tokens(n_token: int | str) -> InputsOf:
    return lambda dims, policy: {"tokens": TensorType(DType.int64, ["batch", n_token], policy.device)}


def positions(dims: ModelDimensions, policy: Policy) -> Inputs:
    return {"positions": TensorType(DType.int64, ["positions"], policy.device)}


def offset(dims: ModelDimensions, policy: Policy) -> Inputs:
    return {"offset": TensorType(DType.int64, [], DeviceRef.CPU())}


def text_x(n_token: int | str) -> InputsOf:
    return lambda dims, policy: {"x": TensorType(policy.compute, ["batch", n_token, dims.n_text_state], policy.device)}


def key_value(kind: str, batch: str, n_token: int | str, dims: ModelDimensions, policy: Policy) -> Inputs:
    shape = [batch, dims.n_text_head, n_token, dims.n_text_state // dims.n_text_head]
    return {f"{name}_{kind}": TensorType(policy.compute, shape, policy.device) for name in "kv"}


def self_cache(dims: ModelDimensions, policy: Policy) -> Inputs:
    return key_value("cache", "batch", "position", dims, policy)


def cross(dims: ModelDimensions, policy: Policy) -> Inputs:
    return key_value("cross", "audio", dims.n_audio_ctx, dims, policy)


def every_layer(inputs: InputsOf) -> InputsOf:
    """Returns the inputs of each decoder layer in turn, their names followed by the layer's number."""

    def of(dims: ModelDimensions, policy: Policy) -> Inputs:
        layers = range(dims.n_text_layer)
        return {f"{name}.{i}": type_ for i in layers for name, type_ in inputs(dims, policy).items()}

    return of


def joined(*parts: InputsOf) -> InputsOf:
    """Returns the inputs of several functions, in order."""
    return lambda dims, policy: {name: type_ for part in parts for name, type_ in part(dims, policy).items()}


prompt_tokens, step_tokens = tokens("tokens"), tokens(1)
prompt_x, step_x = text_x("tokens"), text_x(1)
every_cache, every_cross = every_layer(self_cache), every_layer(cross)

# ---- modules and functions -----------------------------------------------------------------------------------------


def audio_attention(dims: ModelDimensions, policy: Policy) -> Module:
    return model.MultiHeadAttention(dims.n_audio_state, dims.n_audio_head, policy)


def text_attention(dims: ModelDimensions, policy: Policy) -> Module:
    return model.MultiHeadAttention(dims.n_text_state, dims.n_text_head, policy)


def audio_layer_norm(dims: ModelDimensions, policy: Policy) -> Module:
    return model.LayerNorm(dims.n_audio_state, policy)


def audio_block(dims: ModelDimensions, policy: Policy) -> Module:
    return ResidualAttentionBlock(dims.n_audio_state, dims.n_audio_head, policy)


def text_block(dims: ModelDimensions, policy: Policy) -> Module:
    return ResidualAttentionBlock(dims.n_text_state, dims.n_text_head, policy, cross_attention=True)


def audio_mlp(dims: ModelDimensions, policy: Policy) -> Module:
    return model.mlp(dims.n_audio_state, policy)


def text_mlp(dims: ModelDimensions, policy: Policy) -> Module:
    return model.mlp(dims.n_text_state, policy)


def log_mel(dims: ModelDimensions, policy: Policy) -> Module:
    return LogMelSpectrogram(dims.n_mels, policy.device)


def audio_stem(dims: ModelDimensions, policy: Policy) -> Module:
    return model.AudioEncoder(replace(dims, n_audio_layer=0), policy)


def text_ends(dims: ModelDimensions, policy: Policy) -> Module:
    return TextDecoder(replace(dims, n_text_layer=0), policy)


def one(module: Callable[..., TensorValue], **given: TensorValue) -> tuple[TensorValue]:
    (x,) = given.values()
    return (module(x),)


def keys_values(attn: model.MultiHeadAttention, audio_features: TensorValue) -> KeyValue:
    return attn.keys_values(audio_features)


def encoder_attention(attn: model.MultiHeadAttention, x: TensorValue) -> tuple[TensorValue]:
    return (attn(x, attn.keys_values(x)),)


def causal_attention(attn: model.MultiHeadAttention, x: TensorValue) -> tuple[TensorValue, ...]:
    kv = attn.keys_values(x)
    return attn(x, kv, model.causal_mask(x.shape[1], attn.policy)), *kv


def cached_attention(
    attn: model.MultiHeadAttention, x: TensorValue, offset: TensorValue, k_cache: TensorValue, v_cache: TensorValue
) -> tuple[TensorValue, ...]:
    kv = attn.keys_values(x)
    return attn(x, kv, cache=Cache(k_cache, v_cache, offset)), *kv


def cross_attention(
    attn: model.MultiHeadAttention, x: TensorValue, k_cross: TensorValue, v_cross: TensorValue
) -> tuple[TensorValue]:
    return (attn(x, KeyValue(k_cross, v_cross)),)


# ---- the table -----------------------------------------------------------------------------------------------------

LAYER, TEXT_LAYER = "encoder.blocks.{audio_layer}", "decoder.blocks.{text_layer}"
SELF, CROSS, MLP = f"{TEXT_LAYER}.attn", f"{TEXT_LAYER}.cross_attn", f"{TEXT_LAYER}.mlp"


def whole_decoder(name: str, function: Callable[..., Sequence[TensorValue]], inputs: InputsOf, unit: str) -> Block:
    return Block(name, "decoder", TextDecoder, function, inputs, unit)


BLOCKS: dict[str, Block] = {
    block.name: block
    for block in (
        Block("log_mel", "log_mel", log_mel, one, audio, unit="network"),
        Block("encoder.stem", "encoder", audio_stem, lambda m, mel: (m.stem(mel),), mel),
        Block("encoder.layer_norm", f"{LAYER}.attn_ln", audio_layer_norm, one, audio_x),
        Block("encoder.attention", f"{LAYER}.attn", audio_attention, encoder_attention, audio_x),
        Block("encoder.mlp", f"{LAYER}.mlp", audio_mlp, one, audio_x),
        Block("encoder.block", LAYER, audio_block, ResidualAttentionBlock.encode, audio_x),
        Block("encoder", "encoder", model.AudioEncoder, one, mel, unit="network"),
        Block("decoder.embedding", "decoder", text_ends, lambda m, **x: (m.embed(**x),), joined(prompt_tokens, offset)),
        Block("decoder.attention.causal", SELF, text_attention, causal_attention, prompt_x),
        Block("decoder.attention.cached", SELF, text_attention, cached_attention, joined(step_x, offset, self_cache)),
        Block("decoder.cross_attention.keys_values", CROSS, text_attention, keys_values, audio_features),
        Block("decoder.cross_attention.prefill", CROSS, text_attention, cross_attention, joined(prompt_x, cross)),
        Block("decoder.cross_attention.step", CROSS, text_attention, cross_attention, joined(step_x, cross)),
        Block("decoder.mlp.prefill", MLP, text_mlp, one, prompt_x),
        Block("decoder.mlp.step", MLP, text_mlp, one, step_x),
        Block("decoder.block.prefill", TEXT_LAYER, text_block, ResidualAttentionBlock.prefill, joined(prompt_x, cross)),
        Block(
            "decoder.block.step",
            TEXT_LAYER,
            text_block,
            ResidualAttentionBlock.step,
            joined(step_x, offset, self_cache, cross),
        ),
        Block("decoder.logits.prefill", "decoder", text_ends, lambda m, x: (m.logits(x),), prompt_x),
        Block("decoder.logits.step", "decoder", text_ends, lambda m, x: (m.logits(x),), step_x),
        whole_decoder("decoder.keys_values", TextDecoder.keys_values, audio_features, "network"),
        whole_decoder("decoder.prefill", TextDecoder.__call__, joined(prompt_tokens, every_cross), "network"),
        whole_decoder("decoder.start", TextDecoder.start, joined(prompt_tokens, positions, every_cross), "network"),
        whole_decoder(
            "decoder.step", TextDecoder.step, joined(step_tokens, offset, every_cache, every_cross), "decoding"
        ),
        whole_decoder("decoder.alignment", TextDecoder.align, joined(prompt_tokens, every_cross), "alignment"),
    )
}
