"""Means and interpolation one axis at a time, as products with small matrices: the map is read or written once, whatever the number of levels.

A level of n x n regions costs n multiply-adds a position, where the product with a matrix of all positions and regions costs n^2.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_mean(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, S)."""
    b, c, h, w = x.shape
    rows, columns = (averages(length, sizes, x).mT for length in (h, w))
    if c > 1 and x.stride(1) == 1 and not torch.compiler.is_compiling():  # channels last
        halfway = torch.bmm(rows.expand(b, -1, -1), x.permute(0, 2, 3, 1).reshape(b, h, w * c)).unflatten(2, (w, c))
        levels = zip(halfway.split(list(sizes), 1), columns.split(list(sizes)), strict=True)
        return torch.cat([torch.bmm(a.expand(b * len(a), -1, -1), t.flatten(0, 1)).unflatten(0, (b, len(a))).flatten(1, 2) for t, a in levels], 1).mT
    halfway = torch.bmm(rows.expand(b * c, -1, -1), x.reshape(b * c, h, w))
    levels = zip(halfway.split(list(sizes), 1), columns.split(list(sizes)), strict=True)
    return torch.cat([torch.matmul(t, a.mT).flatten(1) for t, a in levels], 1).unflatten(0, (b, c))


def spread_regions(regions: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """(B, C, n, n) -> (B, C, H, W), bilinear."""
    b, c, n, _ = regions.shape
    rows, columns = (interpolation(n, length, align_corners, regions) for length in size)
    halfway = torch.matmul(regions, columns).view(b * c, n, size[1])
    return torch.bmm(rows.mT.expand(b * c, -1, -1), halfway).view(b, c, *size)


def spread_convolved(onto: Tensor, regions: Sequence[Tensor], weight: Tensor, align_corners: bool) -> Tensor:
    """onto (B, F, H, W) plus the convolution by `weight` (F, sum of C_i, 3, 3) of the maps spread from regions (B, C_i, n_i, n_i).

    A spread map is linear in its regions: each tap of the kernel acts on the regions, and is spread with a shift of its own.
    """
    b, f, h, w = onto.shape
    all_rows, halfway = [], []
    for one, kernel in zip(regions, weight.split([r.shape[1] for r in regions], 1), strict=True):
        c, n = one.shape[1:3]
        rows, columns = (_shifted(interpolation(n, length, align_corners, one)) for length in (h, w))
        taps = torch.bmm(kernel.permute(0, 2, 3, 1).reshape(f * 9, c).expand(b, -1, -1), one.reshape(b, c, n * n))
        taps = taps.view(b, f, 3, 3, n, n).transpose(3, 4)  # row taps and rows, then column taps and columns
        halfway.append(torch.matmul(taps.reshape(b * f, 3 * n, 3 * n), columns))
        all_rows.append(rows)
    rows = torch.cat(all_rows).mT.expand(b * f, -1, -1)
    return torch.baddbmm(onto.reshape(b * f, h, w), rows, torch.cat(halfway, 1)).view(b, f, h, w)


def averages(length: int, sizes: Sequence[int], like: Tensor) -> Tensor:
    """(length, sum of sizes): its columns take the mean of one bin of one level."""
    bins = [(i, n) for n in sizes for i in range(n)]
    index, count = torch.tensor(bins, device=like.device).unbind(1)
    low, high = index * length // count, ((index + 1) * length + count - 1) // count
    at = torch.arange(length, device=like.device)[:, None]
    return ((at >= low) & (at < high)).to(like.dtype) / (high - low).to(like.dtype)


def interpolation(n: int, length: int, align_corners: bool, like: Tensor) -> Tensor:
    """(n, length): its columns take the linear interpolation of n values at one position."""
    at = torch.arange(length, device=like.device, dtype=torch.float64)
    at = at * (n - 1) / max(length - 1, 1) if align_corners else ((at + 0.5) * n / length - 0.5).clamp(0, n - 1)
    return (1 - (torch.arange(n, device=like.device)[:, None] - at).abs()).clamp(min=0).to(like.dtype)


def _shifted(matrix: Tensor) -> Tensor:
    """(n, length) -> (3 n, length): what the three taps of a kernel see, zero beyond the edge."""
    length, padded = matrix.shape[1], F.pad(matrix, (1, 1))
    return torch.cat([padded.narrow(1, shift, length) for shift in range(3)])
