"""The definitions, by the library's pooling, interpolation and convolution. Bin i of n over length L is [floor(i L / n), ceil((i + 1) L / n))."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_mean(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, S)."""
    return torch.cat([F.adaptive_avg_pool2d(x, n).flatten(2) for n in sizes], 2)


def pool_max(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, S)."""
    return torch.cat([F.adaptive_max_pool2d(x, n).flatten(2) for n in sizes], 2)


def spread_regions(regions: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """(B, C, n, n) -> (B, C, H, W), bilinear."""
    return F.interpolate(regions, size, mode="bilinear", align_corners=align_corners)


def spread_convolved(onto: Tensor, regions: Sequence[Tensor], weight: Tensor, align_corners: bool) -> Tensor:
    """onto (B, F, H, W) plus the convolution by `weight` (F, sum of C_i, 3, 3) of the maps spread from regions (B, C_i, n_i, n_i)."""
    size = (onto.shape[2], onto.shape[3])
    spread = torch.cat([spread_regions(one, size, align_corners) for one in regions], 1)
    return onto + F.conv2d(spread, weight, padding=1)
