"""Squeezing maps: the form is chosen here."""

from types import ModuleType

import torch
from torch import Tensor

from .. import _dispatch
from . import fused, reference

_dispatch.register("squeeze", "fused")


def position_mean(x: Tensor) -> Tensor:
    """(B, C, *space) -> (B, C). Accumulates in at least float32."""
    return _mean(x.flatten(2), 2)


def position_max(x: Tensor) -> Tensor:
    """(B, C, *space) -> (B, C). Equal maxima share the gradient evenly."""
    return _impl(x).amax(x.flatten(2), 2)


def channel_mean(x: Tensor) -> Tensor:
    """(B, C, *space) -> (B, 1, *space). Accumulates in at least float32."""
    return _mean(x, 1).unsqueeze(1)


def channel_max(x: Tensor) -> Tensor:
    """(B, C, *space) -> (B, 1, *space). Equal maxima share the gradient evenly."""
    return _impl(x).amax(x, 1).unsqueeze(1)


def attention_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One softmax over all positions, the same for every channel: a = softmax_n(w x_n + b), pooled = sum_n a_n x_n.

    Args:
        x: (B, C, *space).
        weight: (C,).
        bias: (1,).

    Returns:
        The pooled vector (B, C) and a (B, 1, *space).
    """
    pooled, attention = _impl(x).attention_pool(x.flatten(2), weight, bias)
    return pooled, attention.reshape(x.shape[0], 1, *x.shape[2:])


def _mean(x: Tensor, dim: int) -> Tensor:
    """A sum divided: its gradient is an expanded view, which autograd adds in place, where a mean's is a map of its own."""
    return (x.sum(dim, dtype=torch.promote_types(x.dtype, torch.float32)) / x.shape[dim]).to(x.dtype)


def _impl(x: Tensor) -> ModuleType:
    if torch.compiler.is_compiling():
        name, why = "reference", "the compiler fuses the passes itself"
    elif _dispatch.on_cpu(x):
        name, why = "fused", "on a CPU every pass over the map counts"
    else:
        name, why = "reference", "the fused form is arranged for CPU kernels"
    return fused if _dispatch.choose("squeeze", name, why) == "fused" else reference
