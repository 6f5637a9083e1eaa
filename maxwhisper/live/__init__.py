"""Text of speech while it is said: what is settled, and what may change.

session = maxwhisper.live.Session(model)
for samples in microphone:
    session.feed(samples)
    print(session.settled, session.tentative)
session.finish()["text"]  # what `model.transcribe` gives of all of it
"""

from .policies import POLICIES, AlignAtt, HeardTwice, LocalAgreement, Policy, Word
from .session import Session

__all__ = ["POLICIES", "AlignAtt", "HeardTwice", "LocalAgreement", "Policy", "Session", "Word"]
