"""An OpenAI checkpoint as a Hugging Face folder, with the tokenizer of openai-whisper."""

import json
from pathlib import Path
from typing import Any

import whisper
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.convert_slow_tokenizer import TikTokenConverter
from whisper.tokenizer import Tokenizer

from ..checkpoint import HUGGING_FACE_DIMS, Checkpoint, hugging_face_name
from .tokens import suppressed, suppressed_first, tokenizer_of


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors, the tokenizer and preprocessor_config.json."""
    tokenizer = tokenizer_of(checkpoint.dims)
    write_json(folder / "config.json", config(checkpoint, tokenizer))
    write_json(folder / "generation_config.json", generation_config(checkpoint, tokenizer))
    # Cloned, because safetensors refuses tensors that share memory.
    tensors = {f"model.{hugging_face_name(name)}": tensor.clone() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(tokenizer, checkpoint.dims.n_vocab),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    ).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=checkpoint.dims.n_mels).save_pretrained(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def ends(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the tokens that every configuration names."""
    ids = {f"{name}_token_id": tokenizer.eot for name in ("bos", "eos", "pad")}
    return ids | {
        "decoder_start_token_id": tokenizer.sot,
        "begin_suppress_tokens": suppressed_first(tokenizer),
        "suppress_tokens": suppressed(tokenizer),
    }


def config(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, Any]:
    dims = checkpoint.dims
    sizes = {theirs: getattr(dims, ours) for ours, theirs in HUGGING_FACE_DIMS.items()}
    return sizes | {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "activation_function": "gelu",
        "encoder_ffn_dim": 4 * dims.n_audio_state,
        "decoder_ffn_dim": 4 * dims.n_text_state,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "max_length": dims.n_text_ctx,
        **{name: value for name, value in ends(tokenizer).items() if "suppress" not in name},
    }


def generation_config(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, Any]:
    dims, heads = checkpoint.dims, checkpoint.alignment_heads
    upper = range(dims.n_text_layer // 2, dims.n_text_layer)
    content = ends(tokenizer) | {
        "alignment_heads": heads or [(layer, head) for layer in upper for head in range(dims.n_text_head)],
        "is_multilingual": tokenizer.language is not None,
        "max_initial_timestamp_index": 50,
        "max_length": dims.n_text_ctx,
        "no_timestamps_token_id": tokenizer.no_timestamps,
        "prev_sot_token_id": tokenizer.sot_prev,
        "return_timestamps": False,
    }
    if tokenizer.language is not None:
        codes = zip(tokenizer.all_language_codes, tokenizer.all_language_tokens, strict=True)
        content["lang_to_id"] = {f"<|{code}|>": token for code, token in codes}
        content["task_to_id"] = {"transcribe": tokenizer.transcribe, "translate": tokenizer.translate}
    return content


def fast_tokenizer(tokenizer: Tokenizer, n_vocab: int) -> Any:
    """Returns openai-whisper's encoding as an object of the tokenizers library."""
    file = Path(whisper.__file__).parent / "assets" / tokenizer.encoding.name
    fast = TikTokenConverter(str(file)).tokenizer()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = [tokenizer.encoding.decode([token]) for token in range(tokenizer.eot, n_vocab)]
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return fast
