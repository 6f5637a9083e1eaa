"""Operations that maxwhisper brings itself: for CPUs, but for `Store` and
`BiasedProduct`, which are for any device."""

from .attention import Append, Attention, CachedAttention
from .convolution import Convolution
from .decoder_block import DecoderBlock
from .draft import Guess
from .linear import Linear
from .loop import Embed, GoesOn, NothingFound
from .pick import Pick
from .product import BiasedProduct
from .rough import RoughKeys
from .store import Store
from .tiled_attention import AttentionScores, MaskedAttention, TiledAttention
