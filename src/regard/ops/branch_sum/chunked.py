"""Some channels of one sample at a time: products exist in the cache alone, and the gradient of all branches is written once, in one tensor.

out = sum_r w_r u_r:   du_r = w_r d,   dw_r = sum_n d u_r
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._operator import operator

_ELEMENTS = 1 << 20


def _parts(u: Tensor, weights: Tensor) -> Iterator[tuple[slice, slice, list[tuple[int, slice]]]]:
    """Runs of samples, or of the channels of one, of about 4 MiB, and where each branch has that run."""
    _, radix, channels = weights.shape
    plane = math.prod(u.shape[2:])
    samples, step = max(1, _ELEMENTS // (channels * plane)), max(1, _ELEMENTS // plane)
    for b in range(0, u.shape[0], samples):
        for at in range(0, channels, step):
            to = min(at + step, channels)
            yield slice(b, b + samples), slice(at, to), [(r, slice(r * channels + at, r * channels + to)) for r in range(radix)]


def _forward(u: Tensor, weights: Tensor) -> Tensor:
    out = _fake(u, weights)
    for b, part, runs in _parts(u, weights):
        into = out[b, part]
        for r, run in runs:
            column = weights[b, r, part, None, None]
            if r == 0:
                torch.mul(u[b, run], column, out=into)
            else:
                into.addcmul_(u[b, run], column)
    return out


def _backward(d_out: Tensor, u: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    du, d_weights = torch.empty_like(u), torch.empty_like(weights)
    for b, part, runs in _parts(u, weights):
        d = d_out[b, part]
        for r, run in runs:
            d_weights[b, r, part] = (d * u[b, run]).sum((2, 3))
            torch.mul(d, weights[b, r, part, None, None], out=du[b, run])
    return du, d_weights


def _fake(u: Tensor, weights: Tensor) -> Tensor:
    last = u.is_contiguous(memory_format=torch.channels_last) and not u.is_contiguous()
    shape = (u.shape[0], weights.shape[2], *u.shape[2:])
    return torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=torch.channels_last if last else torch.contiguous_format)


def _fake_backward(d_out: Tensor, u: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(weights)


branch_sum = operator(
    "branch_sum",
    _forward,
    _backward,
    _fake,
    tensors=2,
    fake_backward=_fake_backward,
    flops=lambda *_: 0,
    backward_flops=lambda d_out, u, *_: 2 * math.prod(u),
)
