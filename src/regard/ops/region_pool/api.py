"""Regions of maps: the form is chosen here. Bin i of n over length L is [floor(i L / n), ceil((i + 1) L / n)): bins are never empty, may overlap."""

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import require
from .. import _dispatch
from .._precision import full_precision
from . import nested, reference, separable

_dispatch.register("region_pool", "separable", "nested")
Kind = Literal["mean", "max"]


def pool_regions(x: Tensor, sizes: Sequence[int], kind: Kind = "mean") -> Tensor:
    """The n x n bins of every n in `sizes`, row-major, one level after another: (B, C, H, W) -> (B, C, S), S the sum of n^2."""
    if kind == "max":
        impl = _dispatch.choose("region_pool", "nested", "coarse levels are pooled from finer ones of which they are unions")
        return (nested if impl == "nested" else reference).pool_max(x, sizes)
    with full_precision(x):
        return _linear(x).pool_mean(x, sizes)


def pool_windows(x: Tensor, sizes: Sequence[int], kind: Kind = "max") -> Tensor:
    """As `pool_regions` by windows of ceil(L / n) at strides of floor(L / n), where these are n on both axes."""
    levels = []
    for n in sizes:
        window, stride = [-(-length // n) for length in x.shape[2:]], [length // n for length in x.shape[2:]]
        counts = [(length - w) // s + 1 if s else 0 for length, w, s in zip(x.shape[2:], window, stride, strict=True)]
        hint = "windows of a map of {} by level {} are {} instead of {} on each axis; use binning='adaptive'"
        require(all(count == n for count in counts), hint, tuple(x.shape[2:]), n, counts, n)
        pool = F.max_pool2d if kind == "max" else F.avg_pool2d
        levels.append(pool(x, window, stride).flatten(2))
    return torch.cat(levels, 2)


def pool_boxes(x: Tensor, boxes: Sequence[Sequence[int]], sizes: Sequence[int], kind: Kind = "max") -> Tensor:
    """`pool_regions` of each of K boxes (image, y0, x0, y1, x1), ends exclusive: (K, C, S). Each box reads its own cells alone."""
    pooled = [pool_regions(x[i : i + 1, :, y0:y1, x0:x1], sizes, kind) for i, y0, x0, y1, x1 in boxes]
    return torch.cat(pooled) if pooled else x.new_empty(0, x.shape[1], sum(n * n for n in sizes))


def spread_regions(regions: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Bilinear interpolation of n x n regions over a map: (B, C, n, n) -> (B, C, *size)."""
    return _linear(regions).spread_regions(regions, size, align_corners)


def spread_convolved(onto: Tensor, regions: Sequence[Tensor], weight: Tensor, *, align_corners: bool = False) -> Tensor:
    """The 3x3 convolution, padded to the same size, of maps spread from regions, added to a map; without the spread maps.

    Args:
        onto: (B, F, H, W).
        regions: (B, C_i, n_i, n_i) of every level.
        weight: (F, sum of C_i, 3, 3).
    """
    return _linear(onto).spread_convolved(onto, regions, weight, align_corners)


def _linear(x: Tensor) -> ModuleType:
    if x.dtype in (torch.float32, torch.float64):
        name, why = "separable", "one axis at a time by small matrices reads or writes the map once"
    else:
        name, why = "reference", "the library's kernels sum half precision in float32"
    return separable if _dispatch.choose("region_pool", name, why) == "separable" else reference
