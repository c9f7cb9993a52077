"""Some rows at a time, computed again in the backward pass; one operator to torch.compile and torch.export."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._operator import operator

CPU, OTHER = 2**19, 2**26  # numbers of outer products formed at a time; 2 MB stay in the cache


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[int, slice]]:
    """Sample, rows."""
    step = max(1, (CPU if _dispatch.on_cpu(a) else OTHER) // max(1, b.shape[2] * a.shape[3] * b.shape[3]))
    for i in range(a.shape[0]):
        for row in range(0, a.shape[2], step):
            yield i, slice(row, row + step)


def _outer(a: Tensor, b: Tensor, c: int) -> Tensor:
    """(S, n c), (S, M c) -> (n M, c c)."""
    return (a.mT @ b).unflatten(0, (-1, c)).unflatten(2, (-1, c)).transpose(1, 2).reshape(-1, c * c)


def _forward(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    c = a.shape[3]
    out = a.new_empty(*factor.shape, bias.shape[0])
    for i, rows in _pieces(a, b):
        here = out[i, rows].flatten(0, 1)
        torch.addmm(bias, _outer(a[i, :, rows].flatten(1), b[i].flatten(1), c), weight.mT, out=here)
        here *= factor[i, rows].reshape(-1, 1)
    return out


def _backward(grad: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c, m = a.shape[3], b.shape[2]
    da, db, d_weight, d_bias = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (a, b, weight, bias))
    for i, rows in _pieces(a, b):
        part, others = a[i, :, rows].flatten(1), b[i].flatten(1)
        g = (grad[i, rows] * factor[i, rows].unsqueeze(-1)).flatten(0, 1)
        d_bias += g.sum(0)
        d_weight += g.mT @ _outer(part, others, c)
        d_outer = (g @ weight).view(-1, m, c, c).transpose(1, 2).reshape(-1, m * c)
        da[i, :, rows] = (others @ d_outer.mT).view(len(others), -1, c)
        db[i].view(len(others), -1).addmm_(part, d_outer)
    return da, db, d_weight, d_bias


def _like(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    return a.new_empty(*factor.shape, bias.shape[0])


def _flops(a: Any, b: Any, weight: Any, *_: Any) -> int:
    return 2 * a[0] * a[2] * b[2] * weight[1] * (a[1] + weight[0])


def _backward_flops(grad: Any, *shapes: Any) -> int:
    """The outer products once more, and two products for each of the two of the forward pass."""
    a, b, weight, *_ = shapes
    return 2 * _flops(*shapes) + 2 * a[0] * a[2] * b[2] * weight[1] * a[1]


outer_product = operator("outer_product_mean", _forward, _backward, _like, tensors=5, wanted=range(4), flops=_flops, backward_flops=_backward_flops)
