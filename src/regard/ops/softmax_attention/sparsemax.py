"""Sparsemax: the point of the simplex nearest to the scores, so that small weights are exactly zero. Martins, Astudillo, arXiv:1602.02068."""

import torch
from torch import Tensor

from .._precision import at_least_float32


def sparsemax(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """max(scores - tau, 0) along the last axis, tau such that it sums to one over the allowed entries; zeros where none is allowed.

    The entries that stay positive are found by sorting, exactly; the gradient flows through them alone.
    """
    z = scores.to(at_least_float32(scores))
    z = z if mask is None else z.masked_fill(~mask, torch.finfo(z.dtype).min)
    z = (z - z.detach().amax(-1, keepdim=True)).clamp_min(-2.0)  # below the largest minus one the weight is zero
    with torch.no_grad():
        ordered = z.sort(-1, descending=True).values
        k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        before = ordered.cumsum(-1) - 1
        count = (k * ordered > before).sum(-1, keepdim=True)
        support = z > before.gather(-1, count - 1) / count
        support = support if mask is None else support & mask
        count = support.sum(-1, keepdim=True).clamp_min(1)
    tau = (z.masked_fill(~support, 0.0).sum(-1, keepdim=True) - 1) / count
    return (z - tau).masked_fill(~support, 0.0)
