"""Attention modulated by a kernel: the cheapest way that gives the definition's numbers."""

import torch
from torch import Tensor

from .. import _dispatch, softmax_attention
from .._precision import at_least_float32, full_precision
from . import low_rank, reference

_dispatch.register("graph_kernels", "fused", "low_rank")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor | None,
    *,
    frequency: Tensor | None = None,
    signed: bool = False,
    mask: Tensor | None = None,
    feature_map: str | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Weights of softmax or of features, times a kernel, row-normalised, applied to v.

    Args:
        q, k, v: (B, H, N, d).
        kernel: (N, N), (B or 1, N, N) or (B or 1, H or 1, N, N); None stands for frequency frequency^T.
        frequency: (N, r) or (B or 1, N, r), non-negative.
        signed: the kernel may have negative entries, so its logarithm cannot be added to scores.
        mask: (B, N), True = a real node.
        feature_map: None for a softmax; "relu" or "elu" for a product of features.
        dropout: probability of dropping a weight; pass 0 outside training.

    Returns:
        (B, H, N, d); a node that may see no other gets zeros.
    """
    impl, why = _choice(q, v, kernel, frequency, signed, feature_map, dropout)
    impl = _dispatch.choose("graph_kernels", impl, why)
    if impl == "low_rank" and frequency is not None and feature_map is not None:
        exact = at_least_float32(q)
        with full_precision(q):
            q = reference.features(q.to(exact), feature_map, q.shape[-1] ** -0.5)
            k = reference.features(k.to(exact), feature_map, 1.0)
            return low_rank.attend(q, k, v.to(exact), frequency.to(exact).expand(q.shape[0], -1, -1), mask).to(v.dtype)
    kernel = _dense(kernel, frequency)
    if impl == "fused" and feature_map is None:
        seen = kernel > 0
        allowed = seen if mask is None else seen & mask[:, None, None]
        bias = kernel.where(seen, torch.ones_like(kernel)).log()
        return softmax_attention.attend(q, k, v, mask=allowed, bias=bias, dropout=dropout)
    w = weights(q, k, kernel, mask=mask, feature_map=feature_map)
    with full_precision(q):
        return (torch.dropout(w, dropout, dropout > 0) @ v.to(w.dtype)).to(v.dtype)


def weights(
    q: Tensor,
    k: Tensor,
    kernel: Tensor | None,
    *,
    frequency: Tensor | None = None,
    mask: Tensor | None = None,
    feature_map: str | None = None,
) -> Tensor:
    """The weights that `attend` applies: (B, H, N, N)."""
    exact = at_least_float32(q)
    kernel = _dense(kernel, frequency).to(exact)
    allowed = None if mask is None else mask[:, None, None]
    scale = q.shape[-1] ** -0.5
    with full_precision(q):
        q, k = q.to(exact), k.to(exact)
        if feature_map is None:
            return reference.softmax_weights(q, k, kernel, allowed, scale)
        q, k = reference.features(q, feature_map, scale), reference.features(k, feature_map, 1.0)
        return reference.linear_weights(q, k, kernel, allowed)


def _dense(kernel: Tensor | None, frequency: Tensor | None) -> Tensor:
    """(B or 1, H or 1, N, N), of a kernel that may lack the axes of batch and heads."""
    if kernel is None:
        assert frequency is not None
        with full_precision(frequency):
            frequency = frequency.to(at_least_float32(frequency))
            kernel = frequency @ frequency.mT
    return kernel if kernel.ndim == 4 else kernel[:, None] if kernel.ndim == 3 else kernel[None, None]


def _choice(
    q: Tensor, v: Tensor, kernel: Tensor | None, frequency: Tensor | None, signed: bool, feature_map: str | None, dropout: float
) -> tuple[str, str]:
    if feature_map is not None:
        if frequency is None or dropout:
            return "reference", "a kernel of full rank, or dropped weights, need the N x N weights"
        (n, m), d, r = q.shape[2:], v.shape[-1], frequency.shape[-1]
        cheaper = 2 * m * r * (d + 1) < n * (m + d + r // q.shape[1])
        return ("low_rank", f"rank {r} makes features cheaper than N x N weights") if cheaper else ("reference", "the rank is too high to pay")
    if signed:
        return "reference", "the kernel may have negative entries"
    if kernel is not None and kernel.requires_grad:
        return "reference", "the kernel learns, also where it is zero"
    return "fused", "log K added to the scores of scaled_dot_product_attention"
