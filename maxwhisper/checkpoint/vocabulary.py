"""Whether a model's vocabulary is one of OpenAI's, whose sizes tell OpenAI's tokenizer which ids mean what.

openai-whisper derives its tokenizer from n_vocab alone: English or multilingual, and how many languages. Each of these
shifts the ids of languages, tasks and timestamps. A row more, and a model is given tokens that mean something else to
it, without an error. So other sizes are refused, and where a Hugging Face folder says what its ids mean, that counts.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from whisper.tokenizer import get_encoding

from maxwhisper.checkpoint.stored import as_lines, read_json, some
from maxwhisper.errors import CheckpointError

ENCODINGS = {51864: ("gpt2", 99), 51865: ("multilingual", 99), 51866: ("multilingual", 100)}
"""The name and the number of languages of OpenAI's encodings, by the size of the vocabulary."""

_KNOWN = "51864 (English), 51865 or 51866 (99 or 100 languages)"
_FEWEST = 50257
"""Below this a vocabulary has not even the tokens of text: nothing is transcribed with it, so no id can be mistaken."""
_BEHIND = {"<|translate|>": 1507, "<|transcribe|>": 1506, "<|notimestamps|>": 1502}
"""How far these are before the end of the vocabulary: behind them are 1501 timestamps, in every encoding."""
_ALIASES = {"<|nocaptions|>": "<|nospeech|>", "<|iw|>": "<|he|>"}
"""What older tokenizers of Hugging Face call a token, and OpenAI's name."""

_CUT = (
    "content['dims']['n_vocab'] = N",
    "state = content['model_state_dict']",
    "state['decoder.token_embedding.weight'] = state['decoder.token_embedding.weight'][:N].clone()",
    "torch.save(content, 'whisper.pt')",
)


class Token(NamedTuple):
    """A token as a file of a tokenizer states it."""

    id: int
    name: str
    file: str


def check_vocabulary(path: Path, n_vocab: int) -> None:
    """Raises CheckpointError if OpenAI's tokenizer would take ids of a vocabulary of this size for others."""
    if n_vocab >= _FEWEST and n_vocab not in ENCODINGS:
        raise CheckpointError(
            f"{path}: n_vocab is {n_vocab}, expected {_KNOWN}, since OpenAI's tokenizer would take its ids of tasks and"
            " timestamps for others; with N the size before tokens were added,"
            f" {as_lines(f'import torch; content = torch.load({str(path)!r})', *_CUT)}"
        )


def vocabulary_size(folder: Path, n_vocab: int, generating: dict[str, Any]) -> int:
    """Returns how many of the `n_vocab` rows of the token embedding in a Hugging Face folder are OpenAI's vocabulary.

    `generating`: the content of generation_config.json. More rows may follow if the tokenizer in the folder shows that
    none of them is a token, as where the embedding is padded to a multiple of 64.

    Raises CheckpointError if tokens were added, if ids do not mean what they mean to OpenAI's tokenizer, or if nothing
    tells what the rows behind OpenAI's are.
    """
    if n_vocab < _FEWEST:
        return n_vocab
    tokens = _tokens(folder)
    stated = {token.id + _BEHIND[token.name] for token in tokens if token.name in _BEHIND}
    if stated - ENCODINGS.keys() or len(stated) > 1:
        stating = {f"{token.name} = {token.id} in {token.file}" for token in tokens if token.name in _BEHIND}
        raise CheckpointError(
            f"{folder}: no tokenizer of OpenAI's has its ids of tasks and timestamps: {some(stating)}"
        )
    size = stated.pop() if stated else _size_without_tokenizer(folder, n_vocab, generating)
    if size > n_vocab:
        raise CheckpointError(f"{folder}: n_vocab is {n_vocab}, but its tokenizer is that of {_of(size)}")
    _check_names(folder, tokens, size)
    if added := {token.name for token in tokens if size <= token.id < n_vocab}:
        raise CheckpointError(
            f"{folder}: n_vocab is {n_vocab}, expected {size}: {some(added)} were added to the {_of(size)} that"
            f" OpenAI's tokenizer knows; to do without them, {_resize(folder, size)}"
        )
    return size


def _size_without_tokenizer(folder: Path, n_vocab: int, generating: dict[str, Any]) -> int:
    """Returns `n_vocab`, if it is a size of OpenAI's that generation_config.json does not contradict."""
    no_timestamps = generating.get("no_timestamps_token_id")
    stated = no_timestamps + _BEHIND["<|notimestamps|>"] if isinstance(no_timestamps, int) else n_vocab
    is_more = stated in ENCODINGS and stated < n_vocab
    if n_vocab in ENCODINGS and not is_more:
        return n_vocab
    if is_more:
        raise CheckpointError(
            f"{folder}: n_vocab is {n_vocab}, but generation_config.json is that of {_of(stated)}, and no"
            " tokenizer.json beside it says what the other rows are: add it, or to do without them,"
            f" {_resize(folder, stated)}"
        )
    raise CheckpointError(
        f"{folder}: n_vocab is {n_vocab}, expected {_KNOWN}, and no tokenizer.json beside it says what the other rows"
        f" are: add it, or with N the size before tokens were added, {_resize(folder, 'N')}"
    )


def _check_names(folder: Path, tokens: list[Token], size: int) -> None:
    name, languages = ENCODINGS[size]
    encoding = get_encoding(name=name, num_languages=languages)
    letters = _letters()
    for token in tokens:
        # One token of the multilingual encoding is empty, and has no spelling.
        if token.id < size and (openais := encoding.decode_single_token_bytes(token.id)):
            is_text = token.id < encoding.eot_token
            spelled = "".join(letters[byte] for byte in openais) if is_text else openais.decode()
            if _ALIASES.get(token.name, token.name) != spelled:
                raise CheckpointError(
                    f"{folder / token.file}: token {token.id} is {token.name!r}, but {spelled!r} to OpenAI's tokenizer"
                    f" of {_of(size)}, which would misread this model"
                )


def _letters() -> list[str]:
    """Returns the letter that stands for each byte where Hugging Face spells tokens of text."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


def _of(size: int) -> str:
    encoding, languages = ENCODINGS[size]
    return f"{size} tokens (English)" if encoding == "gpt2" else f"{size} tokens ({languages} languages)"


def _resize(folder: Path, size: int | str) -> str:
    return as_lines(
        "import transformers",
        f"model = transformers.WhisperForConditionalGeneration.from_pretrained({str(folder)!r})",
        f"model.resize_token_embeddings({size}); model.save_pretrained('whisper')",
    )


def _tokens(folder: Path) -> list[Token]:
    """Returns every token that a file of the folder's tokenizer states."""
    found = []
    for file, pairs in _READERS.items():
        path = folder / file
        if os.path.isfile(path):
            try:
                tokens = [Token(int(token), name, file) for name, token in pairs(read_json(path))]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: expected a name and an id of every token") from error
            if any(token.id < 0 for token in tokens):
                raise CheckpointError(f"{path}: expected ids of tokens from 0")
            found += tokens
    return found


_READERS: dict[str, Callable[[dict[str, Any]], Iterable[tuple[str, Any]]]] = {
    "tokenizer.json": lambda content: [
        *content["model"]["vocab"].items(),
        *((token["content"], token["id"]) for token in content["added_tokens"]),
    ],
    "tokenizer_config.json": lambda content: [
        (token["content"], id_) for id_, token in content.get("added_tokens_decoder", {}).items()
    ],
    "vocab.json": dict.items,
    "added_tokens.json": dict.items,
}
"""What gives the name and the id of every token in a file of a tokenizer."""
