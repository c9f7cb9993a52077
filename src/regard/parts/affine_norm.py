"""A BatchNorm as the affine map it is, for values that are never stored: the caller computes their statistics."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..ops._precision import at_least_float32


def affine_norm(norm: Any, statistics: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """scale and shift with norm(x) = scale x + shift; the running statistics move as those of `norm` itself would.

    Args:
        norm: a BatchNorm of D features.
        statistics: () -> mean (D,), biased variance (D,) and number of the values, asked for only where `norm` would compute them.
    """
    if norm.training or norm.running_mean is None:
        mean, variance, count = statistics()
        if norm.training and norm.running_mean is not None:
            with torch.no_grad():
                norm.num_batches_tracked.add_(1)
                rate = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked
                for running, found in ((norm.running_mean, mean), (norm.running_var, variance * count / (count - 1))):
                    running.copy_(running + rate * (found.to(running.dtype) - running))
    else:
        dtype = at_least_float32(norm.running_mean)
        mean, variance = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    scale = (variance + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def check_statistics(norm: Any, values: int, what: str) -> None:
    """A BatchNorm in training needs more than one value per channel; `values` is how many it gets."""
    if norm.training or norm.running_mean is None:
        require(values > 1, "BatchNorm in training cannot normalise {}; call module.eval(), or use a larger batch or map", what)
