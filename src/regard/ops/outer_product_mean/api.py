"""Projected sums of outer products: precision settled, the implementation chosen."""

import torch
from torch import Tensor

from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import reference, rows

_dispatch.register("outer_product_mean", "rows")


def outer_product(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    """f_ij (W vec(sum_s a_si b_sj^T) + bias).

    Args:
        a, b: (B, S, N, c), (B, S, M, c).
        weight, bias: (D, c c), the channels of a major, and (D,).
        factor: (B, N, M) or broadcastable to it; it gets no gradient.

    Returns:
        (B, N, M, D), in float32 at least.
    """
    with full_precision(a):
        dtype = at_least_float32(a, b, weight)
        a, b, weight, bias, factor = (t.to(dtype) for t in (a, b, weight, bias, factor))
        choice = "rows", "some rows at a time, computed again in the backward pass: c^2 numbers a pair are never stored"
        way = reference if _dispatch.choose("outer_product_mean", *choice) == "reference" else rows
        return way.outer_product(a, b, weight, bias, factor.expand(a.shape[0], a.shape[2], b.shape[2]))


def counts(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, N): in how many rows of a mask (B, S, N) both elements are there."""
    with full_precision(mask):
        real = mask.to(dtype)
        return real.mT @ real
