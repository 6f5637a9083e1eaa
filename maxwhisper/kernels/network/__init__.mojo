"""Operations of the network that maxwhisper brings itself, for CPUs."""

from .linear import Linear
