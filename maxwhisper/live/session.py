"""A live session: audio as it comes, text as it can be said, and at the end the transcript of all of it.

What is settled stays, so it is decided with the audio there was. A transcript is decided with all the audio: windows
end elsewhere, beams and temperatures are tried. So they are two texts. `finish` has the whole recording transcribed by
`Whisper.transcribe`, whose result it is; what is settled is what was shown meanwhile, and nothing in it changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from whisper.audio import N_SAMPLES, SAMPLE_RATE, TOKENS_PER_SECOND

from ..errors import OptionError
from ..options import check_calls, prompt_tokens, transcribing
from ..whisper import Whisper
from .hypotheses import hypothesis
from .loudness import Loudness, quietest
from .policies import HeardTwice, Policy, Word, audible, in_audio
from .recording import Recording

STEP = SAMPLE_RATE * 2 // 5
"""Samples of new audio, 0.4 s, for which a hypothesis is made."""
PAUSE = SAMPLE_RATE
"""Samples without a loud one, a second, after which nothing that was said before can change any more."""
LEAD = SAMPLE_RATE // 2
"""Samples of silence that are kept in front of what is said next."""
ECHO = SAMPLE_RATE // 5
"""Samples behind a loud one, 0.2 s, to which the decoder may still attend for a word."""
LONG, FULL = 8 * SAMPLE_RATE, 25 * SAMPLE_RATE
"""Samples of a window from which on sentences that are settled leave it; and words, if there is no end of one."""
ASTRAY = SAMPLE_RATE * 2 // 5
"""Samples, 0.4 s, by which the decoder attends to another place than where a word is."""
MOST = 150
"""Tokens that are settled in a window, of the 448 that Whisper has positions for, above which they leave it too."""
SHOWN = 2
"""Frames at the end of the audio whose words are not even shown."""
SENTENCE_ENDS = (".", "?", "!", "。", "？", "！")
FRAME = SAMPLE_RATE // TOKENS_PER_SECOND
"""Samples of a frame of the audio features."""
NOTHING = np.zeros(0, np.float32)


@dataclass
class Window:
    """The audio that is being decoded, and what is settled of its text.

    start: where it begins in the recording, in samples. words: those settled in it, each with the sample of the
    recording that it was heard at.
    """

    samples: np.ndarray
    start: int = 0
    words: list[tuple[Word, int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.samples)

    @property
    def begun(self) -> list[int]:
        """Returns the tokens of the settled words."""
        return [token for word, _ in self.words for token in word.tokens]

    def leave(self, n_word: int, start: int) -> None:
        """Begins later in the recording, behind as many words."""
        start = min(max(start, self.start), self.end)
        self.words = self.words[n_word:]
        self.samples, self.start = self.samples[start - self.start :], start

    def shorten(self) -> None:
        """Begins behind the last sentence that is settled with a word behind it, where it is quietest; behind all
        that is settled where there is much without one."""
        for number in range(len(self.words) - 1, 0, -1):
            (last, end), (_, begin) = self.words[number - 1 : number + 1]
            if last.text.strip().endswith(SENTENCE_ENDS):
                near = sorted((end - self.start, begin - self.start))
                return self.leave(number, self.start + quietest(self.samples, near[0] - ASTRAY, near[1] + ASTRAY))
        if len(self.samples) > FULL or len(self.begun) > MOST:
            self.leave(len(self.words), self.words[-1][1] + FRAME if self.words else self.start)
        return None


class Session:
    """Speech that is being said, and its text.

    It belongs to one thread at a time; any number of sessions may share a model. But for the recording, which is on the
    disk, it takes no more memory after an hour than after a minute.
    """

    def __init__(self, model: Whisper, policy: Callable[[], Policy] = HeardTwice, **options: Any):
        """Takes what makes the policy, which decides which words are settled, and the options of `Whisper.transcribe`,
        for `finish`; language, task, suppress_tokens and initial_prompt are heeded before that too.

        Raises OptionError as `transcribe` does, and for clip_timestamps: nobody knows yet when something is said.
        """
        if "clip_timestamps" in options:
            raise OptionError("clip_timestamps cannot be used live: give them to transcribe, with the recording")
        check_calls({"policy": policy})
        checked = transcribing(options, model)
        self.model, self.policy, self.options = model, policy, options
        self.language: str | None = checked.get("language")
        self.of_decoding = {name: checked[name] for name in ("task", "suppress_tokens") if name in checked}
        self.recording, self.loudness, self.deciding = Recording(), Loudness(), policy()
        prompt = checked.get("initial_prompt")
        self.prompt = prompt_tokens(prompt, model) if prompt else []
        self.window = Window(NOTHING)
        self.new: list[np.ndarray] = []
        self.n_new = 0
        self.unsettled: list[Word] = []
        self.heard_until = 0
        self.settled = ""
        self.tentative = ""
        self.result: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Returns how much audio there is so far, in seconds."""
        return len(self.recording) / SAMPLE_RATE

    def feed(self, samples: np.ndarray | torch.Tensor) -> None:
        """Takes the next samples, floats (sample,) in [-1, 1] at 16 kHz, as many as there are; decodes if there are
        enough new ones. Then `settled` is the text that stays, and `tentative` what may follow it.

        Raises OptionError for another shape or dtype, and after `finish`; AudioError for samples that are not finite.
        """
        rest = self._taken(samples)
        while len(rest):
            room = N_SAMPLES - len(self.window.samples) - self.n_new
            self.new.append(rest[:room])
            self.n_new += len(rest[:room])
            rest = rest[room:]
            if self.n_new >= STEP or len(rest):
                self._hear()

    def skip(self, samples: np.ndarray | torch.Tensor) -> None:
        """Takes the next samples as `feed` does, for which there is no time: what is said in them is in the result of
        `finish` alone. What was tentative before them is settled or gone."""
        skipped = self._taken(samples)
        self._end()
        self.loudness.listen(skipped)
        self.window.start = self.heard_until = len(self.recording)

    def finish(self) -> dict[str, Any]:
        """Returns what `Whisper.transcribe` does for all the audio, with the options of this session, which takes no
        more. What was tentative is settled or gone."""
        if self.result is None:
            self._end()
            self.result = self.model.transcribe(self.recording.all(), **self.options)
            self.recording.close()
        return self.result

    # ---- what happens with new audio -------------------------------------------------------------------------------

    def _taken(self, samples: Any) -> np.ndarray:
        if self.result is not None:
            raise OptionError("the session is finished: it takes no more audio, begin another one")
        return self.recording.add(samples)

    def _hear(self) -> None:
        """Takes what is new into the window, and settles what can be. There is room for more in the window then."""
        self._listen()
        window, loud_until = self.window, self.loudness.loud_until
        if loud_until <= window.start and not self.unsettled:
            self._leave(window.end - LEAD)
        elif window.end - loud_until >= PAUSE or len(window.samples) >= N_SAMPLES - STEP:
            paused = window.end - loud_until >= PAUSE
            self._decode_to_the_end()
            self._leave(window.end - LEAD if paused else window.end)
        else:
            self._decode(self.deciding.settled)
            if len(window.samples) > LONG or len(window.begun) > MOST:
                window.shorten()

    def _end(self) -> None:
        """Settles what is tentative, or drops it, and empties the window."""
        self._listen()
        if self.unsettled or self.loudness.loud_until > self.window.start:
            self._decode_to_the_end()
        self._leave(self.window.end)

    def _listen(self) -> None:
        new = np.concatenate([NOTHING, *self.new])
        self.new, self.n_new = [], 0
        self.loudness.listen(new)
        self.window.samples = np.concatenate([self.window.samples, new])

    def _leave(self, start: int) -> None:
        """Has the window begin there, behind all words; what comes next decides for itself."""
        self.window.leave(len(self.window.words), start)
        self.unsettled, self.tentative, self.deciding = [], "", self.policy()

    def _decode_to_the_end(self) -> None:
        """Settles all that is said in the window, unless the last hypothesis has heard it all."""
        if self.unsettled or self.heard_until < self.loudness.loud_until + LEAD:
            self._decode(in_audio)

    def _decode(self, settle: Callable[[list[Word], int], int]) -> None:
        window = self.window
        language = self.language if self.model.is_multilingual else "en"
        audio = torch.from_numpy(window.samples)
        settled = [word.text for word, _ in window.words]
        found = hypothesis(self.model, audio, self.prompt, settled, language=language, **self.of_decoding)
        self.heard_until = window.end
        n_loud = (self.loudness.loud_until - window.start + ECHO) // FRAME
        words = found.words[: audible(found.words, n_loud)]
        n_settled = settle(words, found.n_frame)
        for word in words[:n_settled]:
            window.words.append((word, window.start + word.frame * FRAME))
            self.settled += word.text
            self.language = found.language
        self.unsettled = words[n_settled:]
        shown = self.unsettled[: in_audio(self.unsettled, found.n_frame, SHOWN)]
        self.tentative = "".join(word.text for word in shown)
