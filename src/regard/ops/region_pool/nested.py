"""Maxima of coarse levels taken from finer ones: where n divides m, a bin of n is the union of m / n bins of m, overlaps or not."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_max(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, S)."""
    done: dict[int, Tensor] = {}
    for n in sorted(set(sizes), reverse=True):
        finer = [m for m in done if m % n == 0]
        done[n] = F.adaptive_max_pool2d(done[min(finer)] if finer else x, n)
    return torch.cat([done[n].flatten(2) for n in sizes], 2)
