"""Masks of tokens: True for a real one."""

from torch import Tensor


def zero_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` (B, N, D) with the rows where `mask` (B, N) is False set to zero: nothing in them, not even NaN, gets through."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)
