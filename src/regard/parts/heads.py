"""Splitting a width into heads, and the starting weights of attention projections."""

from torch import Tensor, nn

from ..errors import require
from ..validate import check_divisible


def head_width(dim: int, num_heads: int, head_dim: int | None) -> int:
    """`head_dim`, or the share of `dim` that each head gets."""
    require(num_heads > 0, "num_heads={} must be at least 1", num_heads)
    if head_dim is None:
        check_divisible(dim, num_heads, "dim", "num_heads")
        return dim // num_heads
    require(head_dim > 0, "head_dim={} must be at least 1", head_dim)
    return head_dim


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H d) -> (B, H, N, d), head i owning the channels [i d, (i + 1) d)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H d)."""
    return x.transpose(1, 2).flatten(2)


def init_projections_(q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear | None) -> None:
    """As nn.MultiheadAttention: Xavier uniform over the fused (3 D, D) matrix where the widths agree, biases zero."""
    fused = q.weight.shape == k.weight.shape == v.weight.shape
    for linear in (q, k, v):
        if fused:
            bound = (6 / (linear.in_features + 3 * linear.out_features)) ** 0.5
            nn.init.uniform_(linear.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if out is not None and out.bias is not None:
        nn.init.zeros_(out.bias)
