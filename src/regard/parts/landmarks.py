"""Landmarks: a few vectors that stand for all positions, as means of segments of a sequence or of cells of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._precision import at_least_float32, full_precision
from ..ops.linear_attention import blockwise
from .linear import Linear


class LandmarkNet(nn.Module):
    """norm(linear(y)), on positions before they are averaged, or on their means."""

    def __init__(self, width: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = Linear(width, width, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)

    def forward(self, y: Tensor) -> Tensor:
        return self.norm(self.linear(y))

    def segment_means(self, y: Tensor, count: int, mask: Tensor | None) -> Tensor:
        """`segment_means` of forward(y), y (B, H, N, d), in float32 at least.

        The layer is centred beforehand, so that its outputs have mean zero and the norm only scales; gain and offset act on the means.
        """
        dtype = at_least_float32(y)
        weight, bias, gain, offset = (t.to(dtype)[None, None] for t in (self.linear.weight, self.linear.bias, self.norm.weight, self.norm.bias))
        eps = self.norm.eps

        def core(y: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
            z = y @ weight.mT + bias.unsqueeze(2)
            return segment_means(z * (z.square().mean(-1, keepdim=True) + eps).rsqrt(), count, mask)

        with full_precision(y):
            weight, bias = weight - weight.mean(2, keepdim=True), bias - bias.mean(2, keepdim=True)
            means = blockwise(core, y.to(dtype), mask, weight, bias, floats=8 * y.shape[2] * y.shape[3])
            return means * gain.unsqueeze(2) + offset.unsqueeze(2)


def segment_means(y: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """Means of `count` consecutive segments of y (B, H, N, d): (B, H, count, d).

    With n positions the first (n // count + 1) count - n segments have n // count positions each, the others one more. `mask` (B, 1, N) takes
    positions out of both the segments and n; a segment without any gives zeros.
    """
    n = y.shape[2]
    if mask is not None or torch.compiler.is_compiling():  # compiled, the length may be free
        share = _membership(mask if mask is not None else torch.ones(1, 1, n, dtype=torch.bool, device=y.device), count).to(y.dtype)
        return (share / share.sum(-1, keepdim=True).clamp_min(1)) @ y
    size = n // count
    if n % count == 0:
        return y.unflatten(2, (count, size)).mean(3)
    short = (size + 1) * count - n
    head, tail = y.split([short * size, n - short * size], 2)
    return torch.cat((head.unflatten(2, (short, size)).mean(3), tail.unflatten(2, (count - short, size + 1)).mean(3)), 2)


def segments_present(mask: Tensor, count: int) -> Tensor:
    """Which segments have a position: (B, 1, count)."""
    return _membership(mask, count).any(-1)


def _membership(mask: Tensor, count: int) -> Tensor:
    """Whether a position is in a segment, (B, 1, count, N)."""
    rank, n = mask.cumsum(-1) - 1, mask.sum(-1, keepdim=True)
    size = n // count
    short = (size + 1) * count - n
    late = rank - short * size
    segment = torch.where(late < 0, rank // size.clamp_min(1), short + late // (size + 1))
    return (segment.unsqueeze(2) == torch.arange(count, device=mask.device)[:, None]) & mask.unsqueeze(2)


def cell_means(y: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Means of side x side cells of an image whose pixels are the positions of y (B, H, N, d): (B, H, side side, d)."""
    h = y.shape[1]
    image = y.transpose(1, 2).flatten(2).unflatten(1, grid).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(image, side).flatten(2).unflatten(1, (h, -1)).mT
