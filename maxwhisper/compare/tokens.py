"""What openai-whisper's decoding does with tokens, as plain numbers for engines that do not import it."""

from whisper.model import ModelDimensions
from whisper.tokenizer import Tokenizer, get_tokenizer

from ..batched import BATCH_SIZE
from .engines import Task


def tokenizer_of(dims: ModelDimensions, language: str = "en") -> Tokenizer:
    """Returns openai-whisper's tokenizer for a model: the sizes of the vocabulary tell languages and special tokens."""
    multilingual = dims.n_vocab >= 51865
    n_languages = dims.n_vocab - 51765 - int(multilingual)
    return get_tokenizer(multilingual, num_languages=n_languages, language=language, task="transcribe")


def suppressed(tokenizer: Tokenizer) -> list[int]:
    """Returns what openai-whisper's `suppress_tokens="-1"` stands for."""
    special = (tokenizer.transcribe, tokenizer.translate, tokenizer.sot, tokenizer.sot_prev, tokenizer.sot_lm)
    return sorted({*tokenizer.non_speech_tokens, *special, tokenizer.no_speech})


def suppressed_first(tokenizer: Tokenizer) -> list[int]:
    """Returns what its `suppress_blank` keeps from being the first token."""
    return [*tokenizer.encode(" "), tokenizer.eot]


def task_for(dims: ModelDimensions, beam_size: int | None, threads: int, device: str = "cpu") -> Task:
    """Returns the options that all engines get."""
    tokenizer = tokenizer_of(dims)
    return Task(
        beam_size=beam_size,
        batch_size=BATCH_SIZE,
        threads=threads,
        prompt=list(tokenizer.sot_sequence_including_notimestamps),
        suppress=suppressed(tokenizer),
        suppress_first=suppressed_first(tokenizer),
        eot=tokenizer.eot,
        device=device,
    )
