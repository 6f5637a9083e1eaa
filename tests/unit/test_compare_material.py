"""What all engines are given: OpenAI's tokens by the size of the vocabulary, texts from files."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from whisper.decoding import DecodingOptions, DecodingTask

from maxwhisper.compare.material import SIZES, read_text
from maxwhisper.compare.process import EngineError, RequestProcess
from maxwhisper.compare.tokens import suppressed, task_for, tokenizer_of
from maxwhisper.compare.worker import answer


@pytest.mark.parametrize(
    ("n_vocab", "n_prompt", "eot", "no_speech", "first_time"),
    [(51864, 2, 50256, 50361, 50363), (51865, 4, 50257, 50362, 50364), (51866, 4, 50257, 50363, 50365)],
)
def test_tokens_are_openais_for_every_vocabulary(
    n_vocab: int, n_prompt: int, eot: int, no_speech: int, first_time: int
) -> None:
    """In each the last of 1501 timestamps is the last token."""
    tokenizer = tokenizer_of(replace(SIZES["tiny"], n_vocab=n_vocab))
    assert (tokenizer.eot, tokenizer.no_speech, tokenizer.timestamp_begin) == (eot, no_speech, first_time)
    assert first_time + 1501 == n_vocab
    task = task_for(replace(SIZES["tiny"], n_vocab=n_vocab), None, 1)
    assert len(task.prompt) == n_prompt and task.prompt[-1] == first_time - 1 and task.eot == eot
    assert task.suppress_first == [*tokenizer.encode(" "), eot]


def test_what_is_suppressed_is_openais_default() -> None:
    tokenizer = tokenizer_of(SIZES["tiny"])
    task = SimpleNamespace(options=DecodingOptions(), tokenizer=tokenizer)
    assert suppressed(tokenizer) == list(DecodingTask._get_suppress_tokens(task))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_first_word(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Äpfel\n", encoding=encoding)
    assert read_text(tmp_path / "a.txt") == "Äpfel\n"


def test_an_engine_that_says_nothing_of_its_failure_has_failed() -> None:
    def fail(message: str) -> Any:
        raise ValueError(message)

    said = [answer(fail, {"message": message}) for message in ("", "\n", "one\ntwo")]
    assert said == [{"error": "ValueError: "}, {"error": "ValueError: "}, {"error": "ValueError: one"}]
    assert answer(lambda: {"seconds": 2.0}, {}) == {"seconds": 2.0}, "its own"


def test_an_error_is_no_answer() -> None:
    worker: Any = object.__new__(RequestProcess)
    worker.process = SimpleNamespace(stdout=io.StringIO('{"seconds": 1}\n{"error": "no luck"}\n'))
    assert worker.answer() == {"seconds": 1}
    with pytest.raises(EngineError, match="^no luck$"):
        worker.answer()
