"""Operations that maxwhisper brings itself: for CPUs, but for `Store` and
`BiasedProduct`, which are for any device."""

from .attention import Append, Attention, CachedAttention
from .convolution import Convolution
from .decoder_block import DecoderBlock
from .draft import Propose
from .linear import Linear
from .loop import Embed, GoesOn
from .product import BiasedProduct
from .quantized import QuantizeKeys
from .select_tokens import SelectTokens
from .store import Store
from .tiled_attention import AttentionScores, MaskedAttention, TiledAttention
