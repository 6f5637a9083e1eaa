"""WhisperLiveKit's policies: its own classes, set as its command sets them, but for its web server.

Its detector of speech says what is decoded: at the end of speech all that is decided, and silence is left out. That it
does for audio of any length at once, so its queues are not needed.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
from whisperlivekit.config import WhisperLiveKitConfig
from whisperlivekit.core import TranscriptionEngine, online_factory
from whisperlivekit.silero_vad_iterator import FixedVADIterator, OnnxWrapper

from maxwhisper.audio import SAMPLE_RATE
from maxwhisper.compare.convert import convert, store
from maxwhisper.compare.material import checkpoint_for


def kit(name: str) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Yields what listens by a policy, made from a language. faster-whisper encodes for both, and decodes for one."""
    stored = store(checkpoint_for(name))
    openai, ctranslate2 = stored / "openai" / "model.pt", convert("ctranslate2", stored)
    simul = {"decoder_model_path": str(openai), "encoder_model_path": str(ctranslate2)}
    for policy, models in (("localagreement", {"model_path": str(ctranslate2)}), ("simulstreaming", simul)):
        settings = {"backend_policy": policy, "backend": "faster-whisper", "warmup_file": "", **models}
        yield f"WhisperLiveKit, {policy}", partial(LiveKit, cache(partial(engine, settings)))


def engine(settings: dict[str, Any], language: str) -> Any:
    TranscriptionEngine.reset()  # of which there is one in a process
    return TranscriptionEngine(config=WhisperLiveKitConfig(lan=language, **settings))


class LiveKit:
    """Audio cut where the detector hears a pause, and the text of it."""

    def __init__(self, engines: Callable[[str], Any], language: str):
        engine = engines(language)
        self.processor = online_factory(engine.args, engine.asr)
        self.detector = FixedVADIterator(OnnxWrapper(session=engine.vac_session))
        self.n_sample = 0
        self.quiet_since: int | None = 0
        self.heard = 0.0
        self.last = 0.0
        self.settled = self.tentative = ""

    def feed(self, samples: np.ndarray) -> None:
        """Takes the next samples, and decodes what is speech."""
        start, self.n_sample, at = self.n_sample, self.n_sample + len(samples), 0
        for event in self.detector(samples):
            [(kind, sample)] = event.items()
            cut = min(max(int(sample) - start, at), len(samples))
            if kind == "start" and self.quiet_since is not None:
                silence = (start + cut - self.quiet_since) / SAMPLE_RATE
                self.heard += silence
                self.processor.end_silence(silence, self.last)
                self.quiet_since, at = None, cut
            elif kind == "end" and self.quiet_since is None:
                self.decode(samples[at:cut])
                self.show(self.processor.start_silence())
                self.quiet_since, at = start + cut, cut
        if self.quiet_since is None:
            self.decode(samples[at:])

    def decode(self, speech: np.ndarray) -> None:
        if len(speech):
            self.heard += len(speech) / SAMPLE_RATE
            self.processor.insert_audio_chunk(speech, self.heard)
            self.show(self.processor.process_iter())

    def end(self) -> None:
        """Settles what is tentative at the end of the audio."""
        finish = getattr(self.processor, "finish", self.processor.start_silence)
        self.show(finish())

    def show(self, found: tuple[list[Any], float]) -> None:
        tokens, _ = found
        self.settled += "".join(token.text for token in tokens)
        self.last = tokens[-1].end if tokens else self.last
        self.tentative = self.processor.get_buffer().text
