"""The definition, written out."""

from torch import Tensor


def branch_sum(u: Tensor, weights: Tensor) -> Tensor:
    """(B, R C, H, W) and (B, R, C) -> (B, C, H, W): sum_r weights[:, r] u[:, r C : (r + 1) C]."""
    return (u.unflatten(1, weights.shape[1:]) * weights[:, :, :, None, None]).sum(1)
