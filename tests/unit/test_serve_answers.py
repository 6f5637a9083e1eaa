"""What requests ask for and answers hold: without a model and without a server."""

import asyncio
import base64
import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import FormData

from maxwhisper.errors import AudioError, OptionError
from maxwhisper.serving.answers import answer, events
from maxwhisper.serving.errors import APIError
from maxwhisper.serving.fields import Transcription, Translation, checked
from maxwhisper.serving.jobs import Jobs, Limits, Transcript, api_error
from maxwhisper.serving.realtime import RATE, Conversation
from maxwhisper.serving.settings import Settings, settings_of

from .serving import LIMITS

SEGMENT = {
    "id": 0,
    "seek": 0,
    "start": 0.0,
    "end": 1.5,
    "text": " Hello there.",
    "tokens": [1, 2],
    "temperature": 0.2,
    "avg_logprob": -0.5,
    "compression_ratio": 1.0,
    "no_speech_prob": 0.1,
}
WORDS = [{"word": " Hello", "start": 0.0, "end": 0.5, "probability": 0.9}]
RESULT = {"text": " Hello there.", "language": "de", "segments": [{**SEGMENT, "words": WORDS}]}
TRANSCRIPT = Transcript(RESULT, 61.2)


def body(fields: Translation) -> Any:
    return json.loads(answer(TRANSCRIPT, fields).body)


def test_seconds_that_are_begun_are_used() -> None:
    used = {"usage": {"type": "duration", "seconds": 62}}
    assert body(Transcription(model="m")) == {"text": "Hello there."} | used
    assert body(Translation(model="m")) == {"text": "Hello there."}
    assert answer(TRANSCRIPT, Transcription(model="m", response_format="text")).body == b"Hello there.\n"


@pytest.mark.parametrize(
    ("wanted", "held"),
    [
        ([], {"segments"}),
        (["segment"], {"segments"}),
        (["word"], {"words"}),
        (["word", "segment"], {"words", "segments"}),
    ],
)
def test_a_verbose_answer_has_what_was_asked_for(wanted: Any, held: set[str]) -> None:
    found = body(Transcription(model="m", response_format="verbose_json", timestamp_granularities=wanted))
    said = {"task": "transcribe", "language": "german", "duration": 61.2, "text": "Hello there."}
    parts = {"words": [{"word": "Hello", "start": 0.0, "end": 0.5}], "segments": [SEGMENT]}
    used = {"usage": {"type": "duration", "seconds": 62}}
    assert found == said | {name: parts[name] for name in held} | used


def test_a_translation_is_english() -> None:
    found = body(Translation(model="m", response_format="verbose_json"))
    assert (found["task"], found["language"], found["segments"]) == ("translate", "english", [SEGMENT])


def test_deltas_together_are_the_text() -> None:
    windows: list[Any] = [[{"text": " Hello "}], [], [{"text": " there."}, {"text": " So"}], TRANSCRIPT]
    result = Transcript({"text": " Hello  there. So"}, 61.2)

    async def told_of(found: list[Any]) -> list[dict[str, Any]]:
        rest = iter(found[1:])

        async def next_found() -> Any:
            return next(rest)

        job: Any = SimpleNamespace(next=next_found)
        return [json.loads(each.removeprefix("data: ")) async for each in events(job, found[0])]

    found = asyncio.run(told_of([*windows[:3], result]))
    assert [each.get("delta") for each in found] == ["Hello", "  there. So", None]
    assert found[-1] == {"type": "transcript.text.done", "text": "Hello  there. So"}
    at_once = asyncio.run(told_of([result]))
    assert [each.get("delta") for each in at_once] == ["Hello  there. So", None]


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([], {"task": "transcribe"}),
        ([("language", "")], {"task": "transcribe"}),
        ([("language", "German")], {"task": "transcribe", "language": "de"}),
        ([("temperature", "0")], {"task": "transcribe"}),
        ([("temperature", "0.5")], {"task": "transcribe", "temperature": 0.5}),
        ([("prompt", "a")], {"task": "transcribe", "initial_prompt": "a"}),
        ([("timestamp_granularities[]", "segment")], {"task": "transcribe"}),
        (
            [("timestamp_granularities[]", "word"), ("timestamp_granularities[]", "segment")],
            {"task": "transcribe", "word_timestamps": True},
        ),
    ],
)
def test_a_request_has_the_options_that_it_gives(given: list[tuple[str, str]], options: dict[str, Any]) -> None:
    form = FormData([("model", "m"), ("response_format", "verbose_json"), *given])
    assert checked(form, Transcription).options == options


@pytest.mark.parametrize(
    ("error", "said", "param"),
    [
        (OptionError("initial_prompt holds <|a|>"), "prompt holds <|a|>", "prompt"),
        (OptionError("temperature is 2"), "temperature is 2", "temperature"),
        (AudioError("file: no audio stream"), "file: no audio stream", "file"),
        (AudioError("audio: sample 3 is not finite"), "audio: sample 3 is not finite", "file"),
        (OptionError("beams"), "beams", None),
    ],
)
def test_an_error_names_the_field_that_was_wrong(error: Exception, said: str, param: str | None) -> None:
    found = api_error(error)
    assert (found.status, str(found), found.param) == (400, said, param)


# ---- sessions ------------------------------------------------------------------------------------------------------


def update(**transcription: Any) -> dict[str, Any]:
    return {"type": "transcription", "audio": {"input": {"transcription": transcription}}}


def test_an_update_changes_what_it_names() -> None:
    before = Settings("m", "de", "a")
    assert settings_of(update(), before) == before
    assert settings_of(update(language=None), before) == Settings("m", None, "a"), "which is named"
    assert settings_of(update(language=""), before) == Settings("m", None, "a"), "no language"
    assert settings_of(update(prompt="b", language="English"), before) == Settings("m", "en", "b")
    assert Settings(None, "de", "a").options == {"language": "de", "initial_prompt": "a"}
    assert Settings().options == {"language": None}


class Talk:
    """A conversation of which nothing is transcribed, and what it has sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_audio_minutes: float = 0.1):
        self.sent: list[Any] = []
        monkeypatch.setattr("maxwhisper.serving.realtime.Item.transcribe", lambda item: None)
        self.service: Any = SimpleNamespace(limits=Limits(**LIMITS | {"max_audio_minutes": max_audio_minutes}))

    def say(self, *given: dict[str, Any]) -> list[Any]:
        async def talk() -> None:
            job: Any = SimpleNamespace(caller=SimpleNamespace(stop=lambda: None))
            conversation = Conversation(SimpleNamespace(), self.service, job)  # type: ignore[arg-type]
            conversation.send = lambda event: self.sent.append(dict(event))  # type: ignore[method-assign]
            held = SimpleNamespace(done=lambda: False)
            conversation.thread = SimpleNamespace(submit=lambda work: held)  # type: ignore[assignment]
            for event in given:
                await conversation._answer(json.dumps(event))

        asyncio.run(talk())
        return self.sent


def append(n_sample: int) -> dict[str, Any]:
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(bytes(2 * n_sample)).decode()}


COMMIT, CLEAR = ({"type": f"input_audio_buffer.{what}"} for what in ("commit", "clear"))


def test_items_are_told_with_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Talk(monkeypatch).say(append(9), COMMIT, append(9), COMMIT)
    committed = [event for event in sent if event["type"] == "input_audio_buffer.committed"]
    assert [event["previous_item_id"] for event in committed] == [None, committed[0]["item_id"]]
    kinds = [event["type"].rpartition(".")[2] for event in sent]
    assert kinds == ["committed", "added", "done"] * 2


@pytest.mark.parametrize(
    "given", [[COMMIT], [append(0), COMMIT], [append(9), CLEAR, COMMIT], [append(9), COMMIT, COMMIT]]
)
def test_nothing_cannot_be_committed(given: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Talk(monkeypatch).say(*given)
    assert sent[-1]["type"] == "error" and sent[-1]["error"]["code"] == "input_audio_buffer_commit_empty"


MOST = 6 * RATE
"""Samples of a tenth of a minute."""


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ([append(MOST)], False),
        ([append(MOST), append(1)], True),
        ([append(MOST - RATE), append(RATE)], False),
        ([append(MOST - RATE), COMMIT, append(RATE)], False),
        ([append(MOST - RATE), COMMIT, append(RATE + 1)], True),
        ([append(1), COMMIT, append(MOST - RATE)], False),
        ([append(1), COMMIT, append(MOST - RATE + 1)], True),  # it counts as a second
    ],
)
def test_all_audio_that_is_not_transcribed_counts(
    given: list[dict[str, Any]], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Talk(monkeypatch).say(*given)
    errors = [event for event in sent if event["type"] == "error"]
    assert bool(errors) == refused and all("at most 0.1 minutes" in event["error"]["message"] for event in errors)


def test_there_are_as_many_requests_as_there_may_be_and_none_at_the_end() -> None:
    async def ask() -> None:
        scheduler: Any = SimpleNamespace(
            model=SimpleNamespace(stepping_by=lambda *_: None),
            stepper=SimpleNamespace(max_candidates=None, tokens_first=False, searches=False),
            close=lambda: None,
        )
        jobs = Jobs(scheduler, Limits(**LIMITS | {"max_requests": 2}), lambda seconds: None)
        first, _ = jobs.new(), jobs.new()
        with pytest.raises(APIError, match="2 requests"):
            jobs.new()
        first.stop()
        last = jobs.new()
        jobs.close()
        assert last.caller.stopped.is_set() and not jobs.running

    asyncio.run(ask())
