"""Patterns as FlexAttention block masks, and attention under them: a fused kernel for CUDA, which skips tiles without an allowed pair."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import require
from .patterns import Pattern


def flex_block_mask(pattern: Pattern, n: int, num_heads: int, device: torch.device | str, key_mask: Tensor | None = None) -> Any:
    """The allowed pairs of n positions as a `torch.nn.attention.flex_attention.BlockMask`, (1 or B, num_heads, n, n), without forming them densely.

    Args:
        pattern: `SparsePattern`, `HypercubePattern`, or anything with their `allows(h, i, j, n)`.
        key_mask: boolean (B, n), True = may be attended.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = pattern.allows(h, i, j, n)
        return seen if key_mask is None else seen & key_mask[b, j]

    return create_block_mask(allowed, None if key_mask is None else key_mask.shape[0], num_heads, n, n, device=str(device))


def flex_attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, key_mask: Tensor | None) -> Tensor:
    """softmax(scale q k^T) v over the pairs of a pattern, (B, H, N, d), compiled on first use; CUDA alone, for training is not there on CPU."""
    require(q.is_cuda, "sparse_attention by flex runs on CUDA tensors, got {}; use 'blocks'", q.device)
    given = (pattern, q.shape[2], q.shape[1], q.device)
    block_mask = _block_mask(*given) if key_mask is None else flex_block_mask(*given, key_mask)
    return _kernel()(q, k, v, scale=scale, block_mask=block_mask)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=16)
def _block_mask(pattern: Pattern, n: int, num_heads: int, device: torch.device) -> Any:
    return flex_block_mask(pattern, n, num_heads, device)
