"""Hooks of PyTorch's modules, which MAX does not call."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Returns whether a call of the module would call more than the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
