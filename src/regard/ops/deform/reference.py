"""The definitions, written out with every sample kept."""

import torch
from torch import Tensor

from .._precision import at_least_float32


def sample(x: Tensor, offset: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    """x (B, C, H, W), offset (B, 2 groups taps, H', W') -> (B, C, taps, H' W')."""
    dtype, taps = at_least_float32(x, offset), kernel[0] * kernel[1]
    rows, columns = offset.shape[-2:]
    moved = offset.to(dtype).flatten(2).unflatten(1, (groups, taps, 2)).unbind(3)
    place = torch.arange(rows * columns, device=x.device)
    tap = torch.arange(taps, device=x.device)[:, None]
    starts = (place // columns, tap // kernel[1]), (place % columns, tap % kernel[1])
    low, after = [], []
    for axis, (at, step) in enumerate(starts):
        position = moved[axis] + (at * stride[axis] - padding[axis] + step * dilation[axis])
        position = torch.where((position > -1) & (position < x.shape[2 + axis]), position, -1.0)  # also where it is not a number
        low.append(position.detach().floor())
        after.append(position - low[-1])
    values = x.to(dtype).flatten(2).unflatten(1, (groups, -1))
    out = values.new_zeros(*values.shape[:3], taps, place.numel())
    for down in (0, 1):
        for right in (0, 1):
            row, column = (low[0] + down).long(), (low[1] + right).long()
            share = (after[0] if down else 1 - after[0]) * (after[1] if right else 1 - after[1])
            real = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
            index = row.clamp(0, x.shape[2] - 1) * x.shape[3] + column.clamp(0, x.shape[3] - 1)
            found = values.gather(3, index.flatten(2)[:, :, None].expand(-1, -1, values.shape[2], -1)).unflatten(3, index.shape[2:])
            out = out + found * (share * real)[:, :, None]
    return out.flatten(1, 2)


def apply(weights: Tensor, samples: Tensor) -> Tensor:
    """weights (B, G, taps, P), samples (B, C, taps, P) -> (B, P, C)."""
    grouped = samples.unflatten(1, (weights.shape[1], -1))
    return torch.einsum("bgtp,bgctp->bpgc", weights.to(samples.dtype), grouped).flatten(2)


def convolve(weight: Tensor, samples: Tensor, groups: int) -> Tensor:
    """weight (O, C / groups, kh, kw), samples (B, C, taps, P) -> (B, P, O)."""
    w = weight.to(samples.dtype).flatten(2).unflatten(0, (groups, -1))
    return torch.einsum("goct,bgctp->bpgo", w, samples.unflatten(1, (groups, -1))).flatten(2)
