"""Operations that maxwhisper brings itself, for CPUs."""

from .attention import Attention, CachedAttention
from .candidates import Candidates
from .convolution import Convolution
from .linear import Linear
from .tiled_attention import MaskedAttention, TiledAttention
