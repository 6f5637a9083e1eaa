"""What a request may hold: the fields of OpenAI's interface, and for those that are not supported an error that names
them."""

import reprlib
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import FormData
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

from .errors import APIError

UNSUPPORTED = (
    "chunking_strategy",
    "include",
    "keywords",
    "known_speaker_names",
    "known_speaker_references",
    "languages",
)
"""Fields that OpenAI has for other models than Whisper."""
SEVERAL = "timestamp_granularities"


class Translation(BaseModel):
    """The fields of `/v1/audio/translations`, but for the file."""

    model_config = ConfigDict(extra="forbid")
    task: ClassVar[str] = "translate"

    model: str
    prompt: str = ""
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float = Field(default=0, ge=0, le=1, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options of `Whisper.transcribe`."""
        options: dict[str, Any] = {"task": self.task}
        if self.prompt:
            options["initial_prompt"] = self.prompt
        if self.temperature:  # 0 is what OpenAI's code begins with, and makes warmer where a window fails
            options["temperature"] = self.temperature
        return options


class Transcription(Translation):
    """The fields of `/v1/audio/transcriptions`, but for the file."""

    task: ClassVar[str] = "transcribe"

    language: str | None = None
    timestamp_granularities: list[Literal["word", "segment"]] = []
    stream: bool = False

    @field_validator("language")
    @classmethod
    def code(cls, language: str | None) -> str | None:
        """Returns the code of a language that is given by its code or its name; an empty text is none."""
        return language_code(language)

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options of `Whisper.transcribe`."""
        options = super().options
        if self.language:
            options["language"] = self.language
        if "word" in self.timestamp_granularities:
            options["word_timestamps"] = True
        return options


def language_code(language: Any) -> Any:
    """Returns the code of a language that is given by its code or its name, None for an empty text, and what is no text
    as it is. Raises ValueError for an unknown one."""
    if not isinstance(language, str):
        return language
    found = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if found and found not in LANGUAGES:
        raise ValueError("expected a code of ISO 639-1, as in en")
    return found or None


def said_of(first: Any) -> str:
    """Says what pydantic found to be wrong with a value."""
    return f"is {reprlib.repr(first['input'])}: {first['msg'].removeprefix('Value error, ')}"


def checked(form: FormData, fields: type[Translation]) -> Translation:
    """Returns the fields of a form; raises APIError for the first one that cannot be used."""
    given: dict[str, Any] = {}
    for key, value in form.multi_items():
        name = key.partition("[")[0]  # of a list as of an object: include[], include[0], chunking_strategy[type]
        if name == "file":
            continue
        if name in UNSUPPORTED:
            raise APIError(400, f"'{name}' is not supported by this server", name, "unsupported_parameter")
        if name == SEVERAL:
            given.setdefault(name, []).append(value)
        elif name in given:
            raise APIError(400, f"'{name}' is given more than once", name)
        else:
            given[name] = value
    try:
        found = fields.model_validate(given)
    except ValidationError as error:
        raise refusal(error) from error
    if isinstance(found, Transcription):
        check_combination(found)
    return found


def refusal(error: ValidationError) -> APIError:
    """Returns the error that names the first wrong field."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return APIError(400, f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
    if first["type"] == "missing":
        return APIError(400, f"you must provide a {name} parameter", name, "missing_required_parameter")
    return APIError(400, f"'{name}' {said_of(first)}", name, "invalid_value")


def check_combination(fields: Transcription) -> None:
    """Raises APIError for fields that OpenAI's interface does not have together."""
    if fields.timestamp_granularities and fields.response_format != "verbose_json":
        message = f"'{SEVERAL}' needs the response_format verbose_json, not {fields.response_format}"
        raise APIError(400, message, SEVERAL)
    if fields.stream and fields.response_format not in ("json", "text"):
        message = f"'stream' gives text alone: expected the response_format json, not {fields.response_format}"
        raise APIError(400, message, "response_format")
