"""The decoder's cache as openai-whisper's code sees it: a dict by module."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from .cache import KeyValueCache


class ModuleCache(KeyValueCache, Mapping[nn.Module, torch.Tensor]):
    """A `KeyValueCache` that is also openai-whisper's `kv_cache`: keys and values, each (batch, token, state), by the
    module that computes them there. They can be replaced, as its beam search does, by those of other texts, or of the
    same ones cut short.
    """

    def __init__(self, decoder: Any, cache: KeyValueCache | None = None):
        """Takes over the memory of `cache`, or begins with none."""
        c = cache or KeyValueCache()
        super().__init__(c.own, c.cross, c.n_token, c.rows, c.first_row, c.memory)
        self.dims = decoder.dims
        attentions = [(block.attn, block.cross_attn) for block in decoder.blocks]
        self.own_modules, self.cross_modules = (
            [module for each in side for module in (each.key, each.value)] for side in zip(*attentions, strict=True)
        )
        self.replaced: dict[nn.Module, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.n_token or self.replaced)

    def __iter__(self) -> Iterator[nn.Module]:
        own, cross = (zip(each[::2], each[1::2], strict=True) for each in (self.own_modules, self.cross_modules))
        order = [module for layer in zip(own, cross, strict=True) for pair in layer for module in pair]
        return (module for module in order if self.n_token or module in self.replaced)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, module: nn.Module) -> torch.Tensor:
        if module in self.replaced:
            return self.replaced[module]
        super().settle()
        if self.n_token and module in self.own_modules:
            kv = self.own[self.own_modules.index(module)][:, :, : self.n_token]
        elif self.n_token and module in self.cross_modules:
            kv = self.cross[self.cross_modules.index(module)]
        else:
            raise KeyError(module)
        return kv.transpose(1, 2).flatten(2)

    def __setitem__(self, module: nn.Module, kv: torch.Tensor) -> None:
        if module not in (*self.own_modules, *self.cross_modules):
            raise OptionError("a cache holds what the key and value modules of the decoder's attention compute")
        self.replaced[module] = kv

    def settle(self) -> None:
        """Puts what was replaced into the memory that MAX reads. Raises OptionError if it does not fit together."""
        if self.replaced:
            own, cross = ([self._split(module) for module in each] for each in (self.own_modules, self.cross_modules))
            self._put(own, cross)
            self.replaced = {}
        else:
            super().settle()

    def _split(self, module: nn.Module) -> torch.Tensor:
        """Returns keys or values as (batch, head, token, channel)."""
        if module not in self:
            raise OptionError("some keys or values of the cache are missing")
        kv, state = self[module], self.dims.n_text_state
        if kv.ndim != 3 or kv.shape[-1] != state:
            raise OptionError(f"keys or values in the cache are {tuple(kv.shape)}, expected (batch, token, {state})")
        return kv.unflatten(2, (self.dims.n_text_head, -1)).transpose(1, 2)

    def _put(self, own: list[torch.Tensor], cross: list[torch.Tensor]) -> None:
        for kvs in (own, cross):
            shapes = sorted({tuple(kv.shape) for kv in kvs})
            if len(shapes) > 1:
                raise OptionError(f"keys and values in the cache differ in shape: {shapes[0]}, {shapes[1]}")
        if own[0].shape[2] > self.dims.n_text_ctx:
            raise OptionError(f"the cache has {own[0].shape[2]} tokens, the model positions for {self.dims.n_text_ctx}")
        if not self.own or len(self.own[0]) != len(own[0]):
            self.own = []
        if any(module in self.replaced for module in self.cross_modules):
            self.cross, self._inputs = [kv.contiguous() for kv in cross], {}
        self.n_token, self.quantized_cross = 0, None
        self.append(own, self.dims.n_text_ctx)
