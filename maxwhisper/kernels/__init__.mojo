"""Operations that maxwhisper brings itself: for CPUs, but for those of `device_attention`, `device_beams`, `device_select`, `product`,
`split_attention`, `step_product` and `store`, which are for any device."""

from .attention import Append, Attention, CachedAttention
from .convolution import Convolution
from .decoder_block import DecoderBlock
from .device_attention import DeviceAttention, DeviceScores
from .device_beams import DeviceBeams
from .device_select import DeviceSelect
from .draft import Propose
from .linear import Linear
from .loop import Embed, GoesOn
from .product import BiasedProduct, Float32Product
from .quantized import QuantizeKeys
from .select_tokens import SelectTokens
from .split_attention import CachedSplitAttention, LimitedSplitAttention, SplitAttention
from .step_product import StepProduct
from .store import EmbedLast, Store
from .tiled_attention import AttentionScores, MaskedAttention, TiledAttention
