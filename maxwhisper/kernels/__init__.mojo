"""Operations that maxwhisper brings itself: for CPUs, but for `Store` and
`BiasedProduct`, which are for any device."""

from .attention import Append, Attention, CachedAttention
from .convolution import Convolution
from .decoder_block import DecoderBlock
from .draft import Guess, RoughKeys
from .linear import Linear
from .pick import Pick
from .product import BiasedProduct
from .store import Store
from .tiled_attention import AttentionScores, MaskedAttention, TiledAttention
