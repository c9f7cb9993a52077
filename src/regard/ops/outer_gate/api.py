"""The outer gate: the form is chosen here."""

import torch
from torch import Tensor

from .. import _dispatch
from . import chunked, reference

_dispatch.register("outer_gate", "chunked")


def outer_gate(channel: Tensor, position: Tensor, combine: str) -> Tensor:
    """g = sigmoid(c p) or, for combine="add", sigmoid(c + p): channel (B, C) and position (B, 1, H, W) -> (B, C, H, W)."""
    return reference.logits(channel, position, combine).sigmoid()


def apply_outer_gate(x: Tensor, channel: Tensor, position: Tensor, combine: str, at_zero: float = 1.0) -> Tensor:
    """x (1 + g) / at_zero for x (B, C, H, W)."""
    if torch.compiler.is_compiling():
        name, why = "reference", "the compiler fuses the passes itself"
    elif _dispatch.on_cpu(x) and x.dtype == channel.dtype == position.dtype and x.dtype in (torch.float32, torch.float64):
        name, why = "chunked", "the gate stays in the cache of a CPU, and only x is kept for the backward pass"
    else:
        name, why = "reference", "the chunked form is arranged for CPU kernels of one full precision"
    if _dispatch.choose("outer_gate", name, why) == "reference":
        return reference.apply(x, channel, position, combine, at_zero)
    return chunked.apply(x, channel, position, combine == "mul", at_zero)
