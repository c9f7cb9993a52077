"""Some channels of one sample at a time: the gate is formed in the cache and never kept, forward and backward.

out = x (1 + s) / z,   s = sigmoid(l):   dx = d (1 + s) / z,   dl = d x s (1 - s) / z
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._operator import operator

_ELEMENTS = 1 << 19


def _parts(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Runs of samples, or of the channels of one, of about 2 MiB."""
    plane = math.prod(x.shape[2:])
    samples, channels = max(1, _ELEMENTS // (x.shape[1] * plane)), max(1, _ELEMENTS // plane)
    for b in range(0, x.shape[0], samples):
        for at in range(0, x.shape[1], channels):
            yield slice(b, b + samples), slice(at, at + channels)


def _gate(channel: Tensor, position: Tensor, b: slice, part: slice, mul: bool) -> Tensor:
    column, plane = channel[b, part, None, None], position[b]
    return torch.sigmoid_(column * plane if mul else column + plane)


def _forward(x: Tensor, channel: Tensor, position: Tensor, mul: bool, at_zero: float) -> Tensor:
    out = torch.empty_like(x)
    for b, part in _parts(x):
        gate = _gate(channel, position, b, part, mul).add_(1)
        torch.mul(x[b, part], gate if at_zero == 1 else gate.div_(at_zero), out=out[b, part])
    return out


def _backward(d_out: Tensor, x: Tensor, channel: Tensor, position: Tensor, mul: bool, at_zero: float) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_channel, d_position = torch.empty_like(x), torch.empty_like(channel), torch.zeros_like(position)
    planes = position.flatten(2) if mul else torch.ones_like(position).flatten(2)
    columns = channel if mul else torch.ones_like(channel)
    for b, part in _parts(x):
        gate, d = _gate(channel, position, b, part, mul), d_out[b, part]
        d_logits = torch.ops.aten.sigmoid_backward(d * x[b, part], gate).flatten(2)
        d_channel[b, part] = torch.bmm(planes[b], d_logits.mT)[:, 0]
        d_position[b] += torch.bmm(columns[b, None, part], d_logits).view(d_position[b].shape)
        torch.mul(d, gate.add_(1), out=dx[b, part])
    if at_zero != 1:
        for one in (dx, d_channel, d_position):
            one.div_(at_zero)
    return dx, d_channel, d_position


def _fake(x: Tensor, channel: Tensor, position: Tensor, mul: bool, at_zero: float) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(d_out: Tensor, x: Tensor, channel: Tensor, position: Tensor, mul: bool, at_zero: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(channel), torch.empty_like(position)


apply = operator(
    "outer_gate",
    _forward,
    _backward,
    _fake,
    tensors=3,
    fake_backward=_fake_backward,
    flops=lambda *_: 0,
    backward_flops=lambda d_out, x, *_: 4 * math.prod(x),
)
