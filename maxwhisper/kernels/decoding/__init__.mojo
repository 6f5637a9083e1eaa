"""Operations of the decode loop that maxwhisper brings itself, for CPUs."""

from .candidates import Candidates
