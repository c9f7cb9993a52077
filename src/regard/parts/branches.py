"""Choosing between branches of equal shape, channel by channel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import require


def hidden_at_least(channels: int, reduction: float, min_hidden: int, hidden_channels: int | None) -> int:
    """The hidden width: `hidden_channels`, or channels / reduction rounded down, but at least `min_hidden`."""
    require(reduction > 0, "reduction={} must be positive", reduction)
    width = max(int(channels // reduction), min_hidden) if hidden_channels is None else hidden_channels
    hint = "the hidden width is {}, at least 1 is needed; see reduction={}, min_hidden={}, hidden_channels={}"
    require(width > 0, hint, width, reduction, min_hidden, hidden_channels)
    return width


def branch_weights(logits: Tensor, gain: Tensor | None = None) -> Tensor:
    """(B, R, C) -> the softmax over R. With `gain` a blend with the first branch alone, which a gain of 0 gives exactly."""
    return start_from_first(logits.softmax(1), gain)


def start_from_first(weights: Tensor, gain: Tensor | None) -> Tensor:
    """delta + gain (weights - delta) for (B, R, C), where delta is 1 for the first branch and 0 for the others; `weights` without a gain."""
    if gain is None:
        return weights
    first = torch.zeros_like(weights[:, :, :1])
    first[:, 0] = 1
    return first + gain * (weights - first)


def branch_select(branches: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_r weights[:, r] * branches[r]: R maps (B, C, H, W) and (B, R, C) -> (B, C, H, W), one multiply-add a branch, nothing stacked."""
    out = branches[0] * weights[:, 0, :, None, None]
    for r, branch in enumerate(branches[1:], 1):
        out = torch.addcmul(out, branch, weights[:, r, :, None, None])
    return out
