"""Operations that maxwhisper brings itself, for CPUs."""

from .attention import Attention, CachedAttention
from .candidates import Candidates
from .linear import Linear
