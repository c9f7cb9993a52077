"""window_apply as one multiply-add of whole maps for each of the k^2 shifts: no map is copied k^2 times. Best for few channels a group."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .window import accumulator, chunks


def forward(w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int) -> Tensor:
    """w (B, G, k^2, s^2, H', W'), v (B, G, C, H, W) -> (B, G, C, s H', s W')."""
    batch, groups, channels = v.shape[:3]
    phases, (height, width) = scale * scale, w.shape[-2:]
    out = v.new_empty(batch, groups, channels, height * scale, width * scale)
    acc = accumulator(v)
    for b, g, c in chunks((batch, groups, channels), phases * height * width * acc.itemsize, v.device):
        weights, x = w[b, g].to(acc), v[b, g, c].to(acc)
        y = x.new_zeros(*x.shape[:3], phases, height, width)
        for j, there, here in _shifts(w, v, kernel, stride, dilation, first):
            y[..., *there].addcmul_(weights[:, :, j, None, :, *there], x[:, :, :, None, *here])
        _phases(out[b, g, c], scale).copy_(y.unflatten(3, (scale, scale)))
    return out


def backward(dy: Tensor, w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int) -> tuple[Tensor, Tensor]:
    """The gradients of w and v."""
    batch, groups, channels = v.shape[:3]
    phases, (height, width) = scale * scale, w.shape[-2:]
    acc = accumulator(v)
    dw = torch.zeros_like(w, dtype=acc, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    for b, g, c in chunks((batch, groups, channels), 2 * phases * height * width * acc.itemsize, v.device):
        weights, x = w[b, g].to(acc), v[b, g, c].to(acc)
        dout = _phases(dy[b, g, c], scale).to(acc).flatten(3, 4).contiguous()
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        for j, there, here in _shifts(w, v, kernel, stride, dilation, first):
            part = dout[..., *there]
            dw[b, g, j, :, *there] += (part * x[:, :, :, None, *here]).sum(2)
            if phases == 1:
                dx[..., *here].addcmul_(weights[:, :, j, :, *there], part[:, :, :, 0])
            else:
                dx[..., *here] += (part * weights[:, :, j, None, :, *there]).sum(3)
        dv[b, g, c] = dx
    return dw.to(w.dtype), dv


def _phases(y: Tensor, scale: int) -> Tensor:
    """A view (..., s H, s W) -> (..., s, s, H, W)."""
    return y.unflatten(-1, (-1, scale)).unflatten(-3, (-1, scale)).movedim((-3, -1), (-4, -3))


def _shifts(
    w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int
) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """For each pixel of the window: its index, the output pixels for which it is inside the map, and where it then is."""

    def along(outputs: int, inputs: int, offset: int) -> tuple[slice, slice]:
        low = max(0, -(offset // stride))
        high = min(outputs, (inputs - 1 - offset) // stride + 1)
        return slice(low, high), slice(stride * low + offset, stride * (high - 1) + offset + 1, stride)

    for j in range(kernel * kernel):
        y, y_source = along(w.shape[-2], v.shape[-2], first + dilation * (j // kernel))
        x, x_source = along(w.shape[-1], v.shape[-1], first + dilation * (j % kernel))
        if y.stop > y.start and x.stop > x.start:
            yield j, (y, x), (y_source, x_source)
