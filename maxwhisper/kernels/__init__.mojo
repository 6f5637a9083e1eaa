"""Operations that maxwhisper brings itself, for CPUs."""

from .attention import Append, Attention, CachedAttention
from .candidates import Candidates
from .convolution import Convolution
from .decoder_block import DecoderBlock
from .linear import Linear
from .tiled_attention import MaskedAttention, TiledAttention
