"""Splitting a width into heads, the starting weights of attention projections, and the checks that attention over tokens begins with."""

from torch import Tensor, nn

from ..errors import require
from ..validate import check_context, check_divisible, check_mask, check_tokens


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


def init_truncated_(*layers: nn.Linear) -> None:
    """As vision transformers start: weights normal with deviation 0.02, cut off at 2, biases zero."""
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def checked_source(x: Tensor, context: Tensor | None, dim: int, context_dim: int, key_mask: Tensor | None) -> Tensor:
    """What `x` (B, N, dim) attends to: `context` (B, M, context_dim), or `x` itself if None; all are checked, and `key_mask` to be (B, M)."""
    check_tokens(x, dim)
    source = x if context is None else context
    check_context(x, source, context_dim)
    check_mask(key_mask, source.shape[0], source.shape[1])
    return source


def check_streaming(causal: bool, name: str) -> None:
    require(causal, "{} runs step by step only with causal=True, got causal={}", name, causal)


def check_position(x: Tensor, dim: int) -> None:
    """`x` must be (batch, dim), one position of each sequence."""
    require(x.ndim == 2 and x.shape[-1] == dim, "x must be (batch, {}), one position, got {}", dim, tuple(x.shape))
