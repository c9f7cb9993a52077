"""Some elements at a time, computed again in the backward pass; one operator to torch.compile and torch.export."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._linear import linear, linear_gradients
from .._operator import operator

CPU, OTHER = 2**19, 2**26  # numbers of the wide layer at a time; 2 MB stay in the cache


def _pieces(x: Tensor, width: int) -> Iterator[slice]:
    step = max(1, (CPU if _dispatch.on_cpu(x) else OTHER) // width)
    for first in range(0, len(x), step):
        yield slice(first, first + step)


def _forward(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:-1], len(bias_2))
    flat, found = x.reshape(-1, x.shape[-1]), out.view(-1, len(bias_2))
    for piece in _pieces(flat, len(bias_1)):
        found[piece] = linear(linear(flat[piece], weight_1, bias_1).relu_(), weight_2, bias_2)
    return out


def _backward(
    grad: Tensor, x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    flat, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dx = flat.new_empty(flat.shape)
    weights = weight_1, bias_1, weight_2, bias_2
    sums = [torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device) for t in weights]
    for piece in _pieces(flat, len(bias_1)):
        here, g = flat[piece], grads[piece]
        wide = linear(here, weight_1, bias_1).relu_()
        d_wide, d2 = linear_gradients(g, wide, weight_2)
        d_wide.masked_fill_(wide <= 0, 0.0)
        dx[piece], d1 = linear_gradients(d_wide, here, weight_1)
        for total, part in zip(sums, (d1, d_wide.sum(0), d2, g.sum(0)), strict=True):
            total += part
    d1, e1, d2, e2 = (s.to(t.dtype) for s, t in zip(sums, weights, strict=True))
    return dx.view(x.shape), d1, e1, d2, e2


def _like(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], bias_2.shape[0])


def _sizes(x: Any, weight_1: Any, bias_1: Any, weight_2: Any) -> tuple[int, int]:
    elements = 1
    for side in x[:-1]:
        elements *= side
    return 2 * elements * weight_1[0] * weight_1[1], 2 * elements * weight_2[0] * weight_2[1]


def _flops(x: Any, weight_1: Any, bias_1: Any, weight_2: Any, bias_2: Any) -> int:
    return sum(_sizes(x, weight_1, bias_1, weight_2))


def _backward_flops(grad: Any, x: Any, weight_1: Any, bias_1: Any, weight_2: Any, bias_2: Any) -> int:
    first, second = _sizes(x, weight_1, bias_1, weight_2)
    return 3 * first + 2 * second


feed_forward = operator("feed_forward", _forward, _backward, _like, tensors=5, flops=_flops, backward_flops=_backward_flops)
