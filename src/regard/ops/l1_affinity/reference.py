"""The definition, written out: W = tanh(q k^T) gate(-beta (|a_i - b_j|_1 - mean))."""

import torch
from torch import Tensor


def distance(a: Tensor, b: Tensor) -> Tensor:
    """(B, H, N, d), (B, H, M, d) -> sum_c |a_ic - b_jc|, (B, H, N, M)."""
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).abs().sum(-1)


def mean(x: Tensor, mask: Tensor | None, over: str) -> Tensor:
    """The mean over the allowed keys of a row ("row") or the allowed pairs of a head ("matrix"), axes kept; the mean of nothing is 0."""
    axes = (-1,) if over == "row" else (-2, -1)
    if mask is None:
        return x.mean(axes, keepdim=True)
    count = torch.broadcast_to(mask, x.shape).sum(axes, keepdim=True).clamp_min(1)
    return x.masked_fill(~mask, 0.0).sum(axes, keepdim=True) / count


def weights(scores: Tensor, distance: Tensor, beta: float | Tensor, mask: Tensor | None, normalization: str, center: Tensor | None) -> Tensor:
    """`center` is what is taken off the distance; entries that are not allowed are 0."""
    gate = torch.sigmoid(-beta * (distance if center is None else distance - center))
    out = scores.tanh() * (2 * gate if normalization == "scale" else gate)
    return out if mask is None else out.masked_fill(~mask, 0.0)
