"""Soft thresholds: sign(z) f(|z| - t), which the gradient of the sign does not reach."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

Shrink = Callable[[Tensor, Tensor | float], Tensor]


def relu_shrink(z: Tensor, threshold: Tensor | float) -> Tensor:
    return z.sign() * F.relu(z.abs() - threshold)


def gelu_shrink(z: Tensor, threshold: Tensor | float) -> Tensor:
    """Not quite a threshold: below it values stay small, and flip their sign."""
    return z.sign() * F.gelu(z.abs() - threshold)


SHRINK: Mapping[str, Shrink] = MappingProxyType({"relu": relu_shrink, "gelu": gelu_shrink})
