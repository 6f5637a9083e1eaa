"""What a client may say of a session of `/v1/realtime`, in OpenAI's form."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .body import MAX_FIELD
from .errors import APIError
from .fields import language_code, said_of


class Strict(BaseModel):
    """Refuses what it does not know."""

    model_config = ConfigDict(extra="forbid")


class Format(Strict):
    """The one format that OpenAI's interface has a rate for."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class OfTranscription(Strict):
    model: str | None = None
    language: Annotated[str | None, BeforeValidator(language_code)] = None
    prompt: Annotated[str | None, Field(max_length=MAX_FIELD)] = None


class Input(Strict):
    format: Format = Format()
    transcription: OfTranscription = OfTranscription()
    noise_reduction: None = None
    turn_detection: None = None


class Audio(Strict):
    input: Input = Input()


class OfSession(Strict):
    type: Literal["transcription"]
    audio: Audio = Audio()
    include: list[Literal[""]] = []


@dataclass(frozen=True)
class Settings:
    """What a session transcribes with. model: the name that a client gave. language: a code; None: is heard. prompt:
    text to continue from."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options of a live session."""
        return {"language": self.language, **({"initial_prompt": self.prompt} if self.prompt else {})}

    def as_session(self) -> dict[str, Any]:
        """Returns what the client is told of them."""
        given = OfTranscription(model=self.model, language=self.language, prompt=self.prompt)
        return OfSession(type="transcription", audio=Audio(input=Input(transcription=given))).model_dump()


def settings_of(session: object, before: Settings) -> Settings:
    """Returns the settings after an event, those that it does not name as they were before; raises APIError that names
    the first one that cannot be used."""
    try:
        found = OfSession.model_validate(session).audio.input.transcription
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(["session", *map(str, first["loc"])])
        raise APIError(400, f"'{name}' {said_of(first)}", name, "invalid_value") from error
    return replace(before, **found.model_dump(exclude_unset=True))
